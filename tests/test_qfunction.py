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
    per_action,
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


@given(rows, betas)
def test_without_a_reference_the_likelihood_is_largest_at_the_data(row, beta):
    """Eq. 16 without pi_ref: E_p[beta log pi] = -beta (H(p) + KL(p || pi)), most for pi = p. After a perfect SFT on p
    the likelihoods can only fall, and from a random start they must rise first."""
    log_pi, log_p = softmax(row[0]), softmax(row[1])
    likelihood = beta * math.fsum(math.exp(q) * p for p, q in zip(log_pi, log_p, strict=True))
    entropy = -math.fsum(math.exp(q) * q for q in log_p)
    against_p = expected_implicit_reward(tensor(log_pi), tensor(log_p), beta).item()  # -beta KL(p || pi)
    assert likelihood == pytest.approx(against_p - beta * entropy, rel=1e-9, abs=1e-9 * max(1, beta))
    assert likelihood <= -beta * entropy + 1e-9 * max(1, beta)


def test_a_beta_for_each_row():
    """A temperature for each state: the rows one by one."""
    Q, betas = (
        torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        tensor([0.1, 1.0, 9.0]),
    )
    P = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)
    for i, beta in enumerate(betas.tolist()):
        assert torch.allclose(soft_value(Q, betas)[i], soft_value(Q[i], beta), atol=1e-12)
        assert torch.allclose(log_policy(Q, betas)[i], log_policy(Q[i], beta), atol=1e-12)
        assert torch.allclose(advantage(Q, betas)[i], advantage(Q[i], beta), atol=1e-12)
        expected = expected_implicit_reward(Q[i].log_softmax(-1), P[i], beta)
        assert torch.allclose(expected_implicit_reward(Q.log_softmax(-1), P, betas)[i], expected, atol=1e-12)
    assert per_action(0.5) == 0.5 and per_action(betas).shape == (3, 1)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"beta must be positive and finite, got .* at state 2"):
            soft_value(Q, tensor([1.0, 2.0, bad]))
    with pytest.raises(ValueError, match=r"got -2 at state 1$"):  # the first of several, in a batch of them
        soft_value(torch.zeros(2, 3, 5), tensor([[1.0, -2.0, 3.0], [1.0, 1.0, 0.0]]))
    for bad in (0, -1, 1e-400, tensor(-1.0)):
        with pytest.raises(ValueError, match=r"beta must be positive and finite, got (0|-1)$"):
            soft_value(Q, bad)
    assert soft_value(Q, 1e-46).isfinite().all()  # too small for float32, not for float64


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


def test_a_token_that_both_rule_out_has_no_reward():
    """log 0 - log 0 is no number; what only the policy rules out costs -inf, and a table asks on the support alone."""
    never = torch.tensor([0.0, -torch.inf])
    with pytest.raises(FloatingPointError, match=r"rewards is NaN at index \[1\]"):
        implicit_reward(never, never, 1.0)
    assert implicit_reward(never, torch.zeros(2), 2.0).tolist() == [0.0, -torch.inf]
