import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minqstar.theory.losses import chosen_nll, dpo_loss, plackett_luce, response_sums, sft_loss
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
    terms = dpo_loss(policy, reference, index, [2] * (len(some) // 2), beta)
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
    terms = dpo_loss(policy, policy - 1, index, [2], 0.5)
    assert terms.chosen_reward.item() == 2.0 and terms.rejected_reward.item() == 0.5


def test_the_gradient_is_the_closed_form():
    """d loss / d logp_w = -beta sigmoid(-margin) at every token of the chosen response, and + at the rejected."""
    policy = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -0.7], dtype=torch.float64)
    dpo_loss(policy, reference, torch.tensor([0, 0, 1]), [2], 0.3).loss.sum().backward()
    margin = 0.3 * ((0.5 - 1.0) - 0.2)
    slope = 0.3 / (1 + math.exp(margin))
    assert torch.allclose(policy.grad, torch.tensor([-slope, -slope, slope], dtype=torch.float64))


def test_sft_is_the_summed_negative_log_likelihood():
    assert sft_loss(torch.tensor([-1.0, -2.5])).item() == 3.5


@given(responses)
def test_chosen_nll_is_a_mean_over_the_tokens_of_each_chosen_response(some):
    policy, _, index = flat(some)
    expected = [-sum(a for a, _ in response) / len(response) for response in some[::2]]
    assert chosen_nll(policy, index, [2] * (len(some) // 2)).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    sizes = [len(some) - 2, 2] if len(some) > 3 else [2]
    expected = [expected[0], expected[-1]][: len(sizes)]
    assert chosen_nll(policy, index, sizes).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_response_sums_of_an_absent_response_is_zero():
    assert response_sums(torch.tensor([1.0, 2.0]), torch.tensor([2, 2]), 4).tolist() == [0, 0, 3, 0]


@given(st.lists(st.tuples(logps, logps), min_size=1, max_size=9), betas)
def test_implicit_reward_is_the_scaled_log_ratio(some, beta):
    policy, reference = torch.tensor(some, dtype=torch.float64).T
    rewards = implicit_reward(policy, reference, beta)
    assert rewards.tolist() == pytest.approx([beta * (a - b) for a, b in some])
    assert (implicit_reward(policy, policy, beta) == 0).all()


returns = st.lists(st.floats(-20, 20), min_size=2, max_size=5)


def naive_log_probability(ranked: list[float]) -> float:
    """log of e^S_1 / (e^S_1 + ... + e^S_K) * e^S_2 / (e^S_2 + ... + e^S_K) * ..."""
    chance = 1.0
    for k in range(len(ranked)):
        chance *= math.exp(ranked[k]) / math.fsum(math.exp(s) for s in ranked[k:])
    return math.log(chance)


@given(returns, st.floats(-50, 50))
def test_rankings_are_plackett_luce(S, shift):
    """Theorem 1's class: the product of choices, one distribution over all K! orders, blind to V*(s_0)."""
    orders = [list(order) for order in itertools.permutations(S)]
    found = plackett_luce(torch.tensor(orders, dtype=torch.float64))
    assert found.shape == (math.factorial(len(S)),)
    assert found.tolist() == pytest.approx([naive_log_probability(order) for order in orders], abs=1e-9)
    assert math.isclose(math.fsum(found.exp().tolist()), 1.0, rel_tol=1e-12)
    moved = plackett_luce(torch.tensor(orders, dtype=torch.float64) + shift)
    assert torch.allclose(moved, found, atol=1e-12)
    enormous = plackett_luce(torch.tensor([S, [1e6 * s for s in S]], dtype=torch.float64))  # in log space
    assert torch.equal(enormous[0], found[0]) and enormous.isfinite().all()


@given(returns)
def test_who_comes_first_is_a_softmax_and_any_two_are_bradley_terry(S):
    """The pairs of a ranking agree with pairs drawn alone: P(i before j) = sigmoid(S_i - S_j), whoever else is in."""
    K, chance = len(S), {}
    orders = list(itertools.permutations(range(K)))
    for order, p in zip(
        orders, plackett_luce(torch.tensor([[S[i] for i in o] for o in orders]).double()).exp().tolist(), strict=True
    ):
        chance[order] = p
    first = torch.tensor(S, dtype=torch.float64).softmax(0)
    for i in range(K):
        assert math.isclose(math.fsum(p for o, p in chance.items() if o[0] == i), first[i].item(), abs_tol=1e-6)
    before = math.fsum(p for o, p in chance.items() if o.index(0) < o.index(1))
    assert math.isclose(before, 1 / (1 + math.exp(S[1] - S[0])), abs_tol=1e-6)


@given(returns)
def test_two_ranked_responses_are_a_pair(S):
    """K = 2 is Eq. 1: value and slope of log sigmoid, to rounding."""
    two = torch.tensor(S[:2], dtype=torch.float64, requires_grad=True)
    right = torch.nn.functional.logsigmoid(two[0] - two[1])
    assert math.isclose(plackett_luce(two).item(), right.item(), rel_tol=1e-12, abs_tol=1e-12)
    slopes = [torch.autograd.grad(value, two)[0] for value in (plackett_luce(two), right)]
    assert torch.allclose(*slopes, rtol=1e-9, atol=1e-12)


rankings = st.lists(
    st.lists(st.lists(st.tuples(logps, logps), min_size=1, max_size=4), min_size=2, max_size=5), min_size=1, max_size=4
)


@given(rankings, betas)
def test_rankings_of_several_sizes_are_taken_one_by_one(some, beta):
    """Loss and figures by their definitions; V*(s_0) cancels, so the slopes by the returns of a ranking sum to 0."""
    policy, reference, index = flat([response for ranking in some for response in ranking])
    policy.requires_grad_()
    sizes = [len(ranking) for ranking in some]
    together = dpo_loss(policy, reference, index, sizes, beta)
    slope = torch.autograd.grad(together.loss.sum(), policy)[0] / beta
    first = [int((index < i).sum()) for i in range(sum(sizes))]  # of each response the first token: all have one slope
    assert torch.equal(slope, slope[first][index])
    by_ranking = slope[first].split(sizes)
    for n, ranking in enumerate(some):
        S = [beta * math.fsum(a - b for a, b in response) for response in ranking]
        exact = torch.tensor(S, dtype=torch.float64)
        assert together.chosen_reward[n].item() == pytest.approx(S[0], rel=1e-9, abs=1e-9)
        assert together.rejected_reward[n].item() == pytest.approx(math.fsum(S[1:]) / len(S[1:]), rel=1e-9, abs=1e-9)
        assert together.loss[n].item() == pytest.approx(-plackett_luce(exact).item(), rel=1e-9, abs=1e-9)
        assert abs(by_ranking[n].sum()) < 1e-9
        pairs = list(itertools.combinations(S, 2))
        if all(abs(a - b) > 1e-9 * (1 + abs(a)) for a, b in pairs):
            right = sum(a > b for a, b in pairs) / len(pairs)
            assert together.accuracy[n].item() == pytest.approx(right)


def test_equal_returns_are_half_right():
    logps = torch.zeros(5)
    found = dpo_loss(logps, logps, torch.arange(5), [3, 2], 1.0)
    assert found.accuracy.tolist() == [0.5, 0.5]
    assert found.loss.tolist() == pytest.approx([math.log(6), math.log(2)]) and found.loss[1] == math.log(2)


@given(responses, betas, st.floats(0, 1))
def test_cpl_has_no_reference_and_weighs_the_rejected(some, beta, weight):
    """arXiv 2310.13639: -log(e^w / (e^w + e^(lambda l))), w and l sums of beta log pi."""
    (policy, _, index), sizes = flat(some), [2] * (len(some) // 2)
    terms = dpo_loss(policy, None, index, sizes, beta, weight)
    for p in range(len(some) // 2):
        w, l = (beta * math.fsum(a for a, _ in some[2 * p + side]) for side in (0, 1))  # noqa: E741
        margin = w - weight * l
        expected = max(0.0, -margin) + math.log1p(math.exp(-abs(margin)))
        assert math.isclose(terms.chosen_reward[p].item(), w, abs_tol=1e-9)
        assert math.isclose(terms.rejected_reward[p].item(), l, abs_tol=1e-9)
        assert math.isclose(terms.loss[p].item(), expected, rel_tol=1e-9, abs_tol=1e-9)
    assert torch.equal(dpo_loss(policy, torch.zeros_like(policy), index, sizes, beta, weight).loss, terms.loss)


def test_a_temperature_for_each_token():
    """Eq. 17: the refiner's tokens count with gamma, the generator's with beta."""
    policy, reference = torch.tensor([-1.0, -2.0, -3.0, -0.5]).double(), torch.tensor([-2.0, -2.5, -1.0, -1.0]).double()
    betas = torch.tensor([2.0, 0.1, 2.0, 0.1], dtype=torch.float64)
    found = dpo_loss(policy, reference, torch.tensor([0, 0, 1, 1]), [2], betas)
    assert found.chosen_reward.item() == pytest.approx(2.0 * 1.0 + 0.1 * 0.5)
    assert found.rejected_reward.item() == pytest.approx(2.0 * -2.0 + 0.1 * 0.5)
    with pytest.raises(ValueError, match="got -1 at state 2"):
        dpo_loss(policy, reference, torch.tensor([0, 0, 1, 1]), [2], torch.tensor([1.0, 1.0, -1.0, 1.0]))


@pytest.mark.parametrize("count", [0, 1])
def test_a_ranking_of_fewer_than_two_is_refused(count):
    with pytest.raises(ValueError, match="a ranking needs two responses at the least"):
        plackett_luce(torch.zeros(3, count))
    with pytest.raises(ValueError, match="a ranking needs two responses at the least"):
        plackett_luce(torch.tensor([[0.0, 1.0, 2.0], [0.0, -math.inf, -math.inf]])[:, : count + 2])


def test_bad_input_is_refused():
    a = torch.zeros(3)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta"):
            implicit_reward(a, a, beta)
    with pytest.raises(ValueError, match="match"):
        implicit_reward(a, torch.zeros(1), 0.5)
