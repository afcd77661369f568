import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minqstar.theory.losses import chosen_nll, dpo_loss, response_sums, sft_loss
from minqstar.theory.qfunction import implicit_reward

logps = st.floats(-30, 0, allow_nan=False)
responses = st.lists(st.lists(st.tuples(logps, logps), min_size=1, max_size=6), min_size=2, max_size=8).filter(
    lambda r: len(r) % 2 == 0
)
betas = st.floats(-2, 2).map(lambda x: 10**x)


def flat(some):
    values = torch.tensor([p for response in some for p in response], dtype=torch.float64)
    index = torch.tensor([i for i, response in enumerate(some) for _ in response])
    return values[:, 0], values[:, 1], index


@given(responses, betas)
def test_dpo_is_eq_8_9(some, beta):
    policy, reference, index = flat(some)
    terms = dpo_loss(policy, reference, index, len(some), beta)
    for p in range(len(some) // 2):
        returns = [beta * math.fsum(a - b for a, b in some[2 * p + side]) for side in (0, 1)]
        margin = returns[0] - returns[1]
        expected = max(0.0, -margin) + math.log1p(math.exp(-abs(margin)))
        assert math.isclose(terms.chosen_reward[p].item(), returns[0], abs_tol=1e-9)
        assert math.isclose(terms.rejected_reward[p].item(), returns[1], abs_tol=1e-9)
        assert math.isclose(terms.loss[p].item(), expected, rel_tol=1e-9, abs_tol=1e-9)


def test_sums_not_means():
    """A longer response with the same ratio at each token has a larger return."""
    policy, index = torch.zeros(5), torch.tensor([0, 0, 0, 0, 1])
    terms = dpo_loss(policy, policy - 1, index, 2, 0.5)
    assert terms.chosen_reward.item() == 2.0 and terms.rejected_reward.item() == 0.5


def test_the_gradient_is_the_closed_form():
    """d loss / d logp_w = -beta sigmoid(-margin) at every token of the chosen response, and + at the rejected."""
    policy = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -0.7], dtype=torch.float64)
    dpo_loss(policy, reference, torch.tensor([0, 0, 1]), 2, 0.3).loss.sum().backward()
    margin = 0.3 * ((0.5 - 1.0) - 0.2)
    slope = 0.3 / (1 + math.exp(margin))
    assert torch.allclose(policy.grad, torch.tensor([-slope, -slope, slope], dtype=torch.float64))


def test_sft_is_the_summed_negative_log_likelihood():
    assert sft_loss(torch.tensor([-1.0, -2.5])).item() == 3.5


@given(responses)
def test_chosen_nll_is_a_mean_over_the_tokens_of_each_chosen_response(some):
    policy, _, index = flat(some)
    expected = [-sum(a for a, _ in response) / len(response) for response in some[::2]]
    assert chosen_nll(policy, index, len(some)).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_response_sums_of_an_absent_response_is_zero():
    assert response_sums(torch.tensor([1.0, 2.0]), torch.tensor([2, 2]), 4).tolist() == [0, 0, 3, 0]


@given(st.lists(st.tuples(logps, logps), min_size=1, max_size=9), betas)
def test_implicit_reward_is_the_scaled_log_ratio(some, beta):
    policy, reference = torch.tensor(some, dtype=torch.float64).T
    rewards = implicit_reward(policy, reference, beta)
    assert rewards.tolist() == pytest.approx([beta * (a - b) for a, b in some])
    assert (implicit_reward(policy, policy, beta) == 0).all()


def test_bad_input_is_refused():
    a = torch.zeros(3)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta"):
            implicit_reward(a, a, beta)
    with pytest.raises(ValueError, match="match"):
        implicit_reward(a, torch.zeros(1), 0.5)
