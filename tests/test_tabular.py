"""What a population loss finds is pi*, or it is said by how much it is not: tabular, all comparisons, no sampling."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minqstar.theory.losses import plackett_luce
from minqstar.theory.mdp import TokenMDP, implicit_rewards, luck, solve, tree
from minqstar.theory.paths import Responses, responses, segment
from minqstar.theory.tabular import Population, compared, fit, rankings


def small_tree(num_tokens: int = 2, horizon: int = 2, seed: int = 0) -> TokenMDP:
    (token, next), generator = tree(num_tokens, horizon), torch.Generator().manual_seed(seed)
    logits, reward = (torch.randn(token.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return TokenMDP(token, next, logits.masked_fill(token < 0, -torch.inf).log_softmax(-1), reward)


def without_reference(mdp: TokenMDP) -> TokenMDP:
    return replace(mdp, log_ref=torch.where(mdp.support, 0.0, -torch.inf).double())


def every_piece(mdp: TokenMDP) -> Responses:
    """Every piece of every response, start anywhere, end anywhere; the whole responses are among them."""
    paths = responses(mdp)
    lengths = paths.scored.sum(-1).tolist()
    cuts = [(r, start, stop) for r, n in enumerate(lengths) for stop in range(1, n + 1) for start in range(stop)]
    which, start, stop = torch.tensor(cuts).T
    return segment(mdp, Responses(*(t[which] for t in paths)), start, stop)


def equally_often(N: int) -> torch.Tensor:
    return torch.full((N, N), 1 / N**2, dtype=torch.float64)


@pytest.mark.parametrize("K", [2, 3, 4])
def test_rankings_lead_to_the_optimum(K):
    """Theorem 1: the population Plackett-Luce loss has pi* for its minimiser, whatever K."""
    mdp = small_tree(2, 1) if K == 4 else small_tree()
    found = fit(mdp, 0.5, 30, rankings(mdp, K))
    assert found.policy_gap[-1] < 1e-5 and found.reward_gap[-1] < 1e-5 and abs(found.loss[-1]) < 1e-10


def test_the_population_of_rankings_is_drawn_and_labelled():
    """All K-tuples, each as often as pi_ref draws it, and labelled by the returns: by enumeration."""
    mdp = small_tree(2, 1)
    paths, population = responses(mdp), rankings(mdp, 3)
    chance = [math.exp(paths.along(mdp.log_ref)[i].sum()) for i in range(3)]
    for i, j, k in itertools.product(range(3), repeat=3):
        assert math.isclose(population.drawn[i, j, k].item(), chance[i] * chance[j] * chance[k])
    assert torch.equal(population.labels, paths.along(mdp.reward).sum(-1))
    assert population.score(mdp.reward).tolist() == population.labels.tolist()
    less = rankings(mdp, 2, without_luck=mdp.reward / 4)
    assert torch.allclose(less.labels, population.labels * 3 / 4) and less.drawn.dim() == 2


def cost_of_pairs(returns: torch.Tensor) -> float:
    """How many times the variance grows where rankings by returns (K,) are broken into all of their pairs.

    A sum of log-likelihoods with mean curvature H and covariance J of its gradient estimates with covariance
    H^-1 J H^-1 (of whole rankings H^-1). The ratio of the traces, by enumeration of the K! rankings.
    """
    orders = torch.tensor(list(itertools.permutations(range(len(returns)))))
    chance = plackett_luce(returns[orders]).exp()

    def pairs(S):
        return sum(plackett_luce(S[orders][:, [i, j]]) for i, j in itertools.combinations(range(len(S)), 2))

    def variance(log_likelihood):
        slopes = torch.autograd.functional.jacobian(log_likelihood, returns)
        curvature = -torch.autograd.functional.hessian(lambda S: (chance * log_likelihood(S)).sum(), returns)
        inverse = torch.linalg.pinv(curvature, hermitian=True)  # a constant on all returns changes nothing
        return (inverse @ (slopes.T * chance) @ slopes @ inverse).trace()

    return (variance(pairs) / variance(lambda S: plackett_luce(S[orders]))).item()


def test_a_ranking_broken_into_its_pairs_is_another_estimator():
    """Both find the true returns, but the pairs of one ranking are no independent draws: 28/27 the variance for three
    equal returns, (4/3) (K+1) (K - H_K) / (K (K-1)) for K, H_K the harmonic number, and more where returns differ.
    On one sample the two disagree."""
    for K in (3, 4, 5):
        H = sum(1 / k for k in range(1, K + 1))
        expected = 4 / 3 * (K + 1) * (K - H) / (K * (K - 1))
        assert math.isclose(cost_of_pairs(torch.zeros(K, dtype=torch.float64)), expected, rel_tol=1e-9)
    assert cost_of_pairs(torch.arange(4).double()) == pytest.approx(1.0978, abs=1e-4)

    def maximum(log_likelihood):
        S = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([S], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
        orders, weights = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0]]), torch.tensor([0.5, 0.3, 0.2]).double()

        def step():
            search.zero_grad()
            loss = -(weights * log_likelihood(S[orders])).sum()
            loss.backward()
            return loss

        search.step(step)
        return (S - S[0]).detach()

    whole = maximum(plackett_luce)
    broken = maximum(lambda S: sum(plackett_luce(S[:, [i, j]]) for i, j in ((0, 1), (0, 2), (1, 2))))
    assert (whole - broken).abs().max() > 0.05


def test_labels_by_return_reward_luck_and_labels_by_regret_do_not():
    """Section 6. The environment draws after the first token: only what is judged without luck leads to pi*, or what
    is compared with the same luck."""
    mdp = replace(small_tree(seed=3), chance=torch.arange(7) == 1)
    solution, paths = solve(mdp, 0.5), responses(mdp)
    fortune = luck(mdp, solution)
    assert fit(mdp, 0.5, 40).policy_gap[-1] > 1e-3
    by_regret = fit(mdp, 0.5, 40, rankings(mdp, 2, without_luck=fortune))
    assert by_regret.policy_gap[-1] < 1e-5 and abs(by_regret.loss[-1]) < 1e-10
    assert torch.equal(by_regret.log_pi[1], mdp.log_ref[1]) and (by_regret.rewards[1] == 0).all()

    # the environment speaks first: whoever answers the same words had the same luck
    mdp = replace(small_tree(seed=1), chance=torch.arange(7) == 0)
    lucky = paths.along(luck(mdp, solve(mdp, 0.5))).sum(-1)
    population = rankings(mdp)
    together = population.drawn * ((lucky[:, None] - lucky).abs() < 1e-12)
    assert fit(mdp, 0.5, 40).policy_gap[-1] > 1e-3
    shared = fit(mdp, 0.5, 40, population._replace(drawn=together / together.sum()))
    assert shared.policy_gap[-1] < 1e-5


def test_the_same_words_of_the_environment_need_not_be_the_same_luck():
    """Two first tokens, then the environment's head or tail, which pays by what was said before. Pairs that share the
    environment's token do not lead to pi*: its worth differs, and the sigmoid does not average."""
    token = torch.tensor([[0, 1], [2, 3], [2, 3]])
    next = torch.tensor([[1, 2], [3, 3], [3, 3]])
    reward = torch.tensor([[0.0, 0.0], [2.0, -2.0], [0.3, 0.3]], dtype=torch.float64)
    half = torch.full((3, 2), 0.5, dtype=torch.float64).log()
    mdp = TokenMDP(token, next, half, reward, torch.tensor([False, True, True]))
    paths, population = responses(mdp), rankings(mdp)
    said = mdp.token[paths.states, paths.actions][:, 1]
    together = population.drawn * (said[:, None] == said)
    found = fit(mdp, 0.5, 40, population._replace(drawn=together / together.sum()))
    assert found.policy_gap[-1] > 0.02
    margin = found.rewards[0, 0] - found.rewards[0, 1]  # its sigmoid is the mean of the two sigmoids
    expected = torch.tensor([2.0 - 0.3, -2.0 - 0.3]).double().sigmoid().mean().logit()
    assert math.isclose(margin.item(), expected.item(), abs_tol=1e-5) and abs(expected + 0.3) > 0.05


def two_by_two(mdp: TokenMDP, beta: float, iterations: int) -> dict[tuple[str, str], float]:
    """How far from pi* preferences lead (`policy_gap`), by what is compared and by what the labels go."""
    A_star = implicit_rewards(mdp, solve(mdp, beta), beta)
    gaps = {}
    for length, paths in (("complete", responses(mdp)), ("cut", every_piece(mdp))):
        for label, table in (("return", mdp.reward), ("regret", A_star)):
            population = compared(paths, equally_often(len(paths.states)), paths.along(table).sum(-1))
            gaps[label, length] = fit(mdp, beta, iterations, population).policy_gap[-1]
    return gaps


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("reference", [False, True])
def test_truncated_is_not_terminal(seed, reference):
    """CPL's table: complete or cut, by return or by regret. Of the four only cut pieces judged by their return fail:
    that leaves out V* of the state in which a piece stops, and of that in which it starts."""
    mdp = small_tree(2, 1 + seed, seed)
    gaps = two_by_two(mdp if reference else without_reference(mdp), 0.5, 25)
    assert gaps.pop(("return", "cut")) > 0.05
    assert len(gaps) == 3 and all(gap < 1e-5 for gap in gaps.values()), gaps


def two_arms(p: float) -> TokenMDP:
    """One state and two actions, of which the first should be preferred with probability p; no reference."""
    reward = torch.tensor([[math.log(p), math.log1p(-p)]], dtype=torch.float64)
    return TokenMDP(torch.tensor([[0, 1]]), torch.tensor([[1, 1]]), torch.zeros(1, 2).double(), reward)


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_lambda_below_one_is_biased_by_a_known_amount(p):
    """The loss -log sigmoid(w - lambda l) of two arms at beta = 1, where pi* is (p, 1-p), is smallest at the pi with
    p s(lambda l - w) (1 - pi + lambda pi) = (1-p) s(lambda w - l) (pi + lambda (1 - pi)), w = log pi, l = log(1 - pi).
    A little below lambda = 1 it is too sure by (1 - lambda) p (1-p) ((1-p) (1 + log p) - p (1 + log(1-p))), at
    lambda = 0 too unsure: (2p - 1) pi^2 - (2p + 1) pi + 2p = 0."""
    mdp, found = two_arms(p), {}
    paths = responses(mdp)
    population = compared(paths, 1.0 - torch.eye(2).double(), paths.along(mdp.reward).sum(-1))
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    for weight in (0.0, 0.5, 0.999, 1.0):
        likelihood = lambda S, weight=weight: F.logsigmoid(S[..., 0] - weight * S[..., 1])  # noqa: E731
        pi = fit(mdp, 1.0, 30, population, likelihood).log_pi[0, 0].exp().item()
        w, l = math.log(pi), math.log1p(-pi)  # noqa: E741
        left = p * sigmoid(weight * l - w) * (1 - pi + weight * pi)
        assert math.isclose(left, (1 - p) * sigmoid(weight * w - l) * (pi + weight * (1 - pi)), rel_tol=1e-6)
        found[weight] = pi
    assert math.isclose(found[1.0], p, abs_tol=1e-6)
    root = (2 * p + 1 - math.sqrt((2 * p + 1) ** 2 - 8 * p * (2 * p - 1))) / (2 * (2 * p - 1))
    assert math.isclose(found[0.0], root, abs_tol=1e-6) and found[0.0] < p < found[0.5]
    slope = p * (1 - p) * ((1 - p) * (1 + math.log(p)) - p * (1 + math.log1p(-p)))
    assert slope > 0.03 and math.isclose(found[0.999] - p, 1e-3 * slope, rel_tol=1e-2)


@pytest.mark.parametrize("rare", [False, True])
def test_where_nothing_is_compared_nothing_moves(rare):
    """Of pairs of a response with itself nothing is learned: the policy is pi_ref, and the gaps are pi_ref's own."""
    mdp = small_tree()
    if rare:  # one action that pi_ref hardly takes is worth much, so that the largest gap is above
        mdp = replace(two_arms(0.9), log_ref=torch.tensor([[0.01, 0.99]], dtype=torch.float64).log())
    population, solution = rankings(mdp), solve(mdp, 0.5)
    found = fit(mdp, 0.5, 1, population._replace(drawn=population.drawn.diag().diag()))
    assert torch.allclose(found.log_pi.exp(), mdp.log_ref.exp(), atol=1e-12) and found.rewards.abs().max() < 1e-12
    assert found.policy_gap == pytest.approx([(mdp.log_ref.exp() - solution.log_pi.exp()).abs().max().item()])
    assert found.reward_gap == pytest.approx([implicit_rewards(mdp, solution, 0.5).abs().max().item()])
    assert abs(found.loss[0]) < 1e-12


def test_the_fit_weighs_what_it_is_given():
    """A population of one comparison, and of a score of one's own."""
    mdp = small_tree(2, 0)  # EOS alone: nothing to learn
    paths = responses(mdp)
    only = Population(torch.ones(1, 1).double(), torch.zeros(1).double(), lambda rewards: rewards.sum()[None])
    found = fit(mdp, 0.5, 1, only)
    assert found.policy_gap == [0.0] and abs(found.loss[0]) < 1e-12
    assert compared(paths, equally_often(1), torch.zeros(1)).score(mdp.reward).tolist() == [mdp.reward[0, 2].item()]
