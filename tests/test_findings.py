"""What the findings measure, against closed forms and naive twins, on models of random weights."""

import ast
import json
import random
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, random_model

from minqstar.evaluate import MAX_NEW_TOKENS, decode_all, gap_figures
from minqstar.lab.findings import beams, best_of_n, diffusion, equivalence, lab, leak, likelihoods, proxy, q_gap
from minqstar.lab.findings.credit import compute as compute_credit
from minqstar.lab.findings.credit import misfit, named, plain, scored_edits, stitching_figures
from minqstar.lab.findings.intervals import interval
from minqstar.lab.findings.lab import Lab, Scale, log_policies, outcome
from minqstar.lab.searches import Table
from minqstar.lab.treeview import Drawing
from minqstar.runchecks import plain_logits
from minqstar.search.decode import Decoded, decode, sampler
from minqstar.search.decode import best_of_n as best_of_n_search
from minqstar.search.evaluator import Network
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.theory.mdp import hard_max, implicit_rewards, solve
from minqstar.training.data import Group
from minqstar.training.scoring import weights_hash
from minqstar.training.trainer import DPOConfig
from minqstar.world.posts import post_of
from minqstar.world.slots import slots
from minqstar.world.tldr import BETA, DataConfig, draw_rows

SMALL = Scale(
    pairs=(16, 32), study_pairs=32, betas=(0.5, 1.0), biased_betas=(0.5,), posts=4, marks=(0.5, 1.0), draws=16,
    steps=2, larger=(1, 1, 16), widths=(1, 3),
)  # fmt: skip


@pytest.fixture
def small(main_run) -> Lab:
    return Lab(main_run, main_run / "work", SMALL)


def test_no_finding_imports_matplotlib(small, monkeypatch):
    """Numbers can be computed where it is not installed."""
    for path in sorted((ROOT / "minqstar" / "lab").rglob("*.py")):
        names = [alias.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import)
                 for alias in node.names]  # fmt: skip
        names += [node.module for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        assert not any(name.startswith("matplotlib") for name in names), path
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # whoever imports it now fails
    assert compute_credit(small)["edited_posts"] == 8


def test_log_policies_are_those_of_one_response_alone(monkeypatch):
    monkeypatch.setattr(lab, "ROWS", 2)
    model, rng = random_model(), random.Random(0)
    draw = lambda: [rng.randrange(23) for _ in range(rng.randint(1, 9))]  # noqa: E731
    pairs = [(draw(), draw()) for _ in range(5)]
    expected = torch.cat([plain_logits(model, *pair).log_softmax(-1) for pair in pairs])
    found = log_policies(model, *map(list, zip(*pairs, strict=True)))
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_intervals_and_means():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * 0.1, rel=0.2)
    smooth = likelihoods.smooth
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [[0.5, 2.0], [2.5, 6.0]] and len(smooth([0.0] * 3)) == 3


def test_learned_returns_are_true_ones_in_the_gauge_of_the_exact_value(small, world):
    """sum A* + V*(s_0) = sum r, for the labeller's reward, a bias for each token, too."""
    for beta, bias in ((0.5, 0.0), (1.0, 0.3)):
        values = small.values(beta, bias)
        for automaton, places, mdp in world.tables(small.posts):
            biased = replace(mdp, reward=torch.where(mdp.token >= 0, mdp.reward + bias, 0.0))
            A_star = implicit_rewards(biased, solve(biased, beta), beta)
            for row, i in enumerate(places):
                response = small.groups[i].responses[0]
                learned = A_star[row][automaton.walk(response)].sum().item() + values[i]
                true = world.judge(small.posts[i], world.tokenizer.decode(response)).total
                assert learned == pytest.approx(true + bias * len(response))


def test_an_outcome_counts_what_leaves_the_grammar(small, world):
    """Of five responses one is the preferred summary, two are drawn, one is cut short and one is no summary."""
    eos, rng = world.tokenizer.eos, np.random.default_rng(3)
    tokens = [small.groups[0].responses[0], *world.sample(small.posts[1:3], rng)[0]]
    tokens += [small.groups[3].responses[0][:-1], [*world.tokenizer.encode(" No summary"), eos]]
    responses = [Decoded(ids, [0.0] * len(ids), ids[-1] != eos) for ids in tokens]
    totals = [world.judge(post, world.tokenizer.decode(ids)).total for post, ids in zip(small.posts, tokens[:3])]  # noqa: B905
    preferred = [world.judge(post, row["chosen"]).total for post, row in zip(small.posts, small.rows, strict=True)]
    wins = [0.5 + 0.5 * np.sign(total - other) for total, other in zip(totals, preferred)] + [0.0, 0.0]  # noqa: B905
    found = outcome(small, responses, bias=0.3, learned=np.array([1.0, 2.0, 6.0, 100.0, 100.0]))
    assert wins[0] == 0.5 and found["win_rate"] == pytest.approx(np.mean(wins))
    assert found["off_grammar"] == pytest.approx(2 / 5) and found["true_return"] == pytest.approx(np.mean(totals))
    assert found["labelled_return"] == pytest.approx(np.mean(totals) + 0.3 * np.mean([len(ids) for ids in tokens[:3]]))
    assert found["learned_return"] == 3 and found["length"] == np.mean([len(ids) for ids in tokens])
    assert found["win_interval"][0] <= found["win_rate"] <= found["win_interval"][1]
    nothing = outcome(small, [responses[4]])
    assert nothing["off_grammar"] == 1 and nothing["true_return"] is None and nothing["win_rate"] == 0


def test_widths_say_what_the_oracle_says_of_each_beam(one_run, world, monkeypatch):
    """One beam finds draws of pi_ref, two of four cut short; three beams find the preferred summaries."""
    draws, _ = world.sample(one_run.posts[:4], np.random.default_rng(0))
    cut = [ids if i < 2 else ids[:-1] for i, ids in enumerate(draws)]
    preferred = [group.responses[0] for group in one_run.groups[:4]]
    given = {1: [Decoded(ids, [-1.0], False) for ids in cut], 3: [Decoded(ids, [0.0], False) for ids in preferred]}
    monkeypatch.setattr(beams, "beam_search", lambda *what: [[best] for best in given[what[-1].width]])
    found = beams.widths(one_run, beta=0.5, bias=0.0)["alpha 0"]
    assert found["off_grammar"] == [0.5, 0.0] and found["win_rate"][1] == 0.5 and found["logp"] == [-1.0, 0.0]
    assert found["length"] == [np.mean([len(ids) for ids in side]) for side in (cut, preferred)]
    groups = [Group(group.prompt, (ids,)) for group, ids in zip(one_run.groups, preferred, strict=False)]
    learned = np.array(one_run.returns(one_run.main, groups))[:, 0] + one_run.values(0.5)[:4]
    assert found["learned_return"][1] == pytest.approx(learned.mean(), rel=1e-5)
    true = [world.judge_tokens(post, ids).total for post, ids in zip(one_run.posts, preferred, strict=False)]
    assert found["true_return"][1] == pytest.approx(np.mean(true))


def test_the_likeliest_responses_are_those_of_dynamic_programming(small, world):
    found, posts = beams.likeliest(small, 0.5), small.posts[: SMALL.posts]
    for _, places, mdp in world.tables(posts):
        log_pi = solve(mdp, 0.5).log_pi
        best = hard_max(replace(mdp, reward=torch.where(log_pi > -torch.inf, log_pi, 0.0)))[0][:, 0]
        for place, value in zip(places, best.tolist(), strict=True):
            assert found[place].score == pytest.approx(value, abs=1e-9)


def test_returns_are_sums_of_implicit_rewards(small):
    run, groups = small.main, small.groups[:3]

    def logp(model, prompt, response):
        return plain_logits(model, prompt, response).log_softmax(-1)[range(len(response)), response].sum().item()

    for group, line in zip(groups, small.returns(run, groups), strict=True):
        for response, value in zip(group.responses, line, strict=True):
            policy, reference = (logp(model, group.prompt, response) for model in (run.model, run.reference))
            assert value == pytest.approx(0.5 * (policy - reference), abs=1e-3)


def test_a_watched_course_ends_where_the_run_ends(small, monkeypatch):
    """And begins at the reference; read again, it is not trained again."""
    monkeypatch.setattr(lab, "DPOConfig", partial(DPOConfig, min_steps=4))
    history, policies = small.course("all")
    first, *_, last = policies
    assert first == 0 and weights_hash(policies[0]) == weights_hash(small.main.reference)
    assert weights_hash(policies[last]) == weights_hash(small.run().model) != weights_hash(policies[0])
    assert {name: len(values) for name, values in history.items()} == {"chosen_reward": last, "rejected_reward": last}
    assert history["chosen_reward"][0] == history["rejected_reward"][0] == 0  # policy = reference
    figures = json.loads((small.run().path / "summary.json").read_text())["eval"]
    for name, value in q_gap.steps(small)[str(last)].items():
        assert name == "tokens" or value == pytest.approx(figures[f"q_gap_{name}"], rel=1e-5)
    monkeypatch.setattr(lab, "Trainer", None)
    again, kept = small.course("all")
    assert again == history and [weights_hash(m) for m in kept.values()] == [weights_hash(m) for m in policies.values()]


def test_a_reference_earns_nothing_and_a_policy_what_eq_16_says(small):
    watch = likelihoods.Watch(small, small.main.reference)
    found = watch.measure(small.main.reference)
    assert found["drawn"] == found["expected"] == found["chosen_reward"] == 0 and found["pair_accuracy"] == 0.5
    assert len(watch.draws) == SMALL.draws and len(set(map(tuple, watch.draws))) > SMALL.draws // 2
    found, expected, drawn = watch.measure(small.main.model), [], []
    for prompt, response in zip(watch.prompts, watch.draws, strict=True):
        log_pi, log_ref = (
            plain_logits(m, prompt, response).log_softmax(-1) for m in (small.main.model, small.main.reference)
        )
        ratio = 0.5 * (log_pi - log_ref)
        expected.append((log_ref.exp() * ratio).sum().item())
        drawn.append(ratio[range(len(response)), response].sum().item())
    paired = np.array(drawn) - np.array(expected)
    assert found["drawn"] == pytest.approx(np.mean(drawn), abs=1e-3)
    assert found["expected"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert found["difference"] == pytest.approx(paired.mean(), abs=1e-3)
    assert found["standard_error"] == pytest.approx(paired.std(ddof=1) / len(paired) ** 0.5, rel=1e-3)


def test_without_a_reference_draws_earn_what_entropy_and_kl_say(small):
    """beta log pi, and -beta (H(p) + KL(p||pi)), which is largest at pi = p."""
    policy, p = small.main.model, small.main.reference
    watch = likelihoods.Watch(small, p, without_reference=True)
    found, at_p, expected, drawn = watch.measure(policy), watch.measure(p), [], []
    entropy = 0.0
    for prompt, response in zip(watch.prompts, watch.draws, strict=True):
        log_pi, log_p = (plain_logits(m, prompt, response).log_softmax(-1) for m in (policy, p))
        expected.append(0.5 * (log_p.exp() * log_pi).sum().item())
        drawn.append(0.5 * log_pi[range(len(response)), response].sum().item())
        entropy -= (log_p.exp() * log_p).sum().item() / len(watch.draws)
    paired = np.array(drawn) - np.array(expected)
    assert found["drawn"] == pytest.approx(np.mean(drawn), rel=1e-5)
    assert found["expected"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert found["standard_error"] == pytest.approx(paired.std(ddof=1) / len(paired) ** 0.5, rel=1e-3)
    assert at_p["expected"] == pytest.approx(-0.5 * entropy, rel=1e-5) and at_p["expected"] > found["expected"] + 0.1
    logps = [
        [plain_logits(policy, g.prompt, r).log_softmax(-1)[range(len(r)), r].sum().item() for r in g.responses]
        for g in small.groups
    ]
    assert found["chosen_reward"] == pytest.approx(0.5 * np.mean(logps, axis=0)[0], rel=1e-5)


def test_a_course_without_a_reference_trains_on_log_probabilities(small, monkeypatch):
    """From the reference: the first batch's loss and returns by hand; and it leads elsewhere than DPO."""
    monkeypatch.setattr(lab, "DPOConfig", partial(DPOConfig, min_steps=2))
    seen, sums = [], likelihoods.CPL.sums

    def watched(self, token_logps, batch, rows):
        seen.append((token_logps.detach(), batch, sums(self, token_logps, batch, rows)))
        return seen[-1][-1]

    monkeypatch.setattr(likelihoods.CPL, "sums", watched)
    history, policies = small.course("all", likelihoods.CPL(0.5))
    logps, batch, found = seen[0]
    pairs = np.zeros((len(batch.sizes), 2))
    for logp, response in zip(logps.tolist(), batch.response.tolist(), strict=True):
        pairs[response // 2, response % 2] += 0.5 * logp
    assert found["loss"].item() == pytest.approx(np.logaddexp(0, pairs[:, 1] - pairs[:, 0]).sum(), rel=1e-4)
    assert found["chosen_reward"].item() == pytest.approx(pairs[:, 0].sum(), rel=1e-4)
    assert history["rejected_reward"][0] == pytest.approx(pairs[:, 1].mean(), rel=1e-4) and pairs.max() < -10
    assert weights_hash(policies[0]) == weights_hash(small.main.reference)
    assert weights_hash(small.course("all")[1].popitem()[1]) != weights_hash(policies.popitem()[1])

    small.base = small.main.model
    found = {start: likelihoods.watched(small, f"cpl_{start}")["measured"] for start in ("all", "none")}
    assert found["all"][0]["step"] == found["none"][0]["step"] == 0
    at_p = likelihoods.Watch(small, small.main.reference, without_reference=True).measure(small.main.reference)
    assert found["all"][0] == {"step": 0, **at_p}
    assert all(m["expected"] < at_p["expected"] for m in found["all"][1:] + found["none"])  # at pi = p it is largest


def test_leakage_is_the_probability_of_tokens_that_the_grammar_does_not_know(small, world):
    found = leak.leakage(small, small.main.model)
    outside = []
    for post, group in list(zip(small.posts, small.groups, strict=True))[: SMALL.posts]:
        automaton = world.automata[post.scenario]
        for response in group.responses:
            probs = plain_logits(small.main.model, group.prompt, response).softmax(-1)
            for state, line in zip(automaton.walk(response)[0], probs, strict=True):
                outside.append(1 - line[list(automaton.arc_of[state])].sum().item())
    assert found["per_token"] == pytest.approx(np.mean(outside), abs=1e-5)
    assert found["off_grammar"] == 1  # whatever a model of random weights writes


@pytest.fixture
def one_run(small, monkeypatch) -> Lab:
    """A lab all of whose runs are the main one, and whose course goes in one step from the reference to the policy."""
    monkeypatch.setattr(Lab, "run", lambda self, *_, **__: self.main)
    course = ({}, {0: small.main.reference, 1: small.main.model})
    monkeypatch.setattr(Lab, "course", lambda self, start: (course[0], dict(course[1])))
    return small


def test_leak_tells_the_reference_from_the_policy(one_run):
    found, main = leak.compute(one_run), one_run.main
    assert found["reference"] == leak.leakage(one_run, main.reference) != found["steps"]["1"]
    assert found["steps"] == {"1": leak.leakage(one_run, main.model)} and found["draws"] == 8
    assert all(of == found["steps"]["1"] for key in ("beta", "pairs") for of in found[key].values())
    assert found["decoding"].keys() == leak.RULES.keys() and found["pairs"].keys() == {"16", "32"}
    greedy = decode_all(main.model, [group.prompt for group in one_run.groups], main.tokenizer.ends, None)
    assert found["decoding"]["greedy"] == outcome(one_run, greedy) != found["decoding"]["temperature 1"]


def test_the_gap_is_read_from_summaries_and_measured_on_the_course(one_run):
    figures = {"q_gap_rmse": 0.3, "q_gap_correlation": 0.2, "q_gap_r2": 0.1, "q_gap_by_class": {}}
    (one_run.main.path / "summary.json").write_text(json.dumps({"eval": figures}))
    found = q_gap.compute(one_run)
    assert found["pairs"]["16"] == found["beta"]["0.5"] == {"rmse": 0.3, "correlation": 0.2, "r2": 0.1}
    learned, exact, kinds = q_gap.tokens(one_run, one_run.main.model)
    assert found["steps"] == {"1": gap_figures(learned, exact)} and found["tabular"]["policy_gap"][-1] < 1e-5
    drawn = zip(*(found["scatter"][key] for key in ("learned", "exact", "class")), strict=True)
    assert sorted(drawn) == sorted(zip(np.round(learned, 4).tolist(), np.round(exact, 4).tolist(), kinds, strict=True))


def test_a_steered_reference_is_the_policy_at_alpha_1(one_run, main_run, monkeypatch):
    """By Eq. 14 with pi_base = pi_ref; at alpha 0 it is the reference itself. Draws of one seed are the same."""

    def draws(_, evaluator):
        prompts, choose = [group.prompt for group in one_run.groups], sampler(torch.Generator().manual_seed(0))
        return {
            "tokens": [line[0].tokens for line in decode(evaluator, prompts, one_run.main.tokenizer.ends, 9, choose)]
        }

    monkeypatch.setattr(proxy, "sampled", draws)
    one_run.larger_reference = main_run / "sft"
    found = proxy.compute(one_run)
    by_alpha = dict(zip(found["alpha"], found["steered"], strict=True))
    assert by_alpha[1.0] == found["small_dpo"] == found["larger_dpo"]
    assert by_alpha[0.0] == draws(None, Network(one_run.main.reference)) != by_alpha[1.0] != by_alpha[2.0]


def test_the_largest_difference_is_in_standard_errors(small, monkeypatch):
    """Of all marks of all courses, and of either sign."""
    mark = lambda difference, error: {"difference": difference, "standard_error": error}  # noqa: E731
    courses = {"all": [mark(0.1, 0.2)], "chosen": [mark(0.3, 0.3)], "none": [mark(4.0, 8.0)], "cpl_all": []}
    courses["cpl_none"] = [mark(-0.5, 0.25)]
    monkeypatch.setattr(likelihoods, "watched", lambda lab, start: {"measured": courses[start]})
    assert likelihoods.compute(small)["largest_difference_in_standard_errors"] == 2


def test_the_best_of_n_by_each_ranking(small, world, monkeypatch):
    """With one draw all rankings agree; no other ranking wins more than the judge's, or promises more than reward's."""
    monkeypatch.setattr(best_of_n, "SIZES", (1, 2, 6))
    rng, posts = np.random.default_rng(0), small.posts
    samples = [world.sample(posts, rng)[0] for _ in range(6)]
    draws = [[Decoded(ids, [rng.normal()] * len(ids), False) for ids in line] for line in zip(*samples, strict=True)]
    draws[0][1] = Decoded([5, world.tokenizer.eos], [9.0, 0.0], False)  # off the grammar, and likely
    draws[1][0] = Decoded(draws[1][0].tokens[:-1], [9.0], True)  # truncated, and likely
    true = [[world.judge_tokens(post, d.tokens).total for d in line] for post, line in zip(posts, draws, strict=True)]
    scores = {
        "reward": rng.normal(size=(8, 6)),
        "likelihood": np.array([[d.score for d in line] for line in draws]),
        "judge": np.where(np.isnan(true), -np.inf, true),
    }
    found = best_of_n.ranked(small, draws, scores)
    for i, n in enumerate((1, 2, 6)):
        for by, score in scores.items():
            best = [max(range(n), key=lambda j, k=k, s=score: (not draws[k][j].truncated, s[k, j])) for k in range(8)]
            twin = outcome(small, [line[j] for line, j in zip(draws, best, strict=True)])
            assert {key: values[i] for key, values in found[by].items() if key != "implicit_return"} == twin
            promised = np.mean([scores["reward"][k, j] for k, j in enumerate(best)])
            assert found[by]["implicit_return"][i] == pytest.approx(promised)
            assert found["judge"]["win_rate"][i] >= found[by]["win_rate"][i]
            assert found["reward"]["implicit_return"][i] >= promised - 1e-12
        assert found["reward"]["win_rate"][0] == found["likelihood"]["win_rate"][0] == found["judge"]["win_rate"][0]
    assert found["reward"]["off_grammar"][0] == 1 / 8 and found["judge"]["off_grammar"][2] == 0
    assert found["likelihood"]["off_grammar"][1] == 1 / 8  # the likely one


def test_best_of_n_draws_and_ranks_as_the_search_does(small, monkeypatch):
    monkeypatch.setattr(best_of_n, "SIZES", (1, 5))
    draws, scores = best_of_n.drawn(small)
    prompts = [group.prompt for group in small.groups[: SMALL.posts]]
    groups = [Group(p, tuple(d.tokens for d in line)) for p, line in zip(prompts, draws, strict=True)]
    assert np.allclose(scores["reward"], small.returns(small.main, groups)) and scores["judge"].max() == -np.inf
    found = best_of_n.ranked(small, draws, scores)["likelihood"]
    what = (Network(small.main.model), prompts, small.main.tokenizer.ends, MAX_NEW_TOKENS)
    best = best_of_n_search(*what, sampler(torch.Generator().manual_seed(0)), 5, lambda _, draw: draw.score)
    assert {key: values[1] for key, values in found.items() if key != "implicit_return"} == outcome(small, best)


@pytest.fixture(scope="module")
def posts_rows(world):
    return list(draw_rows(world, DataConfig(held_out=24), "test"))


def test_guided_and_likelihood_search_grow_one_tree(world, posts_rows):
    """Branch for branch; the values differ by V*(s_0) everywhere."""
    found = equivalence.paired_trees(world, posts_rows)
    assert found["identical_trees"]["identical"] == found["identical_trees"]["trees"] == 24
    both = found["two_trees"]
    assert len(both["guided"]) == len(both["likelihood"]) > 3
    assert sum(branch["best"] for branch in both["guided"]) == 1
    for guided, likelihood in zip(both["guided"], both["likelihood"], strict=True):
        assert guided["value"] - likelihood["value"] == pytest.approx(both["start_value"], abs=1e-9)
        assert {**guided, "value": 0} == {**likelihood, "value": 0}


def test_a_search_for_reward_without_the_value_grows_another_tree(world, posts_rows, monkeypatch):
    """The count of identical trees can fall: without V* at the leaves Eq. 12 does not hold."""

    def without_value(*args):
        table = Table(*args)
        table.values = torch.zeros_like(table.values)
        return table

    monkeypatch.setattr(equivalence, "Table", without_value)
    found = equivalence.paired_trees(world, posts_rows)["identical_trees"]
    assert found["identical"] < found["trees"] == 24


def test_branches_hold_every_token_of_a_tree_once(world, posts_rows):
    """And those from the root to the best end are the best response."""
    ((_, _, mdp), *_) = world.tables([post_of(posts_rows[0])])
    table = Table(mdp, solve(mdp, BETA), BETA, world.tokenizer.n_vocab)
    (found,), tree = mcts(table, [[]], world.tokenizer.ends, MAX_NEW_TOKENS, MCTSConfig())
    rows = equivalence.branches(Drawing(tree, 0, world.tokenizer, found))
    tokens = [tree.token[0, tree.parent[0, n], tree.action[0, n]] for n in np.flatnonzero(tree.parent[0] >= 0)]
    ends = (tree.child[0] < 0) & (tree.edge_visits[0] > 0)
    text = lambda ids: "".join(world.tokenizer.texts_of(list(ids)))  # noqa: E731
    assert sorted("".join(row["text"] for row in rows)) == sorted(text(map(int, [*tokens, *tree.token[0][ends]])))
    assert "".join(row["text"] for row in rows if row["best"]) == text(found.response.tokens)
    assert sum(row["visits"] for row in rows if row["depth"] == 0) == found.simulations
    for row in rows:
        assert not row["best"] or row["visits"] > 1 or row["value"] == pytest.approx(found.value)


def test_the_example_is_the_median_one_and_its_wrong_facts_are_marked(small, world):
    found = compute_credit(small)
    edits = scored_edits(small.main, small.rows)
    errors = sorted(misfit(line) for _, line in edits)
    assert found["example_rmse"] == errors[3] and len(errors) == 8
    edit, line = next(of for of in edits if of[0].post.prompt == found["prompt"])
    assert misfit(line) == errors[3]
    learned, exact = (
        np.concatenate(rows) for rows in zip(*((c.rewards, c.exact.advantage) for c in line), strict=True)
    )
    assert errors[3] == pytest.approx(np.sqrt(np.mean((learned - exact) ** 2)))
    assert found["versions"] == {name: plain(of, world, edit.post) for name, of in named(edit, line).items()}
    for count, version in enumerate(found["versions"].values()):
        assert len(version["wrong"]) == count
        for start, stop, decisive in version["wrong"]:
            value = "".join(version["tokens"][start:stop]).strip()
            assert start <= decisive < stop and value not in edit.post.prompt
            assert version["exact"][decisive] == min(version["exact"][start:stop]) < -1
    off = replace(line[0], exact=None)
    assert plain(off, world, edit.post)["wrong"] == [] and plain(off, world, None)["exact"] is None


def test_changes_are_read_at_the_decisive_token_of_each_edit(small, world):
    """Rewards that say where they stand, 100 times the version and the token's index, say what was compared."""
    edits = []
    for edit, line in scored_edits(small.main, small.rows):
        marked = [replace(of, rewards=100.0 * v + torch.arange(len(of.ids))) for v, of in enumerate(line)]
        edits.append((edit, marked))
    found = stitching_figures(world, edits)
    changes = {"first": [], "second": []}
    for edit, _ in edits:
        for i, name in enumerate(changes):
            old, new = (
                {s.fact: s for s in slots(world, edit.post, edit.versions[v])}[edit.facts[i]] for v in (i, i + 1)
            )
            changes[name].append(100 + new.start - old.start)
    assert found["edited_posts"] == 8 and found["later_change_exact"] < 1e-9
    assert {name: found[f"{name}_change"] for name in changes} == {name: np.mean(of) for name, of in changes.items()}
    shifts = [len(b) - len(a) for edit, _ in edits for a, b in zip(edit.versions, edit.versions[1:], strict=False)]
    assert 100 + min(shifts) <= found["later_change"] <= 100 + max(shifts)


def test_the_prices_of_diffusion_by_other_means():
    """Luck by quadrature of exp(r); variances by what each step's Gaussian loses; credit by KLs of the noised data."""
    found = diffusion.compute()
    assert found["closed_form"]["off_by_at_most"] < 1e-9
    x = np.linspace(-9, 9, 1801)  # far beyond all that is likely
    weight = np.exp(-(x**2) / 2) / np.exp(-(x**2) / 2).sum()  # N(0, 1)
    for name, of in found["schedules"].items():
        b = diffusion.SCHEDULES[name](1000).numpy()
        kept = np.append(1, np.cumprod(1 - b))
        for stop, signal, luck in zip(diffusion.STOPS, *of["prior"].values(), strict=True):
            assert signal == pytest.approx(kept[round(1000 * stop)] ** 0.5, rel=1e-9)
            x_0 = signal * x[:, None] + (1 - signal**2) ** 0.5 * x
            V = np.log(np.exp(-(x_0**2) / 2 + 2 * x_0) @ weight)
            assert luck == pytest.approx(np.sqrt(weight @ V**2 - (weight @ V) ** 2), rel=1e-3)

        def kl(s):  # of N(sqrt(s), 1 - s/2), what noise makes of N(1, 1/2), to N(0, 1)
            return (s - s / 2 - np.log(1 - s / 2)) / 2

        share = kl(kept[::-1]) / kl(1.0)
        assert np.allclose(of["credit"]["share"], share[::10], atol=1e-9)
        assert np.allclose(of["credit"]["linear_share"], kept[::-10], atol=1e-9)
        for half, line in (("half", share), ("linear_half", kept[::-1])):
            assert 0 <= 1 - np.searchsorted(line, 0.5) / 1000 + 0.001 - of["credit"][half] < 0.0011
        for T, cost in zip(of["variances"]["steps"], of["variances"]["cost"], strict=True):
            b = diffusion.SCHEDULES[name](T).numpy()
            kept = np.append(1, np.cumprod(1 - b))[:-1]
            P = kept / (2 - kept)  # V*'s, of x_{t-1}
            assert cost == pytest.approx(((b * P - np.log(1 + b * P)) / 2).sum(), rel=1e-6)
        assert of["variances"]["slope"] == pytest.approx(-1, abs=0.01)
