"""Decoding: scores are sums with EOS, equal to a fresh re-score; batched equals alone; seeds repeat."""

import math

import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from naive import response_logps

from minqstar.errors import UserError
from minqstar.search.decode import best_of_n, decode, greedy, sampler
from minqstar.search.evaluator import Network

EOS = 21
prompts = st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=9), min_size=1, max_size=5)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(prompts, st.integers(0, 10**6), st.sampled_from(["greedy", "sample"]), st.integers(1, 3))
def test_the_score_is_a_fresh_rescore(some, seed, how, several):
    """Items 14 and 16: the sum of log-probs of the generated tokens, up to the first end token and with it."""
    ends = (EOS, 3, 0)[:several]
    model = random_model(seed)
    choose = greedy if how == "greedy" else sampler(generator(seed))
    network = Network(model)
    answers = decode(network, some, ends, 12, choose)
    assert network.tokens.tolist() == [len(p) + len(d.tokens) - 1 for p, (d,) in zip(some, answers, strict=True)]
    for prompt, (found,) in zip(some, answers, strict=True):
        with torch.no_grad():
            fresh = response_logps(model, prompt, found.tokens)
        assert found.logps == pytest.approx(fresh.tolist(), abs=1e-4, rel=1e-4)
        assert found.score == math.fsum(found.logps) or found.score == pytest.approx(sum(found.logps))
        assert sum(token in ends for token in found.tokens) == (not found.truncated)
        assert found.truncated == (found.tokens[-1] not in ends) and len(found.tokens) <= 12
        if found.truncated:
            assert len(found.tokens) == 12


@given(prompts, st.integers(0, 10**6))
def test_greedy_equals_a_loop_without_cache(some, seed):
    model = random_model(seed)
    for prompt, (found,) in zip(some, decode(Network(model), some, (EOS,), 10, greedy), strict=True):
        tokens = list(prompt)
        for token in found.tokens:
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([tokens])))[0, -1]
            top = logits.max()
            assert logits[token] >= top - 1e-4  # ties aside, the likeliest
            tokens.append(token)


@given(prompts, st.integers(0, 10**6))
def test_batched_equals_one_by_one(some, seed):
    """Item 17."""
    model = random_model(seed)
    together = decode(Network(model), some, (EOS,), 10, greedy)
    for prompt, (found,) in zip(some, together, strict=True):
        ((alone,),) = decode(Network(model), [prompt], (EOS,), 10, greedy)
        assert alone.tokens == found.tokens and alone.logps == pytest.approx(found.logps, abs=1e-4)


def test_seeded_sampling_repeats_and_seeds_differ():
    model = random_model(0)
    runs = [decode(Network(model), [[1, 2]], (EOS,), 12, sampler(generator(s)), n=8) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_sampling_follows_the_policy():
    model = random_model(4)
    (draws,) = decode(Network(model), [[3, 1]], (EOS,), 1, sampler(generator(0)), n=40_000)
    counts = torch.bincount(torch.tensor([draw.tokens[0] for draw in draws]), minlength=23) / len(draws)
    with torch.no_grad():
        policy = model.logits(model(torch.tensor([[3, 1]])))[0, -1].softmax(-1)
    assert (counts - policy).abs().max() < 5 * math.sqrt(0.25 / len(draws))


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_a_low_temperature_is_greedy(temperature):
    model = random_model(1)
    cold = decode(Network(model), [[1], [2, 3]], (EOS,), 8, sampler(generator(0), temperature))
    plain = decode(Network(model), [[1], [2, 3]], (EOS,), 8, greedy)
    assert [d.tokens for (d,) in cold] == [d.tokens for (d,) in plain]


@given(st.integers(0, 10**6), st.integers(0, 6), st.floats(0.05, 1.0))
def test_top_k_and_top_p_keep_the_likeliest(seed, top_k, top_p):
    """Draws fall where sorting by hand says they may, each kept token in proportion to its probability."""
    logps = torch.randn(6, generator=generator(seed)).mul(2).log_softmax(-1)
    choose = sampler(generator(seed), 1.0, top_k, top_p)
    drawn = torch.bincount(choose(logps.expand(1, 4000, 6))[0], minlength=6) / 4000
    order = sorted(range(6), key=lambda t: -logps[t].item())[: top_k or 6]
    total = sum(logps[t].exp().item() for t in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p * total - 1e-6:
            break
        kept.append(token)
        mass += logps[token].exp().item()
    for token in range(6):
        wanted = logps[token].exp().item() / mass if token in kept else 0.0
        assert abs(drawn[token].item() - wanted) <= 5 * math.sqrt(wanted * (1 - wanted) / 4000) + 1e-6


def test_top_p_stops_as_soon_as_it_has_enough():
    draws = sampler(generator(0), top_p=0.5)(torch.full((1, 1000, 4), 0.25).log())
    assert set(draws.flatten().tolist()) == {0, 1}


def test_draws_of_one_prompt_do_not_see_each_other():
    """Branches share their prompt's cache only: each scores as it does alone."""
    model = random_model(3)
    (draws,) = decode(Network(model), [[3, 1, 2]], (EOS,), 9, sampler(generator(0)), n=20)
    assert len({tuple(d.tokens) for d in draws}) > 10
    for draw in draws:
        fresh = response_logps(model, [3, 1, 2], draw.tokens)
        assert draw.logps == pytest.approx(fresh.tolist(), abs=1e-4)


def test_best_of_n_keeps_the_best_finished_draw():
    model, n = random_model(2), 12
    some = [[1, 2], [3]]
    for rank in (lambda _, d: d.score, lambda _, d: -d.score, lambda i, d: (2 * i - 1) * len(d.tokens)):
        draws = decode(Network(model), some, (EOS,), 6, sampler(generator(7)), n)
        best = best_of_n(Network(model), some, (EOS,), 6, sampler(generator(7)), n, rank)
        for i, found in enumerate(best):
            mine = draws[i]
            finished = [d for d in mine if not d.truncated] or mine
            assert found in finished and rank(i, found) == max(rank(i, d) for d in finished)


def test_more_draws_than_share_a_prompt():
    """Seventy draws are three rows of the prompt; the best of seventy is at least the best of any of them."""
    seen = []
    count = lambda _, draw: seen.append(draw) or 0  # noqa: E731
    best_of_n(Network(random_model(2)), [[1, 2]], (EOS,), 6, sampler(generator(7)), 70, count)
    assert len(seen) == 70


def test_bad_input_is_refused():
    model = random_model()
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="temperature"):
            sampler(generator(0), temperature)
    for top_p in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(UserError, match="top_p"):
            sampler(generator(0), 1.0, 0, top_p)
    with pytest.raises(UserError, match="top_k"):
        sampler(generator(0), 1.0, -1)
    with pytest.raises(UserError, match="top_k is 24; the vocabulary has 23"):
        decode(Network(model), [[1]], (EOS,), 2, sampler(generator(0), 1.0, 24))
    with pytest.raises(UserError, match="n must be positive"):
        best_of_n(Network(model), [[1]], (EOS,), 4, greedy, 0, lambda _, d: d.score)
