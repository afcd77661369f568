"""Values, advantages and rewards of logits against closed forms written with `math`, and their invariances."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minqstar.theory.qfunction import (
    advantage,
    expected_implicit_reward,
    implicit_reward,
    log_policy,
    q_from_logits,
    reward_from_policy,
    soft_value,
)

rows = st.integers(2, 6).flatmap(
    lambda n: st.tuples(*(st.lists(st.floats(-30, 30), min_size=n, max_size=n) for _ in range(2)))
)
betas = st.floats(-2, 2).map(lambda x: 10**x)


def softmax(logits: list[float]) -> list[float]:
    """log-probabilities."""
    top = max(logits)
    log_z = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - log_z for x in logits]


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(rows, betas)
def test_values_and_policy_of_logits(row, beta):
    logits = row[0]
    Q, log_pi = q_from_logits(tensor(logits), beta), softmax(logits)
    assert Q.tolist() == pytest.approx([beta * x for x in logits])
    V = logits[0] * beta - beta * log_pi[0]  # from Q = V + beta log pi
    assert soft_value(Q, beta).item() == pytest.approx(V, abs=1e-9 * max(1, beta))
    assert log_policy(Q, beta).tolist() == pytest.approx(log_pi, abs=1e-9)
    assert advantage(Q, beta).tolist() == pytest.approx([beta * x for x in log_pi], abs=1e-9 * max(1, beta))
    assert (advantage(Q, beta) <= 1e-12 * max(1, beta)).all() and soft_value(Q, beta) >= Q.max() - 1e-12


@given(rows, betas, st.floats(-20, 20))
def test_a_function_of_the_state_moves_the_value_and_nothing_else(row, beta, c):
    Q = tensor(row[0])
    assert soft_value(Q + c, beta).item() == pytest.approx(soft_value(Q, beta).item() + c, abs=1e-9)
    assert torch.allclose(log_policy(Q + c, beta), log_policy(Q, beta), atol=1e-9 / min(beta, 1))


@given(rows, betas, st.floats(-5, 5), st.lists(st.floats(-5, 5), min_size=6, max_size=6))
def test_the_reward_of_a_policy_makes_it_optimal(row, beta, value, next_values):
    """In any gauge: with that r and V, Q = r + beta log pi_ref + V(s') has the soft value V and the policy pi."""
    log_pi, log_ref = tensor(softmax(row[0])), tensor(softmax(row[1]))
    after = tensor(next_values[: len(log_pi)])
    r = reward_from_policy(log_pi, log_ref, torch.full_like(log_pi, value), after, beta)
    Q = r + beta * log_ref + after
    scale = max(1, Q.abs().max().item() / min(beta, 1))
    assert soft_value(Q, beta).item() == pytest.approx(value, abs=1e-10 * scale)
    assert torch.allclose(log_policy(Q, beta), log_pi, atol=1e-10 * scale)
    zero = torch.zeros_like(log_pi)  # the gauge V = 0
    assert torch.equal(reward_from_policy(log_pi, log_ref, zero, zero, beta), implicit_reward(log_pi, log_ref, beta))


@given(rows, betas)
def test_the_expected_implicit_reward_is_minus_beta_kl(row, beta):
    """Eq. 16."""
    log_pi, log_ref = softmax(row[0]), softmax(row[1])
    kl = math.fsum(math.exp(q) * (q - p) for p, q in zip(log_pi, log_ref, strict=True))
    found = expected_implicit_reward(tensor(log_pi), tensor(log_ref), beta).item()
    assert found == pytest.approx(-beta * kl, rel=1e-9, abs=1e-9) and found <= 1e-9 * max(1, beta)


def test_where_there_is_no_mass():
    inf = math.inf
    half = math.log(0.5)
    both = tensor([[half, half, -inf], [0.0, -inf, -inf]])
    ref = tensor([[0.0, -inf, -inf], [half, half, -inf]])
    assert expected_implicit_reward(both, ref, 2.0).tolist() == [2 * half, -inf]


def test_leading_dimensions_are_a_batch():
    Q = torch.randn(3, 4, 5, dtype=torch.float64)
    assert soft_value(Q, 0.3).shape == (3, 4) and log_policy(Q, 0.3).shape == (3, 4, 5)
    assert torch.equal(soft_value(Q, 0.3)[1, 2], soft_value(Q[1, 2], 0.3))
    assert torch.equal(expected_implicit_reward(Q, Q, 0.3), torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("function", [implicit_reward, expected_implicit_reward])
def test_bad_input_is_refused(function):
    x = torch.zeros(3)
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="beta must be positive"):
            function(x, x, beta)
        with pytest.raises(ValueError, match="beta must be positive"):
            soft_value(x, beta)
    with pytest.raises(ValueError, match="shapes must match"):
        function(x, torch.zeros(4), 1.0)
    for position in (0, 1):
        pair = [x, x.clone()]
        pair[position] = torch.tensor([0.0, math.nan, 0.0])
        with pytest.raises(FloatingPointError, match=r"NaN at index \[1\]"):
            function(*pair, 1.0)
