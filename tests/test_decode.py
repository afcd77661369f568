"""Decoding: scores are sums with EOS, equal to a fresh re-score; batched equals alone; seeds repeat."""

import math

import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from naive import response_logps

from minqstar.cli import UserError
from minqstar.search.decode import Network, best_of_n, decode, greedy, sampler

EOS = 21
prompts = st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=9), min_size=1, max_size=5)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(prompts, st.integers(0, 10**6), st.sampled_from(["greedy", "sample"]))
def test_the_score_is_a_fresh_rescore(some, seed, how):
    """Items 14 and 16: the sum of log-probs of the generated tokens, EOS included."""
    model = random_model(seed)
    choose = greedy if how == "greedy" else sampler(1.0, generator(seed))
    for prompt, found in zip(some, decode(Network(model, 12), some, choose, EOS, 12), strict=True):
        with torch.no_grad():
            fresh = response_logps(model, prompt, found.tokens)
        assert found.logps == pytest.approx(fresh.tolist(), abs=1e-4, rel=1e-4)
        assert found.score == math.fsum(found.logps) or found.score == pytest.approx(sum(found.logps))
        assert found.tokens.count(EOS) == (not found.truncated)
        assert found.truncated == (found.tokens[-1] != EOS) and len(found.tokens) <= 12
        if found.truncated:
            assert len(found.tokens) == 12


@given(prompts, st.integers(0, 10**6))
def test_greedy_equals_a_loop_without_cache(some, seed):
    model = random_model(seed)
    for prompt, found in zip(some, decode(Network(model, 10), some, greedy, EOS, 10), strict=True):
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
    together = decode(Network(model, 10), some, greedy, EOS, 10)
    for prompt, found in zip(some, together, strict=True):
        (alone,) = decode(Network(model, 10), [prompt], greedy, EOS, 10)
        assert alone.tokens == found.tokens and alone.logps == pytest.approx(found.logps, abs=1e-4)


def test_seeded_sampling_repeats_and_seeds_differ():
    model = random_model(0)
    runs = [decode(Network(model, 12), [[1, 2]] * 8, sampler(1.0, generator(s)), EOS, 12) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_sampling_follows_the_policy():
    model = random_model(4)
    draws = decode(Network(model, 1), [[3, 1]] * 40_000, sampler(1.0, generator(0)), EOS, 1)
    counts = torch.bincount(torch.tensor([draw.tokens[0] for draw in draws]), minlength=23) / len(draws)
    with torch.no_grad():
        policy = model.logits(model(torch.tensor([[3, 1]])))[0, -1].softmax(-1)
    assert (counts - policy).abs().max() < 5 * math.sqrt(0.25 / len(draws))


def test_a_low_temperature_is_greedy():
    model = random_model(1)
    cold = decode(Network(model, 8), [[1], [2, 3]], sampler(1e-4, generator(0)), EOS, 8)
    assert [d.tokens for d in cold] == [d.tokens for d in decode(Network(model, 8), [[1], [2, 3]], greedy, EOS, 8)]


def test_best_of_n_keeps_the_best_finished_draw():
    model, n = random_model(2), 12
    some = [[1, 2], [3]]
    for rank in (lambda _, d: d.score, lambda _, d: -d.score, lambda i, d: (2 * i - 1) * len(d.tokens)):
        draws = decode(Network(model, 6), [p for p in some for _ in range(n)], sampler(1.0, generator(7)), EOS, 6)
        best = best_of_n(Network(model, 6), some, n, rank, sampler(1.0, generator(7)), EOS, 6)
        for i, found in enumerate(best):
            mine = draws[i * n : (i + 1) * n]
            finished = [d for d in mine if not d.truncated] or mine
            assert found in finished and rank(i, found) == max(rank(i, d) for d in finished)


def test_bad_input_is_refused():
    model = random_model()
    with pytest.raises(UserError, match="no room"):
        decode(Network(model, 40), [[1] * 9], greedy, EOS, 40)
    with pytest.raises(UserError, match="empty"):
        decode(Network(model, 4), [[]], greedy, EOS, 4)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="temperature"):
            sampler(temperature, generator(0))
    with pytest.raises(UserError, match="n must be positive"):
        best_of_n(Network(model, 4), [[1]], 0, lambda _, d: d.score, greedy, EOS, 4)
