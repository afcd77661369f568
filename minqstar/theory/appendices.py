"""Claims of the paper's appendices: a refiner with its generator (D), and diffusion, of values and of Gaussians (B).

Each kind of claim has its own identities and faults; a `Family` holds them together for the checker.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from minqstar.theory.cases import normal, parts_betas, random_beta, random_denoising, random_parts, uniform
from minqstar.theory.claims import Family, gap
from minqstar.theory.denoising import denoising_chain
from minqstar.theory.diffusion import (
    Chain,
    Quadratic,
    credit,
    denoiser,
    draw,
    gaussian,
    log_density,
    marginals,
    solve_chain,
    variance_cost,
)
from minqstar.theory.mdp import Solution, TokenMDP, solve
from minqstar.theory.parts import ends, same_answer, then, unseen_thought
from minqstar.theory.paths import bandit, responses


class Parts(NamedTuple):
    """What is said of a refiner and its generators, which have one tree and one reward, but a pi_ref each."""

    first: TokenMDP
    seconds: list[TokenMDP]
    betas: tuple[float, float]  # gamma and beta
    mdp: TokenMDP  # the first, then the seconds
    both: Solution  # with a temperature for each
    unseen: Solution  # with beta for both


def draw_parts(generator: Generator) -> Parts:
    (first, seconds), betas = random_parts(generator), (random_beta(generator), random_beta(generator))
    mdp = then(first, seconds)
    return Parts(first, seconds, betas, mdp, solve(mdp, parts_betas(mdp, first, betas)), solve(mdp, betas[1]))


def refiner_and_generator(c: Parts) -> float:
    """Eq. 17, 18: to the refiner a z is worth the generator's soft value, and its choice is a bandit's.

    Neither part alone, with the other left as pi_ref, gets more than both together.
    """
    (gamma, beta), V, z = c.betas, c.both.V, responses(c.first)
    worth = torch.stack([solve(second, beta).V[0] for second in c.seconds])
    reward = c.first.reward.index_put(ends(c.first), worth, accumulate=True)
    log_pi, log_Z = bandit(replace(c.first, reward=reward), z, gamma)
    of_z = z.along(c.both.log_pi[: c.first.num_states, : c.first.token.shape[1]]).sum(-1)
    is_first = torch.arange(c.mdp.num_states) < c.first.num_states
    of_each = parts_betas(c.mdp, c.first, c.betas)
    alone = [solve(replace(c.mdp, chance=frozen), of_each).V[0] for frozen in (is_first, ~is_first)]
    scale = (worth, gamma * log_Z, V)
    return max(
        gap(V[c.mdp.next[ends(c.first)]], worth, *scale),
        gap(V[0], gamma * log_Z, *scale),
        gap(of_z, log_pi, *(t / gamma for t in scale)),
        gap(torch.stack([V[0], *alone]).amax(), V[0], *scale),
    )


def unseen_z(c: Parts) -> float:
    """z unobserved, one temperature: beta log(sum_z pi*(z, y) / sum_z pi_ref(z, y)) = R(y) - V*(s_0)."""
    paths, beta = responses(c.mdp), c.betas[1]
    pi, ref = (paths.along(torch.where(c.mdp.support, t, 0.0)).sum(-1) for t in (c.unseen.log_pi, c.mdp.log_ref))
    gives = same_answer(c.mdp, paths, c.first.num_states)
    R = paths.along(c.mdp.reward).sum(-1)[gives.int().argmax(-1)]  # of one response that gives the answer
    return gap(unseen_thought(pi - ref, ref, gives, beta), R - c.unseen.V[0], c.unseen.V, R, beta * ref)


class Noised(NamedTuple):
    """What is said of a chain that denoises a few values."""

    data: Tensor
    noise: Tensor
    reward: Tensor
    absorbing: bool
    beta: float
    solution: Solution

    def chain(self, data: Tensor) -> TokenMDP:
        return denoising_chain(data, self.noise, self.reward, self.absorbing)


def draw_noised(generator: Generator) -> Noised:
    chain, beta = random_denoising(generator), random_beta(generator)
    return Noised(*chain, beta, solve(denoising_chain(*chain), beta))


def noised_optimum(c: Noised) -> float:
    """pi* is the exact reverse of the same noise on the data p_0 exp(r/beta) / Z; all values occur at all times."""
    on, tilted = c.chain(c.data).support, c.chain((c.data + c.reward / c.beta).log_softmax(-1))
    return gap(c.solution.log_pi[on], tilted.log_ref[on], c.reward / c.beta)


class Gaussian(NamedTuple):
    """What is said of a chain that denoises Gaussian data under a quadratic reward."""

    data: Chain
    noise: Tensor
    reward: Quadratic
    beta: float
    chain: Chain  # pi_ref
    values: list[Quadratic]
    policy: Chain
    drawn: Tensor  # (N, T+1, D): chains of pi_ref

    def ratios(self) -> Tensor:
        """beta log(pi*/pi_ref) (N, T+1) of the drawn chains' steps, reward units."""
        return self.beta * (log_density(self.policy, self.drawn) - log_density(self.chain, self.drawn))


def draw_gaussian(generator: Generator) -> Gaussian:
    """One to three dimensions, at most eight steps; a reward that may be unbounded, but E exp(r/beta) is not."""
    D, T, beta = int(uniform(generator, 1, 4)), int(uniform(generator, 1, 9)), random_beta(generator)
    root, turn = normal(generator, D, D), torch.linalg.qr(normal(generator, D, D))[0]
    S = root @ root.T / D + 0.1 * torch.eye(D, dtype=torch.float64)
    L = torch.linalg.cholesky(S)
    bend = torch.rand(D, generator=generator, dtype=torch.float64) * 5 - 0.9  # I + bend is positive definite
    half = torch.linalg.solve(L.T, turn)
    P = beta * half @ bend.diag() @ half.T
    reward = Quadratic(P, normal(generator, D) * uniform(generator, 0, 5), normal(generator, 1)[0])
    noise = torch.rand(T, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    data = gaussian(normal(generator, D), S)
    chain = denoiser(data, noise)
    drawn = draw(chain, torch.zeros(100, D, dtype=torch.float64), generator)
    return Gaussian(data, noise, reward, beta, chain, *solve_chain(chain, reward, beta), drawn)


def gaussian_values(c: Gaussian) -> float:
    """V*(s_0) = beta log E exp(V*(x_T)/beta) over pi_ref's x_T = beta log E exp(r/beta) over the data."""
    prior = gaussian(c.chain.d[0], c.chain.S[0])
    (of_prior, _), _ = solve_chain(prior, c.values[1], c.beta)
    (of_data, _), _ = solve_chain(c.data, c.reward, c.beta)
    V0, scale = c.values[0].c, (c.reward.at(c.drawn[:, -1]), *c.reward)
    return max(gap(V0, of_prior.c, *scale), gap(V0, of_data.c, *scale))


def gaussian_ratios(c: Gaussian) -> float:
    """Eq. 10: beta log(pi*/pi_ref)(x_{t-1} | x_t) = V*(x_{t-1}) - V*(x_t), and r(x_0) = V*(s_0) + their sum."""
    ratios, r = c.ratios(), c.reward.at(c.drawn[:, -1])
    after = [value.at(x) for value, x in zip(c.values[1:], c.drawn.unbind(1), strict=True)]
    V = torch.stack([c.values[0].c.expand(len(r)), *after], 1)
    scale = (V, c.beta * log_density(c.chain, c.drawn), c.beta * log_density(c.policy, c.drawn))
    return max(gap(ratios, V.diff(), *scale), gap(r, V[:, 0] + ratios.sum(-1), *scale))


def gaussian_optimum(c: Gaussian) -> float:
    """pi* is the exact reverse of the same noise on the data p_0 exp(r/beta) / Z."""
    tilted = solve_chain(c.data, c.reward, c.beta)[1]
    return max(gap(*both, c.reward.q / c.beta) for both in zip(c.policy, denoiser(tilted, c.noise), strict=True))


def gaussian_credit(c: Gaussian) -> float:
    """What each step is owed is what its noise wipes out, beta (KL(p*_{t-1} || p_{t-1}) - KL(p*_t || p_t)).

    All of it is what pi* gets above the value: E r(x_0) - V*(s_0).
    """
    owed, (m, C) = credit(c.chain, c.policy, c.beta), marginals(c.policy)[-1]
    both = zip(marginals(c.chain), marginals(c.policy), strict=True)
    kl = torch.stack([credit(gaussian(*p), gaussian(*optimal), c.beta)[0] for p, optimal in both])
    falls = torch.cat((kl[:1], kl.diff()))
    scale = (kl, c.values[0].c, c.reward.q @ m, (c.reward.P * C).sum())
    return max(gap(owed, falls, *scale), gap(owed.sum(), c.reward.mean(m, C) - c.values[0].c, *scale))


def gaussian_variances(c: Gaussian) -> float:
    """pi*'s means with pi_ref's variances get E r - beta KL = V*(s_0) - the price of fixed variances."""
    fixed = c.policy._replace(S=c.chain.S)
    m, C = marginals(fixed)[-1]
    kl, price = credit(c.chain, fixed, c.beta), variance_cost(c.chain, c.values, c.beta)
    scale = (kl, price, c.values[0].c, c.reward.q @ m, (c.reward.P * C).sum())
    return gap(c.reward.mean(m, C) - kl.sum(), c.values[0].c - price.sum(), *scale)


def fixed_prior(c: Noised) -> Solution:
    """The solution where x_T is not the policy's to choose."""
    chain = c.chain(c.data)
    return solve(replace(chain, chance=torch.arange(chain.num_states) == 0), c.beta)


def with_prior_of(chain: Chain, policy: Chain) -> Chain:
    """The policy, but for its first step, which is the chain's."""
    return Chain(*(torch.cat((a[:1], b[1:])) for a, b in zip(chain, policy, strict=True)))


PARTS = Family(
    draw_parts,
    {"refiner, generator": ("17, 18", refiner_and_generator), "z unobserved": ("App. D", unseen_z)},
    {
        "wrong temperature of the generator": lambda c: c._replace(betas=(c.betas[0], 1.05 * c.betas[1])),
        "z unobserved, two temperatures": lambda c: c._replace(unseen=c.both),
    },
)
NOISED = Family(
    draw_noised,
    {"noised optimum": ("App. B", noised_optimum)},
    {"prior left out": lambda c: c._replace(solution=fixed_prior(c))},
)
GAUSSIANS = Family(
    draw_gaussian,
    {
        "Gaussians: values": ("App. B", gaussian_values),
        "Gaussians: log-ratios": ("10", gaussian_ratios),
        "Gaussians: noised optimum": ("App. B", gaussian_optimum),
        "Gaussians: credit": ("sum of 10", gaussian_credit),
        "Gaussians: variances": ("2, 3", gaussian_variances),
    },
    {
        "Gaussians: prior left out": lambda c: c._replace(policy=with_prior_of(c.chain, c.policy)),
        "Gaussians: variances of pi_ref": lambda c: c._replace(policy=c.policy._replace(S=c.chain.S)),
        "Gaussians: wrong beta": lambda c: c._replace(beta=1.05 * c.beta),
    },
)
