"""Random MDPs, and what is true of them: the cases on which the identities are checked."""

from collections.abc import Iterator

import torch

from minqstar.theory.identities import Claim
from minqstar.theory.mdp import Responses, TokenMDP, responses, solve, tree


def random_mdp(generator: torch.Generator) -> TokenMDP:
    """A tree or an automaton with random logits up to some 30, some actions without mass, EOS at any depth."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    if uniform(0, 1) < 0.5:
        token, next = tree(int(uniform(1, 4)), int(uniform(0, 4)))
    else:
        S, A = int(uniform(1, 9)), int(uniform(1, 5))
        token = torch.arange(A).repeat(S, 1)
        steps = torch.rand(S, A, generator=generator, dtype=torch.float64)
        next = torch.arange(1, S + 1)[:, None] + (steps * (S - torch.arange(S))[:, None]).long()
    logits = torch.randn(token.shape, generator=generator, dtype=torch.float64) * uniform(0, 10)
    absent = (token < 0) | (torch.rand(token.shape, generator=generator) < uniform(-0.3, 0.3))
    absent &= token != token.amax(-1, keepdim=True)  # at least one action has mass
    reward = torch.randn(token.shape, generator=generator, dtype=torch.float64) * uniform(0, 5)
    return TokenMDP(token, next, logits.masked_fill(absent, -torch.inf).log_softmax(-1), reward)


def true_claim(mdp: TokenMDP, beta: float, generator: torch.Generator) -> Claim:
    """What is so of an MDP."""
    paths = responses(mdp)
    kept = paths.along(mdp.log_ref).sum(-1) > -torch.inf
    paths = Responses(*(t[kept] for t in paths))
    phi = torch.randn(mdp.num_states + 1, generator=generator, dtype=torch.float64) * 3
    phi[-1] = 0.0
    base = torch.randn(mdp.log_ref.shape, generator=generator, dtype=torch.float64)
    base = base.masked_fill(mdp.log_ref == -torch.inf, -torch.inf).log_softmax(-1)
    alpha = 2 * torch.rand((), generator=generator).item()
    return Claim(mdp, beta, solve(mdp, beta), mdp.log_ref, paths, paths.scored.double(), phi, base, alpha)


def random_claims(count: int, seed: int) -> Iterator[Claim]:
    """True claims of random MDPs, beta log-uniform in [1e-2, 1e2]."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        beta = 10 ** (4 * torch.rand((), generator=generator, dtype=torch.float64).item() - 2)
        yield true_claim(random_mdp(generator), beta, generator)
