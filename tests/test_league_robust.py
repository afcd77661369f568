"""The league's two studies: the same summaries in other words, and where lost probability goes."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model

from minqstar.errors import UserError
from minqstar.lab.league import robust, squeeze
from minqstar.theory.mdp import implicit_rewards, solve
from minqstar.training.data import tokenize
from minqstar.training.scoring import score_groups
from minqstar.world.grammar import slots_of
from minqstar.world.posts import post_of
from minqstar.world.tldr import DataConfig, draw_rows

BETA = 0.5


@pytest.fixture(scope="module")
def pairs(world):
    """Held-out posts with their pairs."""
    rows = list(draw_rows(world, DataConfig(held_out=40), "test"))
    return [post_of(row) for row in rows], tokenize(rows, world.tokenizer, 256, share=False)[0]


@pytest.fixture(scope="module")
def others(world):
    return {degree: robust.paraphrased(world, degree) for degree in robust.DEGREES}


def truths(worlds, posts):
    """For each call what the next world says of some pairs: `Exact`s by group and response."""
    calls = iter(worlds.values())

    def said(groups):
        world = next(calls)
        sides = [world.exact_all(posts, [group.responses[side] for group in groups], BETA) for side in (0, 1)]
        return list(zip(*sides, strict=True))

    return said


def advantages(truth):
    """The exact A* as a method."""
    return lambda groups: [[exact.advantage for exact in pair] for pair in truth(groups)]


@pytest.mark.parametrize("degree", ["half", "all"])
def test_every_wording_is_replaced_by_one_that_no_training_summary_has(world, others, degree):
    summaries = [row["completion"] for row in draw_rows(world, DataConfig(sft=4000), "sft")]
    for name, automaton in world.automata.items():
        before, after = automaton.scenario, others[degree].automata[name].scenario
        assert replace(after, grammar=before.grammar) == before
        for node, options in before.grammar.items():
            for old, new in zip(options, after.grammar[node], strict=True):
                assert new._replace(text=old.text) == old and sorted(slots_of(new.text)) == sorted(slots_of(old.text))
                changes = re.search(r"\w", old.text) and (degree == "all" or not slots_of(old.text))
                assert (new.text != old.text) == bool(changes)
                if changes:
                    words = r"\w+".join(map(re.escape, re.split(r"\{\w+\}", new.text)))
                    assert not any(re.search(words + r"\b" * new.text[-1].isalpha(), text) for text in summaries), words


@pytest.mark.parametrize("degree", ["half", "all"])
def test_a_reworded_summary_is_as_likely_and_earns_the_same(world, others, pairs, degree):
    posts, groups = pairs
    other, log_refs = others[degree], []
    old = [group.responses[0] for group in groups]
    new = [robust.in_words_of(other, world, post, tokens) for post, tokens in zip(posts, old, strict=True)]
    assert sum(a != b for a, b in zip(old, new, strict=True)) > (39 if degree == "all" else 20)
    assert [robust.in_words_of(world, other, post, tokens) for post, tokens in zip(posts, new, strict=True)] == old
    for of, responses in ((world, old), (other, new)):
        exact = of.exact_all(posts, responses, BETA)
        log_ref = squeeze.exact(of, posts, responses, BETA)[1]
        taken = torch.tensor([token for response in responses for token in response])
        parts = log_ref[torch.arange(len(taken)), taken].split(list(map(len, responses)))
        log_refs.append([[part.sum(), e.reward.sum(), e.advantage.sum()] for part, e in zip(parts, exact, strict=True)])
    assert torch.allclose(*map(torch.tensor, log_refs), atol=1e-9)


def test_the_exact_rewards_are_perfect_in_any_words(world, others, pairs):
    posts, groups = pairs
    found = robust.figures(advantages(truths(others, posts)), world, posts, groups, BETA)
    assert list(found) == list(robust.DEGREES)
    for of in found.values():
        assert of["r2"] == pytest.approx(1) and of["correlation"] == pytest.approx(1)
        assert of["pair_accuracy"] == of["decisive_pair_accuracy"] == of["optimal_pair_accuracy"] > 0.6
        assert of["forced_rms"] == pytest.approx(0, abs=1e-12) and of["auroc"] > 0.99


def test_a_methods_figures_are_what_one_counts_by_hand(world, others, pairs):
    """A method that pays noise on forced tokens and the truth on others: its decisive tokens rank as the truth does."""
    posts, groups = pairs
    truth, generator, paid = truths(others, posts), torch.Generator().manual_seed(0), []

    def noisy(some):
        def rewards(exact):
            noise = 0.7 * torch.randn(len(exact.kind), generator=generator).sign()
            return exact.advantage + noise * torch.tensor([kind == "forced" for kind in exact.kind])

        paid.append([[rewards(exact) for exact in pair] for pair in truth(some)])
        return paid[-1]

    found = robust.figures(noisy, world, posts, groups, BETA)
    for of, rewards in zip(found.values(), paid, strict=True):
        margins = [sum(chosen.tolist()) - sum(rejected.tolist()) for chosen, rejected in rewards]
        counted = np.mean([1.0 if m > 1e-9 else 0.5 if m > -1e-9 else 0.0 for m in margins])
        assert of["pair_accuracy"] == pytest.approx(counted) and of["pair_accuracy"] != of["optimal_pair_accuracy"]
        assert of["decisive_pair_accuracy"] == of["optimal_pair_accuracy"]
        assert of["by_class"]["fact"]["r2"] == pytest.approx(1)
        assert of["forced_rms"] == pytest.approx(0.7)


def test_a_wording_without_a_paraphrase_is_an_error(world, monkeypatch):
    monkeypatch.delitem(robust.PARAPHRASES["job"], " Thoughts?")
    with pytest.raises(UserError, match="' Thoughts\\?' of scenario 'job' has no paraphrase"):
        robust.paraphrased(world)


def test_where_lost_mass_goes_is_what_one_counts_token_by_token(world, pairs):
    generator, everywhere = torch.Generator().manual_seed(0), torch.zeros(len(squeeze.PLACES), dtype=torch.float64)
    for post, group in list(zip(*pairs, strict=True))[:8]:
        response = group.responses[1]
        A_star, _ = squeeze.exact(world, [post], [response], BETA)
        logs = [torch.randn(A_star.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
        pi, ref = ((of + 6 * (A_star > -torch.inf)).log_softmax(-1) for of in logs)
        change, lost, went = squeeze.moved(pi, ref, torch.tensor(response), A_star)
        everywhere += went.sum(0)

        automaton = world.automata[post.scenario]
        mdp = automaton.mdp([post])
        rewards = implicit_rewards(mdp, solve(mdp, BETA), BETA)[0]
        for t, (s, a) in enumerate(zip(*automaton.walk(response), strict=True)):
            p, q = pi[t].exp().tolist(), ref[t].exp().tolist()
            gains = {token: p[token] - q[token] for token in range(len(p)) if p[token] > q[token]}
            gone = max(0.0, q[response[t]] - p[response[t]])
            expected = dict.fromkeys(squeeze.PLACES, 0.0)
            for token, gain in gains.items():
                place = "off the grammar"
                if token in automaton.arc_of[s]:
                    better = rewards[s, automaton.arc_of[s][token]] - rewards[s, a] > 1e-9
                    which = "likeliest" if token == q.index(max(q)) else "others"
                    place = f"{which}, better" if better else f"{which}, not better"
                expected[place] += gone * gain / sum(gains.values())
            assert went[t].tolist() == pytest.approx(list(expected.values()), abs=1e-12)
            assert lost[t].item() == pytest.approx(gone, abs=1e-12)
            assert change[t].item() == pytest.approx(np.log(p[response[t]] / q[response[t]]))
    assert (everywhere > 1e-3).all(), "every place receives something"


def test_the_optimum_moves_mass_to_better_tokens_only(world, pairs):
    posts, groups = pairs
    found = squeeze.optimum(world, posts, groups, BETA)
    for place, of in enumerate(found.values()):
        exact = world.exact_all(posts, [group.responses[place] for group in groups], BETA)
        assert of["log_change"] == pytest.approx(np.mean([e.advantage.sum().item() / BETA for e in exact]))
        shares = of["shares"]
        assert shares["likeliest, better"] + shares["others, better"] == pytest.approx(1) and of["lost"] > 0.01
    assert found["rejected"]["log_change"] < found["chosen"]["log_change"]


def test_shares_sum_to_one_and_an_unchanged_policy_loses_nothing(world, pairs):
    posts, groups = (of[:9] for of in pairs)
    pi, ref = (random_model(seed, world.tokenizer.n_vocab, 256) for seed in (0, 1))
    both = [score_groups(model, groups, world.tokenizer.pad) for model in (pi, ref)]
    for place, of in enumerate(squeeze.figures(pi, ref, world, posts, groups, BETA).values()):
        assert sum(of["shares"].values()) == pytest.approx(1, abs=1e-12) and of["lost"] > 0
        sums = [sum(group[place].double().sum().item() for group in scored) for scored in both]
        assert of["log_change"] == pytest.approx((sums[0] - sums[1]) / len(groups), rel=1e-4)
    nothing = {"log_change": 0.0, "lost": 0.0, "shares": dict.fromkeys(squeeze.PLACES, 0.0)}
    assert squeeze.figures(ref, ref, world, posts, groups, BETA) == {"chosen": nothing, "rejected": nothing}


def test_an_answer_off_the_grammar_is_an_error(world, pairs):
    with pytest.raises(UserError, match="response 0 leaves the grammar"):
        squeeze.exact(world, pairs[0][:1], [[world.tokenizer.pad]], BETA)


def test_the_figures_show_every_method(world, others, pairs):
    posts, groups = pairs
    truth = robust.figures(advantages(truths(others, posts)), world, posts, groups, BETA)
    axes = robust.draw({"first": truth, "second": truth}).axes
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["first", "second"]
    assert axes[0].lines[0].get_xdata().tolist() == [truth["original"]["pair_accuracy"]] * 2
    axes = squeeze.draw({"first": squeeze.optimum(world, posts, groups, BETA)}).axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axes[1].patches]
    assert len(bars) == len(squeeze.PLACES) and sum(width for _, width in bars) == pytest.approx(1)
    assert bars[0][0] == 0 and sum(bars[-1]) == pytest.approx(1), "stacked"
