"""The check of the theory: on true claims, and on claims with a fault, or a pass of it would mean nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minqstar.theory.appendices import GAUSSIANS, NOISED, PARTS
from minqstar.theory.cases import normal, random_claims, random_law, true_claim
from minqstar.theory.claims import Claim, Result, check_claims
from minqstar.theory.identities import IDENTITIES
from minqstar.theory.mdp import TokenMDP, hard_max, solve, tree


def _last(c: Claim) -> Tensor:
    """(R, L) bool: each response's EOS."""
    lengths = c.paths.scored.sum(-1, keepdim=True)
    return torch.arange(c.weights.shape[1]) == lengths - 1


def _truncated(c: Claim) -> Claim:
    """The longest responses end before their last token, and the state that they stop in is given V = 0."""
    long = c.paths.scored.sum(-1) == c.paths.scored.sum(-1).amax()
    cut = long[:, None] & _last(c)
    V = c.solution.V.clone()
    V[c.paths.states[cut]] = 0.0
    return _values(replace(c, weights=c.weights * ~cut), V=V)


def _moved(c: Claim) -> Tensor:
    """A reference that has followed the policy a little way."""
    return (0.95 * c.log_ref + 0.05 * c.solution.log_pi).log_softmax(-1)


def _values(c: Claim, **changed: Tensor) -> Claim:
    """The claim with another V, Q or log_pi."""
    return replace(c, solution=c.solution._replace(**changed))


def _without(mdp: TokenMDP) -> TokenMDP:
    """The same MDP with a reference that never takes the first action of state 0."""
    log_ref = mdp.log_ref.clone()
    log_ref[0, 0] = -torch.inf
    return replace(mdp, log_ref=log_ref.log_softmax(-1))


def _scored(c: Claim) -> Tensor:
    """The environment's tokens count with the log-probabilities that a policy would give them."""
    free = solve(replace(c.mdp, chance=None), c.beta)
    return torch.where(c.mdp.own[:, None], c.solution.log_pi, free.log_pi)


def _first_warmer(c: Claim) -> Claim:
    """The first state's temperature is wrong, of a system of parts the first part's."""
    return replace(c, beta=torch.where(torch.arange(len(c.beta)) == 0, 1.05 * c.beta, c.beta))


FAULTS: dict[str, Callable[[Claim], Claim]] = {
    "mask off by one": lambda c: replace(c, weights=c.weights * (torch.arange(c.weights.shape[1]) > 0)),
    "dropped EOS": lambda c: replace(c, weights=c.weights * ~_last(c)),
    "truncated taken for terminal": _truncated,
    "mean in place of sum": lambda c: replace(c, weights=c.weights / c.weights.sum(-1, keepdim=True)),
    "wrong beta": lambda c: replace(c, beta=1.05 * c.beta),
    "bf16 reference": lambda c: replace(c, log_ref=c.log_ref.bfloat16().double()),
    "reference moves with the policy": lambda c: replace(c, log_ref=_moved(c)),
    "V(terminal) is not 0": lambda c: _values(c, V=F.pad(c.solution.V[:-1], (0, 1), value=0.1)),
    "a constant on V and Q, terminal too": lambda c: _values(c, V=c.solution.V + 0.1, Q=c.solution.Q + 0.1),
    "hard maximum for soft": lambda c: _values(c, V=hard_max(c.mdp)[0]),
    "tokens shifted by one": lambda c: _values(c, log_pi=c.solution.log_pi.roll(1, -1)),
    "mass off the reference's support": lambda c: replace(c, mdp=_without(c.mdp), log_ref=_without(c.mdp).log_ref),
    "wrong temperature of one part": _first_warmer,
    "environment's tokens scored": lambda c: _values(c, log_pi=_scored(c)),
    "luck ignored": lambda c: replace(c, luck=torch.zeros_like(c.luck)),
    "segment taken for complete": lambda c: replace(c, labels=c.pieces.along(c.mdp.reward - c.luck).sum(-1)),
    "rejected counts half (lambda < 1)": lambda c: replace(c, rejected_weight=0.5),
    "NaN in Q": lambda c: _values(c, Q=c.solution.Q * float("nan")),
}


def fault_claim() -> Claim:
    """A claim on which every fault makes a difference: two tokens to depth three, the environment's turn in between."""
    generator = torch.Generator().manual_seed(0)
    token, next = tree(2, 3)
    law, reward = random_law(token >= 0, generator), normal(generator, *token.shape)
    return true_claim(TokenMDP(token, next, law, reward, torch.arange(len(token)) == 1), 0.5, generator)


def check_theory(cases: int, seed: int) -> list[Result]:
    """Every identity on random cases: as many MDPs of each kind, and as many claims of each of the appendices'."""
    results = check_claims(list(random_claims(cases, seed)), IDENTITIES)
    for family in (PARTS, NOISED, GAUSSIANS):
        generator = torch.Generator().manual_seed(seed)
        results += check_claims([family.draw(generator) for _ in range(cases)], family.identities)
    return results


class Fault(NamedTuple):
    """A planted fault and the identities that flagged it."""

    name: str
    flagged_by: list[str]


def check_faults() -> list[Fault]:
    """Plant each fault in a true claim and run the same check."""
    families = [(f.draw(torch.Generator().manual_seed(0)), f.identities, f.faults) for f in (PARTS, NOISED, GAUSSIANS)]
    return [
        Fault(name, [result.id for result in check_claims([plant(sound)], identities) if not result.passed])
        for sound, identities, faults in [(fault_claim(), IDENTITIES, FAULTS), *families]
        for name, plant in faults.items()
    ]
