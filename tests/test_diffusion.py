"""Denoising chains, of a few values and of Gaussians: enumeration, conditioning, quadrature, DPO on sampled pairs."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minqstar.theory.appendices import draw_gaussian
from minqstar.theory.cases import random_denoising
from minqstar.theory.denoising import denoising_chain
from minqstar.theory.diffusion import (
    Chain,
    Quadratic,
    cosine_noise,
    credit,
    denoiser,
    draw,
    factors,
    gaussian,
    linear_noise,
    log_density,
    marginals,
    prior_luck,
    separate_loss,
    solve_chain,
    variance_cost,
)
from minqstar.theory.losses import dpo_loss
from minqstar.theory.mdp import implicit_rewards, luck, rewards_of, solve, visits
from minqstar.theory.paths import responses
from minqstar.theory.tabular import fit, rankings

seeds = st.integers(0, 10**6)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# diffusion of a few values


def forward(x: int, y: int, amount: float, num_values: int, absorbing: bool) -> float:
    """q(x_t = y | x_{t-1} = x)."""
    anew = float(y == num_values - 1) if absorbing else 1 / num_values
    return (1 - amount) * (x == y) + amount * anew


@given(seeds)
def test_the_chain_is_the_reverse_of_the_noise(seed):
    """Every x_0 .. x_T, forwards by the noise and backwards by pi_ref, has one probability; its return is r(x_0)."""
    data, noise, reward, absorbing = random_denoising(seeded(seed))
    mdp = denoising_chain(data, noise, reward, absorbing)
    X, T, N = len(data), len(noise), len(data) + absorbing
    assert mdp.num_states == 1 + T * N and (mdp.token == torch.arange(N)).all()
    paths = responses(mdp)
    assert len(paths.states) == N ** (T + 1) and paths.scored.all()
    back = dict(zip(map(tuple, paths.actions.tolist()), paths.along(mdp.log_ref).sum(-1).exp().tolist(), strict=True))
    paid = dict(zip(map(tuple, paths.actions.tolist()), paths.along(mdp.reward).sum(-1).tolist(), strict=True))
    for x in itertools.product(range(N), repeat=T + 1):
        p = math.exp(data[x[0]]) if x[0] < X else 0.0
        for t in range(T):
            p *= forward(x[t], x[t + 1], noise[t].item(), N, absorbing)
        assert math.isclose(back[x[::-1]], p, rel_tol=1e-9, abs_tol=1e-15)
        assert paid[x[::-1]] == (reward[x[0]].item() if x[0] < X else 0.0)


def test_a_chain_of_two_steps_by_hand():
    """Two values, p_0 = (0.8, 0.2), noise 0.5 and then 1: x_2 is a coin, x_1 is (0.65, 0.35) whatever x_2."""
    mdp = denoising_chain(tensor([0.8, 0.2]).log(), tensor([0.5, 1.0]), tensor([1.0, 3.0]), False)
    p = mdp.log_ref.exp().tolist()
    assert p[0] == pytest.approx([0.5, 0.5]) and p[1] == p[2] == pytest.approx([0.65, 0.35])
    assert p[3] == pytest.approx([0.6 / 0.65, 0.05 / 0.65]) and p[4] == pytest.approx([0.2 / 0.35, 0.15 / 0.35])
    assert mdp.next.tolist() == [[1, 2], [3, 4], [3, 4], [5, 5], [5, 5]]
    assert mdp.reward.tolist() == [[0, 0]] * 3 + [[1, 3]] * 2
    V = solve(mdp, 2.0).V
    assert V[0].item() == pytest.approx(2 * math.log(0.8 * math.exp(0.5) + 0.2 * math.exp(1.5)))
    assert V[3].item() == pytest.approx(2 * math.log((0.6 * math.exp(0.5) + 0.05 * math.exp(1.5)) / 0.65))
    masked = denoising_chain(tensor([0.8, 0.2]).log(), tensor([0.25]), tensor([1.0, 3.0]), True)
    p = masked.log_ref.exp().tolist()
    assert p[0] == pytest.approx([0.6, 0.15, 0.25]) and p[1:] == [[1, 0, 0], [0, 1, 0], pytest.approx([0.8, 0.2, 0])]


@pytest.mark.parametrize("absorbing", [False, True])
def test_a_value_that_never_occurs_may_have_any_reverse(absorbing):
    """A value without mass, and a first step without noise: there is still a law in every state, and no NaN."""
    data, reward = tensor([0.7, 0.3, 0.0]).log(), tensor([1.0, -1.0, 5.0])
    mdp = denoising_chain(data, tensor([0.0, 0.6]), reward, absorbing)
    V0 = solve(mdp, 0.5).V[0].item()
    assert math.isclose(V0, 0.5 * math.log(0.7 * math.exp(2) + 0.3 * math.exp(-2)), rel_tol=1e-12)
    last = mdp.log_ref[-mdp.token.shape[1] :][:2, :3]  # of x_1 that do occur: nothing was changed
    assert torch.equal(last.exp(), torch.eye(3).double()[:2])


@given(seeds, st.floats(-1, 1))
def test_lemma_2_and_the_optimum_of_a_chain(seed, log_beta):
    """r -> Q* -> r, and pi* denoises p_0 exp(r/beta) / Z: its x_0 have that distribution. A fixed prior leaves luck."""
    data, noise, reward, absorbing = random_denoising(seeded(seed))
    beta, mdp = 10**log_beta, denoising_chain(data, noise, reward, absorbing)
    solution = solve(mdp, beta)
    again = rewards_of(mdp, solution.Q, beta)[mdp.support]
    assert torch.allclose(again, mdp.reward[mdp.support], atol=1e-9 * max(1, solution.Q[mdp.support].abs().max()))
    N = mdp.token.shape[1]
    drawn = visits(mdp, solution.log_pi)[-N:].sum(0)[: len(data)]
    assert torch.allclose(drawn, (data + reward / beta).softmax(-1), atol=1e-9)
    fixed = replace(mdp, chance=torch.arange(mdp.num_states) == 0)
    lucky = luck(fixed, solve(fixed, beta))
    V = solve(fixed, beta).V
    assert torch.allclose(lucky[0], torch.where(mdp.support[0], V[1 : N + 1] - V[0], 0.0)) and (lucky[1:] == 0).all()


@pytest.mark.parametrize("absorbing", [False, True])
def test_population_dpo_finds_the_optimum_of_a_chain(absorbing):
    """The tabular fit, as it is. With a fixed prior it needs labels without luck: pairs have their own x_T."""
    mdp = denoising_chain(tensor([0.5, 0.3, 0.2]).log(), tensor([0.4, 0.6]), tensor([0.0, 1.0, -0.5]), absorbing)
    found = fit(mdp, 0.5, 40)
    assert found.policy_gap[-1] < 1e-5 and found.reward_gap[-1] < 1e-5
    fixed = replace(mdp, chance=torch.arange(mdp.num_states) == 0)
    assert fit(fixed, 0.5, 40).policy_gap[-1] > 1e-3
    by_regret = rankings(fixed, 2, without_luck=luck(fixed, solve(fixed, 0.5)))
    assert fit(fixed, 0.5, 40, by_regret).policy_gap[-1] < 1e-5
    assert (implicit_rewards(fixed, solve(fixed, 0.5), 0.5)[0] == 0).all()


def test_data_and_noise_that_are_none_are_refused():
    half = tensor([0.5, 0.5]).log()
    for noise in ([0.5, -0.1], [1.1], [math.nan]):
        with pytest.raises(ValueError, match="noise must be between 0 and 1"):
            denoising_chain(half, tensor(noise), tensor([0.0, 1.0]), False)
    for first, total in ((1.0, r"1\.5"), (0.25, r"0\.75"), (math.nan, "nan")):
        with pytest.raises(ValueError, match=f"the data must be a distribution, but its probabilities sum to {total}"):
            denoising_chain(tensor([first, 0.5]).log(), tensor([0.5]), tensor([0.0, 1.0]), False)


# diffusion of Gaussians


def some_chain(T: int, noise: torch.Tensor | None = None, D: int = 1) -> tuple[Chain, Chain, Quadratic, float]:
    """Data, pi_ref, a reward and beta: deviations from 1 to 2, a reward for being near (1, ..., 1)."""
    m, S = torch.linspace(0.3, -0.3, D).double(), torch.eye(D).double() * torch.linspace(1, 2, D).double() ** 2
    if D > 1:
        S[0, 1] = S[1, 0] = 0.5
    reward = Quadratic(torch.eye(D).double() * 1.5, torch.ones(D).double(), tensor(-0.4))
    data = gaussian(m, S)
    return data, denoiser(data, cosine_noise(T) if noise is None else noise), reward, 0.7


def from_nothing(chain: Chain, count: int, seed: int) -> torch.Tensor:
    return draw(chain, torch.zeros(count, chain.d.shape[1], dtype=torch.float64), seeded(seed))


def test_a_gaussian_chain_of_two_steps_by_hand():
    """x_0 ~ N(0.3, 1), noise 0.36 and 0.19: every x_t has variance 1, and K is what remains, 0.8 and 0.9."""
    data, chain, reward, beta = some_chain(2, tensor([0.36, 0.19]))
    assert data.A.flatten().tolist() == [0]
    assert chain.A.flatten().tolist() == pytest.approx([0, 0.9, 0.8])
    assert chain.S.flatten().tolist() == pytest.approx([1, 0.19, 0.36])
    assert chain.d.flatten().tolist() == pytest.approx(
        [0.72 * 0.3, 0.8 * 0.3 - 0.9 * 0.72 * 0.3, 0.3 - 0.8 * 0.8 * 0.3]
    )
    values, policy = solve_chain(chain, reward, beta)
    w = 1 / (1 + 0.36 * 1.5 / 0.7)
    assert policy.A[2].item() == pytest.approx(w * 0.8) and policy.S[2].item() == pytest.approx(w * 0.36)
    assert policy.d[2].item() == pytest.approx(w * (0.3 * 0.36 + 0.36 / 0.7))
    mean, spread = 0.8 * 1.1 + 0.3 * 0.36, 0.36  # of x_0 from x_1 = 1.1
    expected = -0.4 + 0.35 * math.log(w) + (-1.5 * mean**2 + 2 * mean + spread / 0.7) * w / 2
    assert values[2].at(tensor([1.1])).item() == pytest.approx(expected)
    assert values[3] is reward and (values[0].P == 0).all() and (values[0].q == 0).all()


def test_noise_of_one_leaves_nothing_to_know():
    data, chain, _, _ = some_chain(1, tensor([1.0]), D=2)
    assert (chain.A == 0).all() and torch.equal(chain.d[1], data.d[0]) and torch.allclose(chain.S[1], data.S[0])
    assert torch.equal(chain.S[0], torch.eye(2).double()) and (chain.d[0] == 0).all()


@given(seeds)
def test_densities_are_torch_s_and_the_reverse_is_bayes(seed):
    """log p(x_{t-1} | x_t) = log q(x_t | x_{t-1}) + log p(x_{t-1}) - log p(x_t), and a draw has these densities."""
    c = draw_gaussian(seeded(seed))
    x = c.drawn[:5]
    found = log_density(c.chain, x)
    MVN = torch.distributions.MultivariateNormal
    m, C, marginal = c.data.d[0], c.data.S[0], [MVN(c.data.d[0], c.data.S[0])]
    for b in c.noise:
        m, C = (1 - b).sqrt() * m, (1 - b) * C + b * torch.eye(len(m)).double()
        marginal.append(MVN(m, C))
    T = len(c.noise)
    assert torch.allclose(found[:, 0], marginal[T].log_prob(x[:, 0]), atol=1e-8)
    for k in range(1, T + 1):
        t = T + 1 - k  # step k draws x_{t-1} from x_t
        b, later, earlier = c.noise[t - 1], x[:, k - 1], x[:, k]
        q = MVN((1 - b).sqrt() * earlier, b * torch.eye(len(m)).double()).log_prob(later)
        expected = q + marginal[t - 1].log_prob(earlier) - marginal[t].log_prob(later)
        scale = max(1.0, q.abs().max().item(), marginal[t].log_prob(later).abs().max().item())
        assert torch.allclose(found[:, k], expected, atol=1e-9 * scale)
    for (m, C), p in zip(marginals(c.chain), reversed(marginal), strict=True):
        assert torch.allclose(m, p.mean, atol=1e-9) and torch.allclose(C, p.covariance_matrix, atol=1e-9)


def test_draws_have_the_moments_of_the_chain():
    _, chain, _, _ = some_chain(3, D=2)
    x = from_nothing(chain, 40000, 0)
    for k, (m, C) in enumerate(marginals(chain)):
        assert torch.allclose(x[:, k].mean(0), m, atol=0.05) and torch.allclose(x[:, k].T.cov(), C, atol=0.15)
    together = torch.cat((x[:, 2], x[:, 3]), 1).T.cov()[:2, 2:]  # Cov(x_1, x_0) = C A'
    assert torch.allclose(together, marginals(chain)[2][1] @ chain.A[3].T, atol=0.15)


@pytest.mark.parametrize("bend", [1.5, 0.0, -0.5])
def test_values_and_policies_are_integrals(bend):
    """V* before a step is beta log of an integral, and pi* its integrand, by quadrature; also for rewards that grow."""
    _, chain, reward, beta = some_chain(3)
    reward = reward._replace(P=tensor([[bend]]))
    values, policy = solve_chain(chain, reward, beta)
    grid = torch.linspace(-25, 25, 20001, dtype=torch.float64)
    for k in range(4):
        for x in (-1.3, 0.0, 2.0):
            given_x = tensor([[0.0]]) if k == 0 else tensor([[x]])
            step = lambda c, k=k: Chain(*(t[k : k + 1] for t in c))  # noqa: E731
            moved = lambda c, s=given_x: c._replace(d=c.d + (c.A @ s[0]), A=torch.zeros_like(c.A))  # noqa: E731
            ref, pi = (log_density(moved(step(c)), grid[:, None, None])[:, 0] for c in (chain, policy))
            after = values[k + 1].at(grid[:, None]) / beta
            log_Z = torch.trapezoid((ref + after).exp(), grid).log()
            assert math.isclose(values[k].at(given_x)[0].item(), beta * log_Z.item(), abs_tol=1e-9)
            assert torch.allclose(pi.exp(), (ref + after - log_Z).exp(), atol=1e-9)


def test_means_and_variances_of_a_quadratic_are_integrals():
    value, grid = Quadratic(tensor([[0.7]]), tensor([-0.4]), tensor(2.0)), torch.linspace(-30, 30, 20001).double()
    p = torch.distributions.Normal(tensor(0.5), tensor(1.7)).log_prob(grid).exp()
    worth = value.at(grid[:, None])
    mean = torch.trapezoid(p * worth, grid)
    assert math.isclose(value.mean(tensor([0.5]), tensor([[1.7**2]])).item(), mean.item(), abs_tol=1e-9)
    variance = torch.trapezoid(p * (worth - mean) ** 2, grid).item()
    assert math.isclose(value.variance(tensor([0.5]), tensor([[1.7**2]])).item(), variance, rel_tol=1e-9)
    nodes, weights = map(tensor, np.polynomial.hermite_e.hermegauss(3))  # in two dimensions, exact to the fifth power
    weights = torch.outer(weights, weights).flatten() / (2 * math.pi)
    value = Quadratic(tensor([[2.0, 0.3], [0.3, -1.0]]), tensor([1.0, -0.5]), tensor(0.1))
    m, C = tensor([0.4, -1.1]), tensor([[1.0, 0.6], [0.6, 2.0]])
    worth = value.at(m + torch.cartesian_prod(nodes, nodes) @ torch.linalg.cholesky(C).T)
    mean = (weights * worth).sum()
    assert math.isclose(value.mean(m, C).item(), mean.item(), rel_tol=1e-12)
    assert math.isclose(value.variance(m, C).item(), (weights * (worth - mean) ** 2).sum().item(), rel_tol=1e-12)


def test_ten_thousand_chains_telescope():
    """r(x_0) = V*(s_0) + sum beta log(pi*/pi_ref); each step's log-ratio is V*(x_{t-1}) - V*(x_t)."""
    _, chain, reward, beta = some_chain(8, D=3)
    values, policy = solve_chain(chain, reward, beta)
    for source in (chain, policy):
        x = from_nothing(source, 10_000, 3)
        ratios = beta * (log_density(policy, x) - log_density(chain, x))
        V = torch.stack([values[0].c.expand(10_000), *(v.at(x[:, k]) for k, v in enumerate(values[1:]))], 1)
        assert (ratios - V.diff()).abs().max() < 1e-9 and len(values) == 10
        assert (reward.at(x[:, -1]) - values[0].c - ratios.sum(-1)).abs().max() < 1e-9


def test_a_chain_need_not_undo_noise():
    """Steps with any matrices, not symmetric as those of a denoiser are: drawn, weighed and solved as they say."""
    generator = seeded(0)
    A, R = (torch.randn(3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    A[0] = 0
    chain = Chain(A, torch.randn(3, 2, generator=generator).double(), R @ R.mT + 0.2 * torch.eye(2).double())
    x = from_nothing(chain, 40_000, 1)
    again = draw(Chain(*(t[1:] for t in chain)), x[:, 0], seeded(2))[:, 0]  # x_1 from the x_2 that are given
    for k, drawn in ((1, x[:, 1]), (2, x[:, 2]), (1, again)):
        before, L = x[:, k - 1], factors(chain.S[k], "S")
        law = torch.distributions.MultivariateNormal(before @ A[k].T + chain.d[k], chain.S[k])
        assert torch.allclose(log_density(chain, x)[:, k], law.log_prob(x[:, k]), atol=1e-9)
        z = torch.linalg.solve(L, (drawn - law.mean).T)  # the noise alone: N(0, I), whatever came before
        assert torch.allclose(torch.cat((z, before.T)).cov()[:2], torch.eye(2, 4).double(), atol=0.05)
    m, C = marginals(chain)[2]
    ways = [A[2] @ A[1], A[2], torch.eye(2).double()]  # from each step's own draw to x_0
    assert torch.allclose(m, sum(M @ d for M, d in zip(ways, chain.d, strict=True)), atol=1e-12)
    assert torch.allclose(C, sum(M @ S @ M.T for M, S in zip(ways, chain.S, strict=True)), atol=1e-12)
    reward = Quadratic(tensor([[1.5, 0.4], [0.4, 1.0]]), tensor([1.0, -2.0]), tensor(0.3))
    values, policy = solve_chain(chain, reward, 0.7)
    V = torch.stack([value.at(x[:, k]) for k, value in enumerate(values[1:])], 1)
    ratios = 0.7 * (log_density(policy, x) - log_density(chain, x))
    scale = V.abs().max().item()
    assert torch.allclose(ratios[:, 1:], V.diff(), atol=1e-10 * scale, rtol=0)
    assert torch.allclose(ratios[:, 0], V[:, 0] - values[0].c, atol=1e-10 * scale, rtol=0)
    means = torch.stack([values[0].c, *(v.mean(*p) for v, p in zip(values[1:], marginals(policy), strict=True))])
    assert torch.allclose(credit(chain, policy, 0.7), means.diff(), atol=1e-10 * scale, rtol=0)
    fixed = policy._replace(S=chain.S)
    gained = reward.mean(*marginals(fixed)[-1]) - credit(chain, fixed, 0.7).sum()
    assert math.isclose(gained, values[0].c - variance_cost(chain, values, 0.7).sum(), abs_tol=1e-10 * scale)


# what the habits of diffusion models cost


@pytest.mark.parametrize("schedule", [linear_noise, cosine_noise])
def test_the_schedules(schedule):
    """What is left of the signal: exp(-0.1 s - 9.95 s^2) and cos^2 at s = t/T, in the limit of many steps."""
    noise = schedule(4000)
    kept, s = (1 - noise).cumprod(0), torch.arange(1, 4001).double() / 4000
    expected = torch.exp(-0.1 * s - 9.95 * s**2) if schedule is linear_noise else torch.cos(s * math.pi / 2) ** 2
    assert (kept - expected).abs().max() < (0.002 if schedule is linear_noise else 0.011)
    if schedule is linear_noise:
        assert noise[[0, -1]].tolist() == pytest.approx([0.1 / 4000, 20 / 4000])
    else:  # what is left at t/T = 1/2, exactly: the offset keeps the first step from being too small
        half, none = (math.cos(s / 1.008 * math.pi / 2) ** 2 for s in (0.508, 0.008))
        assert math.isclose(kept[1999].item(), half / none, rel_tol=1e-9)
    assert schedule(3).shape == (3,) and (schedule(3) > 0).all() and schedule(3)[-1] == 0.999


def test_a_fixed_prior_leaves_what_its_x_T_knows():
    """sd of V*(x_T): by drawing, and in proportion to what x_T keeps of the signal, sqrt(prod(1 - b))."""
    _, chain, reward, beta = some_chain(4, tensor([0.2] * 4))
    values, _ = solve_chain(chain, reward, beta)
    drawn = values[1].at(from_nothing(chain, 200_000, 0)[:, 0])
    assert math.isclose(prior_luck(chain, values), drawn.std().item(), rel_tol=0.01)

    def left(b: float) -> float:
        _, chain, reward, beta = some_chain(20, tensor([b] * 20))
        return prior_luck(chain, solve_chain(chain, reward, beta)[0])

    assert math.isclose(left(0.5) / left(0.4), (0.5 / 0.6) ** 10, rel_tol=1e-2)
    assert left(0.4) < 0.01 < 0.1 < left(0.05)
    data, chain, reward, beta = some_chain(20, tensor([0.4] * 20), D=2)
    shift = solve_chain(data, reward, beta)[1].d[0] - data.d[0]
    expected = beta * shift.norm().item() * 0.6**10
    assert math.isclose(prior_luck(chain, solve_chain(chain, reward, beta)[0]), expected, rel_tol=0.02)


@pytest.mark.parametrize("D", [1, 2])
def test_fixed_variances_cost_what_is_said(D):
    """pi*'s means with pi_ref's variances get V*(s_0) less the cost; other means get less; the cost is O(1/T)."""

    def gained(chain: Chain, policy: Chain, reward: Quadratic, beta: float) -> float:
        return (reward.mean(*marginals(policy)[-1]) - credit(chain, policy, beta).sum()).item()

    _, chain, reward, beta = some_chain(5, D=D)
    values, policy = solve_chain(chain, reward, beta)
    fixed, cost = policy._replace(S=chain.S), variance_cost(chain, values, beta)
    assert (cost > 0).all() and cost.shape == (6,)
    best = gained(chain, fixed, reward, beta)
    assert math.isclose(best, values[0].c.item() - cost.sum().item(), abs_tol=1e-12)
    for seed in range(20):
        e = [torch.randn(t.shape, generator=seeded(seed), dtype=torch.float64) * 0.05 for t in fixed[:2]]
        assert gained(chain, fixed._replace(A=fixed.A + e[0], d=fixed.d + e[1]), reward, beta) < best
    total = {}
    for T in (32, 64, 128):
        _, chain, reward, beta = some_chain(T, D=D)
        values, _ = solve_chain(chain, reward, beta)
        total[T] = variance_cost(chain, values, beta)[1:].sum().item()
    assert 1.8 < total[32] / total[64] < 2.1 and 1.9 < total[64] / total[128] < 2.1


def test_credit_lies_where_the_signal_comes_back():
    """A linear reward on data N(m, I): a step is owed beta |q/beta|^2 / 2 times the signal prod(1 - b) that it adds."""
    noise, q = linear_noise(50), tensor([1.0, -2.0])
    data = gaussian(tensor([0.5, 0.5]), torch.eye(2).double())
    chain, reward = denoiser(data, noise), Quadratic(torch.zeros(2, 2).double(), q, tensor(0.0))
    _, policy = solve_chain(chain, reward, 0.5)
    kept = torch.cat((tensor([1.0]), (1 - noise).cumprod(0)))
    owed = credit(chain, policy, 0.5)
    assert torch.allclose(owed[1:].flip(0), -kept.diff() * 0.5 * (q / 0.5).square().sum() / 2, atol=1e-12)
    assert math.isclose(owed[0].item(), kept[-1].item() * 5.0, rel_tol=1e-9)
    x = from_nothing(policy, 40_000, 0)
    ratios = 0.5 * (log_density(policy, x) - log_density(chain, x))
    assert torch.allclose(ratios.mean(0), owed, atol=0.02)


margin_rows = st.lists(st.lists(st.floats(-8, 8), min_size=4, max_size=4), min_size=1, max_size=5)


@given(margin_rows)
def test_a_mean_outside_of_the_sigmoid_bounds_dpo(rows):
    """Diffusion-DPO's loss against DPO's own, pair by pair (Jensen); equal where all steps have one margin."""
    margins = tensor(rows)
    pairs = torch.stack((margins, torch.zeros_like(margins)), 1)  # the rejected has ratios of 0
    index = torch.arange(len(rows) * 2).repeat_interleave(4)
    together = dpo_loss(pairs.flatten(), None, index, [2] * len(rows), 1.0).loss
    assert (separate_loss(margins) >= together - 1e-12).all()
    expected = [sum(math.log1p(math.exp(-abs(4 * m))) + max(0, -4 * m) for m in row) / 4 for row in rows]
    assert separate_loss(margins).tolist() == pytest.approx(expected, abs=1e-9)
    alike = margins[:, :1].expand(-1, 4)
    assert torch.allclose(separate_loss(alike), -F.logsigmoid(alike.sum(-1)), atol=1e-12)


def learn(chain: Chain, reward: Quadratic, beta: float, pairs: torch.Tensor, variances=True, prior=True) -> Chain:
    """DPO (Eq. 8, 9) on stored chains (P, 2, T+1, D), by L-BFGS over Gaussian steps from pi = pi_ref.

    Every pair counts with both labels, by their Bradley-Terry probabilities on r(x_0): only the choice of pairs is
    random. Changes are made in units of pi_ref's own deviations.
    """
    L, returns = factors(chain.S, "the covariance"), reward.at(pairs[..., -1, :])
    ref, preferred = log_density(chain, pairs), torch.sigmoid(returns[:, 0] - returns[:, 1])
    learned = torch.ones(len(chain.d), 1, 1, dtype=torch.float64)
    learned[0] = float(prior)
    changes = [torch.zeros_like(t, requires_grad=True) for t in chain]

    def policy() -> Chain:
        A, d, R = changes
        spread = torch.matrix_exp(learned * (R + R.mT) * variances)
        return Chain(chain.A + L @ (learned * A), chain.d + (L @ (learned * d[..., None]))[..., 0], L @ spread @ L.mT)

    search = torch.optim.LBFGS(
        changes, max_iter=500, history_size=50, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def step():
        search.zero_grad()
        margins = beta * (log_density(policy(), pairs) - ref).sum(-1)
        margin = margins[:, 0] - margins[:, 1]
        loss = -(preferred * F.logsigmoid(margin) + (1 - preferred) * F.logsigmoid(-margin)).mean()
        loss.backward()
        return loss

    search.step(step)
    with torch.no_grad():
        return policy()


def distance(one: Chain, other: Chain) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("D", "T"), [(1, 4), (2, 2)])
def test_dpo_on_sampled_chains_finds_the_optimum(D, T):
    """Means, variances and prior learned: pi*. With a fixed prior where both of a pair share x_T. Where they do not,
    their margin holds V*(x_T), which no step can explain."""
    _, chain, reward, beta = some_chain(T, D=D)
    _, policy = solve_chain(chain, reward, beta)
    x = from_nothing(chain, 600, 1)
    assert distance(learn(chain, reward, beta, x.unflatten(0, (300, 2))), policy) < 1e-5
    fixed = Chain(*(torch.cat((a[:1], b[1:])) for a, b in zip(chain, policy, strict=True)))
    again = draw(Chain(*(t[1:] for t in chain)), x[:, 0], seeded(2))
    shared = torch.stack((x, torch.cat((x[:, :1], again), 1)), 1)
    assert distance(learn(chain, reward, beta, shared, prior=False), fixed) < 1e-5
    if D == 1:
        chain = denoiser(gaussian(tensor([0.3]), tensor([[1.0]])), tensor([0.1] * 4))  # x_T knows much of x_0
        _, policy = solve_chain(chain, reward, beta)
        x = from_nothing(chain, 4000, 1).unflatten(0, (2000, 2))
        fixed = Chain(*(torch.cat((a[:1], b[1:])) for a, b in zip(chain, policy, strict=True)))
        assert distance(learn(chain, reward, beta, x, prior=False), fixed) > 0.05


def test_without_variances_dpo_misses_the_best_means():
    """No mean-only policy explains the preferences, and DPO's choice is not the one that reward less KL would choose
    (pi*'s means): it loses more, though by O(1/T^2) only."""
    missed = {}
    for T in (2, 4, 8):
        _, chain, reward, beta = some_chain(T)
        values, _ = solve_chain(chain, reward, beta)
        found = learn(chain, reward, beta, from_nothing(chain, 4000, 1).unflatten(0, (2000, 2)), variances=False)
        assert torch.allclose(found.S, chain.S, atol=1e-12)
        gained = reward.mean(*marginals(found)[-1]) - credit(chain, found, beta).sum()
        missed[T] = (values[0].c - variance_cost(chain, values, beta).sum() - gained).item()
    assert missed[2] > 4 * missed[4] * 0.7 and missed[4] > 4 * missed[8] * 0.7 and missed[8] > 1e-4, missed


def test_gaussians_that_are_none_are_refused():
    data, chain, reward, beta = some_chain(2, D=2)
    for noise in ([0.5, 0.0], [1.5], [math.nan]):
        with pytest.raises(ValueError, match="noise must be above 0 and at most 1"):
            denoiser(data, tensor(noise))
    with pytest.raises(ValueError, match="the covariance of the data is not positive definite"):
        denoiser(gaussian(tensor([0.0, 0.0]), tensor([[1.0, 2.0], [2.0, 1.0]])), tensor([0.5]))
    with pytest.raises(ValueError, match="covariance is not positive definite at step 1"):
        log_density(chain._replace(S=chain.S * tensor([1.0, -1.0, -1.0])[:, None, None]), torch.zeros(3, 2).double())
    for odd in (math.nan, math.inf):
        broken = chain.S.clone()
        broken[2, 0, 1] = odd  # where the factorisation does not look
        with pytest.raises(ValueError, match="covariance is not positive definite at step 2"):
            log_density(chain._replace(S=broken), torch.zeros(3, 2).double())
    with pytest.raises(ValueError, match=r"I \+ S P / beta, at step 2, is not positive definite"):
        solve_chain(chain, reward._replace(P=-4 * torch.eye(2).double()), beta)
    with pytest.raises(ValueError, match="the covariance of step 0 is not positive definite"):
        solve_chain(
            gaussian(tensor([0.0]), tensor([[math.nan]])),
            Quadratic(*(t[:1] for t in (tensor([[1.0]]), tensor([1.0]))), tensor(0.0)),
            1.0,
        )
    for bad in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="beta must be positive"):
            solve_chain(chain, reward, bad)
