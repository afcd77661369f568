"""Random MDPs of every kind, and what is so of them: the true claims that the checker checks."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Generator, Tensor

from minqstar.theory.claims import Claim
from minqstar.theory.denoising import denoising_chain
from minqstar.theory.mdp import TokenMDP, by_state, luck, solve, tree
from minqstar.theory.parts import ends, then
from minqstar.theory.paths import Responses, responses, segment


def uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_mdp(generator: Generator) -> TokenMDP:
    """A tree or an automaton with random logits up to some 30, some actions without mass, EOS at any depth."""
    if uniform(generator, 0, 1) < 0.5:
        token, next = tree(int(uniform(generator, 1, 4)), int(uniform(generator, 0, 4)))
    else:
        S, A = int(uniform(generator, 1, 9)), int(uniform(generator, 1, 5))
        token = torch.arange(A).repeat(S, 1)
        steps = torch.rand(S, A, generator=generator, dtype=torch.float64)
        next = torch.arange(1, S + 1)[:, None] + (steps * (S - torch.arange(S))[:, None]).long()
    logits = normal(generator, *token.shape) * uniform(generator, 0, 10)
    absent = (token < 0) | (torch.rand(token.shape, generator=generator) < uniform(generator, -0.3, 0.3))
    absent &= token != token.amax(-1, keepdim=True)  # at least one action has mass
    reward = normal(generator, *token.shape) * uniform(generator, 0, 5)
    return TokenMDP(token, next, logits.masked_fill(absent, -torch.inf).log_softmax(-1), reward)


def random_beta(generator: Generator) -> float:
    """Log-uniform in [1e-2, 1e2]."""
    return 10 ** uniform(generator, -2, 2)


def random_law(real: Tensor, generator: Generator) -> Tensor:
    """A random log-distribution (..., A) over the real actions, nats."""
    logits = normal(generator, *real.shape) * uniform(generator, 0, 5)
    return logits.masked_fill(~real, -torch.inf).log_softmax(-1)


def random_parts(generator: Generator) -> tuple[TokenMDP, list[TokenMDP]]:
    """A refiner, and a generator for each of its ends: they have one tree and one reward, but a pi_ref each."""

    def strings(horizon: int) -> TokenMDP:
        token, next = tree(int(uniform(generator, 1, 3)), horizon)
        reward = normal(generator, *token.shape) * uniform(generator, 0, 5)
        return TokenMDP(token, next, random_law(token >= 0, generator), reward)

    first, second = strings(1), strings(int(uniform(generator, 0, 3)))
    first = replace(first, reward=torch.zeros_like(first.reward))  # what counts is the answer
    return first, [replace(second, log_ref=random_law(second.token >= 0, generator)) for _ in ends(first)[0]]


def parts_betas(mdp: TokenMDP, first: TokenMDP, betas: tuple[float, float]) -> Tensor:
    """The temperatures (S,) of a table of two parts: the first one's in its states, then the other."""
    gamma, beta = torch.tensor(betas, dtype=torch.float64)
    return torch.where(torch.arange(mdp.num_states) < first.num_states, gamma, beta)


def random_denoising(generator: Generator) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Data, noise, reward and kind of noise of a chain over two or three values, of at most three steps."""
    X, T = int(uniform(generator, 2, 4)), int(uniform(generator, 1, 4))
    data = random_law(torch.ones(X, dtype=torch.bool), generator)
    noise = torch.rand(T, generator=generator, dtype=torch.float64)
    return data, noise, normal(generator, X) * uniform(generator, 0, 5), uniform(generator, 0, 1) < 0.5


def two_parts(generator: Generator) -> tuple[TokenMDP, Tensor]:
    first, seconds = random_parts(generator)
    mdp = then(first, seconds)
    return mdp, parts_betas(mdp, first, (random_beta(generator), random_beta(generator)))


def each_its_own(generator: Generator, mdp: TokenMDP) -> tuple[TokenMDP, Tensor]:
    return mdp, torch.tensor([random_beta(generator) for _ in range(mdp.num_states)], dtype=torch.float64)


def with_chance(generator: Generator) -> tuple[TokenMDP, Tensor]:
    mdp = random_mdp(generator)
    return each_its_own(generator, replace(mdp, chance=torch.rand(mdp.num_states, generator=generator) < 0.4))


def without_reference(mdp: TokenMDP) -> TokenMDP:
    """log pi_ref = 0 on its support, where the policy chooses: what beta costs is the negative entropy."""
    free = torch.where(mdp.support, 0.0, -torch.inf).double()
    return replace(mdp, log_ref=torch.where(mdp.own[:, None], free, mdp.log_ref))


KINDS: dict[str, Callable[[Generator], tuple[TokenMDP, float | Tensor]]] = {
    "one temperature": lambda g: (random_mdp(g), random_beta(g)),
    "a temperature for each state": lambda g: each_its_own(g, random_mdp(g)),
    "chance states": with_chance,
    "no reference": lambda g: (without_reference(with_chance(g)[0]), random_beta(g)),
    "refiner and generator": two_parts,
    "denoising chain": lambda g: (denoising_chain(*random_denoising(g)), random_beta(g)),
}


def true_claim(mdp: TokenMDP, beta: float | Tensor, generator: Generator) -> Claim:
    """What is so of an MDP."""
    paths, solution = responses(mdp), solve(mdp, beta)
    kept = paths.along(mdp.log_ref).sum(-1) > -torch.inf
    paths = Responses(*(t[kept] for t in paths))
    fortune, V = luck(mdp, solution), solution.V
    lengths = paths.scored.sum(-1)
    start = (torch.rand(lengths.shape, generator=generator) * lengths).long()
    stop = start + 1 + (torch.rand(lengths.shape, generator=generator) * (lengths - start)).long()
    pieces, R = segment(mdp, paths, start, stop), torch.arange(len(lengths))
    begin, end = paths.states[R, start], mdp.next[paths.states[R, stop - 1], paths.actions[R, stop - 1]]
    labels = pieces.along(mdp.reward - fortune).sum(-1) + V[end] - V[begin]
    phi = normal(generator, mdp.num_states + 1) * 3
    phi[-1] = 0.0
    base = normal(generator, *mdp.log_ref.shape).masked_fill(~mdp.support, -torch.inf).log_softmax(-1)
    base = torch.where(mdp.own[:, None], base, mdp.log_ref)
    return Claim(
        mdp=mdp,
        beta=by_state(mdp, beta),
        solution=solution,
        log_ref=mdp.log_ref,
        luck=fortune,
        paths=paths,
        weights=paths.scored.double(),
        pieces=pieces,
        labels=labels,
        rejected_weight=1.0,
        phi=phi,
        base=base,
        alpha=uniform(generator, 0, 2),
    )


def random_claims(count: int, seed: int, kinds: list[str] | None = None) -> Iterator[Claim]:
    """True claims: `count` random MDPs of each kind."""
    for kind in kinds or KINDS:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield true_claim(*KINDS[kind](generator), generator)
