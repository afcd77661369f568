"""What is claimed of an MDP, and how claims are checked: `minqstar.theory.identities` says what must hold of them.

A claim is a solution, a reference, responses and what their tokens count, said to belong to an MDP. An identity is a
function from a claim to its residual. True claims (`minqstar.theory.cases` draws them at random) and claims with a
planted fault (`minqstar.theory.faults`) go through the same identities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minqstar.errors import first_line
from minqstar.theory.mdp import Solution, TokenMDP, where
from minqstar.theory.paths import Responses
from minqstar.theory.qfunction import per_action

TOLERANCE = 1e-9  # of the theory: float64, relative to the largest term


class Result(NamedTuple):
    """An identity's worst residual over some cases."""

    id: str
    equation: str
    cases: int
    residual: float
    tolerance: float
    note: str = ""  # why it could not be computed, and where

    @property
    def passed(self) -> bool:
        return self.residual <= self.tolerance  # a NaN fails


@dataclass(frozen=True)
class Claim:
    """What is said of an MDP; `mdp` and `beta` are the truth that it is held to."""

    mdp: TokenMDP
    beta: Tensor  # (S,) reward units a nat: one for each state, all equal where there is but one
    solution: Solution
    log_ref: Tensor  # (S, A) nats: the reference that implicit rewards are taken against
    luck: Tensor  # (S, A) reward units: what the environment's tokens bring above their expectation
    paths: Responses  # all responses on the support of pi_ref
    weights: Tensor  # (R, L): what each token counts in a response's sums; 1, EOS included
    pieces: Responses  # a piece of each response
    labels: Tensor  # (R,) reward units: what is said of each piece, minus its regret
    rejected_weight: float  # what a rejected piece counts in the loss; 1
    phi: Tensor  # (S+1,) reward units: a shaping potential, 0 at the end
    base: Tensor  # (S, A) nats: another policy on pi_ref's support
    alpha: float  # of proxy tuning

    @property
    def support(self) -> Tensor:
        return self.mdp.support

    @property
    def chosen(self) -> Tensor:
        """(S, A) bool: the support where the policy chooses."""
        return self.support & self.mdp.own[:, None]

    @property
    def implicit(self) -> Tensor:
        """beta log(pi/pi_ref), (S, A), reward units; 0 off the support. ValueError if the policy has mass there."""
        outside = ~self.support & (self.solution.log_pi > -torch.inf)
        if outside.any():
            raise ValueError(f"the policy has mass where the reference has none, at {where(outside)}")
        return self.scaled(torch.where(self.support, self.solution.log_pi - self.log_ref, 0.0))

    @property
    def advantage(self) -> Tensor:
        """r(s,a) + V(s') - V(s) without luck, (S, A), reward units; 0 off the support."""
        V = self.solution.V
        return torch.where(self.support, self.mdp.reward + V[self.mdp.next] - V[:-1, None] - self.luck, 0.0)

    def scaled(self, table: Tensor) -> Tensor:
        """beta times a table (S, A)."""
        return per_action(self.beta) * table

    def stepwise(self, log_probs: Tensor) -> Tensor:
        """r + beta log-probability (S, A), of which the latter only where the policy chooses; 0 off the support."""
        own = torch.where(self.chosen, self.scaled(log_probs), 0.0)
        return torch.where(self.support, self.mdp.reward + own, 0.0)

    def sums(self, table: Tensor) -> Tensor:
        """Sums (R,) of a table (S, A) over the tokens of each response, as the claim counts them."""
        return (self.paths.along(torch.where(self.support, table, 0.0)) * self.weights).sum(-1)

    def returns(self) -> Tensor:
        """The true returns (R,): every token counts once."""
        return self.paths.along(self.mdp.reward).sum(-1)

    def earned(self) -> Tensor:
        """The returns (R,) without the environment's luck: what the policy's choices are worth."""
        return self.returns() - self.paths.along(self.luck).sum(-1)


def gap(left: Tensor, right: Tensor, *terms: Tensor) -> float:
    """max |left - right| over max(1, largest |term|), the two sides and others; NaN if there is one."""
    terms = torch.cat([t.flatten() for t in (left, right, *terms)]).abs()
    largest = terms.masked_fill(~terms.isfinite(), 0.0).amax().item()
    difference = torch.where(left == right, 0.0, (left - right).abs())
    return difference.amax().item() / max(1.0, largest)


Identities = dict[str, tuple[str, Callable[[Any], float]]]  # by name: where it stands in the paper, and its residual


def residual_of(identity: Callable[[Any], float], claim: Any) -> tuple[float, str]:
    """Its residual; NaN, which fails, and the reason where the claim cannot even be computed with."""
    try:
        return identity(claim), ""
    except (FloatingPointError, ValueError) as e:
        return float("nan"), first_line(e)


def check_claims(claims: list, identities: Identities) -> list[Result]:
    """Every identity on every claim: the worst residuals."""
    results = []
    for id, (equation, identity) in identities.items():
        residuals, notes = zip(*(residual_of(identity, claim) for claim in claims), strict=True)
        worst = torch.tensor(residuals, dtype=torch.float64).amax().item()
        results.append(Result(id, equation, len(claims), worst, TOLERANCE, next(filter(None, notes), "")))
    return results


class Family(NamedTuple):
    """Claims of one shape: how a true one is drawn, what must hold of it, and faults that must not pass."""

    draw: Callable[[torch.Generator], Any]
    identities: Identities
    faults: dict[str, Callable[[Any], Any]]
