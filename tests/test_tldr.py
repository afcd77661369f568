"""The world keeps its promises: exact by construction, labelled by Bradley-Terry, deterministic, disjoint."""

import hashlib
import itertools
import json
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minqstar.errors import UserError
from minqstar.lm.tokenizer import load_tokenizer
from minqstar.theory.mdp import implicit_rewards, solve, visits
from minqstar.training.formats import answers_of
from minqstar.world import tldr
from minqstar.world.automaton import Automaton
from minqstar.world.grammar import EPS, PAID, RIGHT, WRONG
from minqstar.world.posts import Post, draw_post, post_of, read_post
from minqstar.world.scenarios import SCENARIOS
from minqstar.world.tldr import DataConfig, World, dataset, draw_rows

WORLD = World(load_tokenizer())
posts = st.integers(0, 10**6).map(lambda seed: draw_post(random.Random(seed), "train"))
seeds = st.integers(0, 10**6)


def expand(scenario, post, node="start"):
    """Every summary of a post, from the grammar's text alone: (text, pi_ref, return). No tokens, no tables."""
    column = scenario.subreddits.index(post.subreddit)
    for o in scenario.grammar[node]:
        pieces = re.split(r"\{(\w+)\}", o.text)
        choices = [slot_values(scenario, post, fact) for fact in pieces[1::2]]
        for values in itertools.product(*choices):
            text = pieces[0] + "".join(v + literal for (v, _, _), literal in zip(values, pieces[2::2], strict=True))
            p = o.weights[column] * math.prod(p for _, p, _ in values)
            r = PAID[o.kind] + sum(r for _, _, r in values)
            if o.next is None:
                yield text, p, r
            else:
                for rest, q, s in expand(scenario, post, o.next):
                    yield text + rest, p * q, r + s


def slot_values(scenario, post, fact):
    values, right = scenario.facts[fact], post.facts[fact]
    twins = [post.facts[f] for f, v in scenario.facts.items() if v == values and f != fact]
    for value in values:
        if value == right:
            yield value, 1 - EPS, RIGHT
        elif twins:
            yield (value, EPS / 2 if value == twins[0] else EPS / 2 / (len(values) - 2), WRONG)
        else:
            yield value, EPS / (len(values) - 1), WRONG


def small(scenario):
    """The scenario with three values a fact, so that all of its summaries can be listed."""
    shared = {values: values[:3] for values in scenario.facts.values()}
    return replace(scenario, facts={fact: shared[values] for fact, values in scenario.facts.items()})


def test_constants_are_pinned():
    assert (tldr.BETA, EPS, RIGHT, WRONG) == (0.5, 0.25, 0.5, -1.0)
    assert PAID == {"clause": 0.3, "filler": -0.4, "": 0.0}
    assert len(SCENARIOS) >= 3 and all(len(scenario.facts) >= 5 for scenario in SCENARIOS)


@pytest.mark.parametrize("scenario", [small(s) for s in SCENARIOS], ids=lambda s: s.name)
def test_the_automaton_is_the_grammar(scenario, tokenizer):
    """Every summary has one derivation, and its pi_ref, return, pi* and A* equal those of the listed language."""
    rng = random.Random(1)
    facts = {fact: rng.choice(values) for fact, values in scenario.facts.items()}
    twins = [f for f, v in scenario.facts.items() if list(scenario.facts.values()).count(v) == 2]
    facts[twins[1]] = next(v for v in scenario.facts[twins[1]] if v != facts[twins[0]])
    for subreddit in scenario.subreddits:
        post = Post(scenario.name, subreddit, facts, "")
        language = list(expand(scenario, post))
        assert len({text for text, _, _ in language}) == len(language)
        assert math.isclose(math.fsum(p for _, p, _ in language), 1.0, abs_tol=1e-12)
        log_z = math.log(math.fsum(p * math.exp(r / tldr.BETA) for _, p, r in language))
        automaton = Automaton(scenario, tokenizer)
        mdp = automaton.mdp([post])
        solution = solve(mdp, tldr.BETA)
        assert math.isclose(solution.V[0, 0].item(), tldr.BETA * log_z, abs_tol=1e-10)
        A_star = implicit_rewards(mdp, solution, tldr.BETA)
        for text, p, r in random.Random(0).sample(language, 300):
            tokens = tokenizer.encode_response(text)
            states, actions = automaton.walk(tokens)
            assert len(states) == len(tokens)
            assert math.isclose(mdp.log_ref[0, states, actions].sum().item(), math.log(p), abs_tol=1e-9)
            assert math.isclose(mdp.reward[0, states, actions].sum().item(), r, abs_tol=1e-9)
            assert math.isclose(A_star[0, states, actions].sum().item(), r - tldr.BETA * log_z, abs_tol=1e-9)


@given(st.lists(posts, min_size=1, max_size=6), seeds)
def test_draws_are_on_grammar_and_judged_as_drawn(some, seed):
    responses, returns = WORLD.sample(some, np.random.default_rng(seed))
    for post, tokens, value in zip(some, responses, returns, strict=True):
        text = WORLD.tokenizer.decode(tokens)
        assert WORLD.tokenizer.encode_response(text) == tokens  # no string has a second tokenisation here
        verdict = WORLD.judge(post, text)
        assert math.isclose(verdict.total, value, abs_tol=1e-9)
        for fact in (*verdict.right, *verdict.wrong):
            assert (post.facts[fact] in text) or fact in verdict.wrong
    for exact, tokens in zip(WORLD.exact_all(some, responses), responses, strict=True):
        assert len(exact.advantage) == len(exact.kind) == len(tokens)
        forced = torch.tensor([kind == "forced" for kind in exact.kind])
        assert exact.advantage[forced].abs().max() < 1e-12
        eq_10 = exact.reward + exact.value[1:] - exact.value[:-1]
        assert torch.allclose(exact.advantage, eq_10, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_exact_rewards_telescope_at_their_beta(beta):
    """They sum to the return less V*(s_0), both at that beta."""
    some = [draw_post(random.Random(seed), "train") for seed in range(6)]
    responses, returns = WORLD.sample(some, np.random.default_rng(0))
    value = {}
    for _, indices, mdp in WORLD.tables(some):
        value |= dict(zip(indices, solve(mdp, beta).V[:, 0].tolist(), strict=True))
    for i, exact in enumerate(WORLD.exact_all(some, responses, beta)):
        assert exact.advantage.sum() == pytest.approx(returns[i] - value[i], abs=1e-9)
        assert exact.value[0] == value[i] and exact.value[-1] == 0
        text = WORLD.tokenizer.decode(responses[i])
        one = WORLD.exact(some[i].prompt, text, beta)
        for a, b in zip(one[:4], exact[:4], strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
        assert WORLD.exact(some[i].prompt, text + " Indeed.", beta) is None and WORLD.exact("Hello", text) is None


def test_draws_follow_pi_ref():
    """Mean return of many draws within five standard errors of the exact expectation under pi_ref."""
    post = draw_post(random.Random(0), "train")
    automaton, _, mdp = next(WORLD.tables([post]))
    expected = (visits(mdp, mdp.log_ref) * mdp.reward).sum().item()
    _, returns = WORLD.sample([post] * 20_000, np.random.default_rng(0))
    assert abs(np.mean(returns) - expected) < 5 * np.std(returns) / math.sqrt(len(returns))
    assert automaton.kind.count("fact") >= 5


def test_the_optimum_is_the_mean_over_draws_of_pi_star():
    some = [draw_post(random.Random(seed), "test") for seed in range(60)]
    figures = WORLD.optimum(some)
    total = filled = wrong = tokens = 0.0
    for _, _, mdp in WORLD.tables(some):
        log_pi = solve(mdp, tldr.BETA).log_pi
        for row in range(len(mdp.log_ref)):
            value = torch.zeros(mdp.num_states + 1, 4, dtype=torch.float64)  # return, filled, wrong, tokens to go
            for s in reversed(range(mdp.num_states)):
                for a in torch.nonzero(mdp.token[s] >= 0).flatten().tolist():
                    r = mdp.reward[row, s, a].item()
                    here = torch.tensor([r, r in (RIGHT, WRONG), r == WRONG, 1.0], dtype=torch.float64)
                    value[s] += log_pi[row, s, a].exp() * (here + value[mdp.next[s, a]])
            total, filled, wrong, tokens = (
                x + y.item() for x, y in zip((total, filled, wrong, tokens), value[0], strict=True)
            )
    for name, mean in (("judge_return", total), ("filled", filled), ("wrong", wrong), ("tokens", tokens)):
        assert math.isclose(figures[name], mean / len(some), rel_tol=1e-9)


def test_the_judge_knows_what_leaves_the_grammar():
    post = draw_post(random.Random(0), "test")
    (tokens,), _ = WORLD.sample([post], np.random.default_rng(0))
    text = WORLD.tokenizer.decode(tokens)
    for other in ("", "nonsense", text + " And more.", text[:-1], text.strip(), " " + text):
        assert math.isnan(WORLD.judge(post, other).total), other
    assert not math.isnan(WORLD.judge(post, text).total)
    assert WORLD.exact_all([post], [tokens[:-2] + tokens[:1]]) == [None]


def test_alternatives_must_be_prefix_free(tokenizer):
    job = SCENARIOS[0]
    bad = replace(job, facts=job.facts | {"company": ("Acme", "Acme Delta")})
    with pytest.raises(ValueError, match="prefix-free"):
        Automaton(bad, tokenizer)


@given(seeds, st.sampled_from(["train", "validation", "test"]))
def test_posts_state_their_facts(seed, split):
    post = draw_post(random.Random(seed), split)
    assert read_post(post.prompt) == post
    assert post.prompt.endswith("TL;DR:")
    assert 60 <= len(WORLD.tokenizer.encode(post.prompt)) <= 140
    assert read_post("SUBREDDIT: r/jobs nothing else") is None and read_post("hello") is None


def test_summaries_have_12_to_40_tokens():
    some = [draw_post(random.Random(seed), "train") for seed in range(3000)]
    responses, _ = WORLD.sample(some, np.random.default_rng(1))
    lengths = list(map(len, responses))
    assert min(lengths) >= 12 and max(lengths) <= 40


def test_greedy_falls_for_the_garden_path():
    """Under the exact pi*, greedy decoding finds the most likely response on at most 70% of posts, and on some."""
    some = [draw_post(random.Random(seed), "test") for seed in range(300)]
    found = 0
    for _, _, mdp in WORLD.tables(some):
        log_pi = solve(mdp, tldr.BETA).log_pi
        best = torch.zeros(len(log_pi), mdp.num_states + 1, dtype=torch.float64)
        greedy = best.clone()
        for s in reversed(range(mdp.num_states)):
            best[:, s] = (log_pi[:, s] + best[:, mdp.next[s]]).max(-1).values
            step, action = log_pi[:, s].max(-1)
            greedy[:, s] = step + greedy.gather(1, mdp.next[s][action][:, None])[:, 0]
        found += int((best[:, 0] - greedy[:, 0] < 1e-9).sum())
    assert 0.2 <= found / len(some) <= 0.7


SMALL = DataConfig(pairs=40, ranked=2, sft=60, held_out=20)


def test_a_small_data_set_is_pinned(tmp_path, tokenizer):
    """Whoever changes code so that the digest changes raises WORLD_VERSION, by which old data and runs are told."""
    with dataset(tmp_path / "tldr", SMALL, tokenizer) as folder:
        digest = hashlib.sha256(b"".join((folder / f"{split}.jsonl").read_bytes() for split in tldr.SPLITS))
    assert (tldr.WORLD_VERSION, digest.hexdigest()[:16]) == (1, "49df3507a2de3520")


@pytest.mark.parametrize("ranked", [2, 3, 4])
def test_the_rows_are_what_they_say(ranked):
    seen = {}
    for split in tldr.SPLITS:
        rows = list(draw_rows(WORLD, replace(SMALL, ranked=ranked), split))
        assert len(rows) == {"sft": 60, "train": 40 if ranked == 2 else 20}.get(split, 20)
        for row in rows:
            post = post_of(row)
            assert post == read_post(row["prompt"])
            seen.setdefault(json.dumps(row["facts"], sort_keys=True).replace(post.subreddit, ""), set()).add(
                split.replace("sft", "train")
            )
            answers = list(answers_of(row).values())
            assert len(answers) == {"sft": 1, "train": ranked}.get(split, 2) == len(set(answers))
            assert not any(math.isnan(WORLD.judge(post, answer).total) for answer in answers)
    assert all(len(splits) == 1 for splits in seen.values())


def test_labels_are_bradley_terry():
    """The chosen one wins as often as Eq. 1 says, in the mean over pairs; a bias for length moves the labels."""
    rows = list(draw_rows(WORLD, replace(SMALL, pairs=4000), "train"))
    margins = [WORLD.judge(post_of(r), r["chosen"]).total - WORLD.judge(post_of(r), r["rejected"]).total for r in rows]
    better = np.mean([m > 0 for m in margins]) + 0.5 * np.mean([m == 0 for m in margins])
    expected = np.mean([1 / (1 + math.exp(-abs(m))) if m else 0.5 for m in margins])
    assert abs(better - expected) < 0.025
    biased = list(draw_rows(WORLD, replace(SMALL, pairs=4000, length_bias=1.0), "train"))
    longer = [np.mean([len(r["chosen"]) > len(r["rejected"]) for r in some]) for some in (rows, biased)]
    assert longer[1] > longer[0] + 0.1


def test_rankings_are_plackett_luce():
    """Given four draws, each place falls to one of those that are left by the softmax of their returns."""
    above = []
    for row in draw_rows(WORLD, replace(SMALL, pairs=3000, ranked=4), "train"):
        R = np.array([WORLD.judge(post_of(row), answer).total for answer in row["ranked"]])
        above.append([R[k] - np.average(R[k:], weights=np.exp(R[k:])) for k in range(3)])
    mean, error = np.mean(above, axis=0), np.std(above, axis=0) / len(above) ** 0.5
    assert (np.abs(mean) < 4 * error).all() and (error < 0.04).all()
    lengths = [
        np.mean([len(row["ranked"][0]) - len(row["ranked"][3]) for row in draw_rows(WORLD, config, "train")])
        for config in (replace(SMALL, pairs=1000, ranked=4), replace(SMALL, pairs=1000, ranked=4, length_bias=1.0))
    ]
    assert lengths[1] > lengths[0] + 10


def written(out, config, tokenizer) -> dict[str, tuple[int, bytes]]:
    """When each file of a data set was written, and what is in it."""
    with dataset(out, config, tokenizer, lambda _: None) as folder:
        return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def test_writing_is_atomic_and_reuses_what_is_there(tmp_path, tokenizer):
    out = tmp_path / "tldr"
    before = written(out, SMALL, tokenizer)
    assert written(out, SMALL, tokenizer) == before
    assert written(out, replace(SMALL, seed=1), tokenizer) != before
    assert [p.name for p in tmp_path.iterdir()] == ["tldr"]


OURS = '{"world": 1, "vocabulary": "", "seed": 0}'
MANIFESTS = [None, OURS, "", "{}", '{"name": "my extension", "world": 2}', "[1]"]


@pytest.mark.parametrize(
    ("manifest", "beside"), [(of, file) for of in MANIFESTS for file in ("thesis.txt", "") if (of, file) != (OURS, "")]
)
def test_what_is_no_data_set_of_ours_is_left_alone(tmp_path, tokenizer, manifest, beside):
    """A manifest.json alone does not make a folder ours, and neither does ours beside a person's file."""
    out = tmp_path / "mine"
    out.mkdir()
    if beside:
        (out / beside).write_text("years of work")
    if manifest is not None:
        (out / "manifest.json").write_text(manifest)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UserError) as error:
        written(out, SMALL, tokenizer)
    assert "\n" not in str(error.value) and str(out) in str(error.value)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and [p.name for p in tmp_path.iterdir()] == [
        "mine"
    ]


def test_a_data_set_behind_a_link_is_read_and_not_replaced(tmp_path, tokenizer):
    before = written(tmp_path / "real", SMALL, tokenizer)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert written(tmp_path / "link", SMALL, tokenizer) == before
    with pytest.raises(UserError, match="link is a link to another data set"):
        written(tmp_path / "link", replace(SMALL, seed=1), tokenizer)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="dangling exists and is not a data set"):
        written(tmp_path / "dangling", SMALL, tokenizer)
    assert written(tmp_path / "real", SMALL, tokenizer) == before
