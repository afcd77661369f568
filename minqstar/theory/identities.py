"""The paper's identities on exact MDPs, each a function from a *claim* to its residual, and faults planted in claims.

A claim is a solution, a reference, responses and what their tokens count, said to belong to an MDP. The checker runs
the same identities on true claims and on claims with a fault: `minqstar.theory.faults` plants those, and
`minqstar.bellman` is the command.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minqstar.errors import first_line
from minqstar.theory.losses import dpo_loss
from minqstar.theory.mdp import (
    Responses,
    Solution,
    TokenMDP,
    bandit,
    implicit_rewards,
    rewards_of,
    shape,
    solve,
    visits,
    where,
)
from minqstar.theory.qfunction import expected_implicit_reward, log_policy, soft_value

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
    beta: float
    solution: Solution
    log_ref: Tensor  # (S, A) nats: the reference that implicit rewards are taken against
    paths: Responses  # all responses on the support of pi_ref
    weights: Tensor  # (R, L): what each token counts in a response's sums; 1, EOS included
    phi: Tensor  # (S+1,) reward units: a shaping potential, 0 at the end
    base: Tensor  # (S, A) nats: another policy on pi_ref's support
    alpha: float  # of proxy tuning

    @property
    def support(self) -> Tensor:
        return self.mdp.log_ref > -torch.inf

    @property
    def implicit(self) -> Tensor:
        """beta log(pi/pi_ref), (S, A), reward units; 0 off the support. ValueError if the policy has mass there."""
        outside = ~self.support & (self.solution.log_pi > -torch.inf)
        if outside.any():
            raise ValueError(f"the policy has mass where the reference has none, at {where(outside)}")
        return torch.where(self.support, self.beta * (self.solution.log_pi - self.log_ref), 0.0)

    @property
    def advantage(self) -> Tensor:
        """r(s,a) + V(s') - V(s), (S, A), reward units; 0 off the support."""
        V = self.solution.V
        return torch.where(self.support, self.mdp.reward + V[self.mdp.next] - V[:-1, None], 0.0)

    def sums(self, table: Tensor) -> Tensor:
        """Sums (R,) of a table (S, A) over the tokens of each response, as the claim counts them."""
        return (self.paths.along(torch.where(self.support, table, 0.0)) * self.weights).sum(-1)

    def returns(self) -> Tensor:
        """The true returns (R,): every token counts once."""
        return self.paths.along(self.mdp.reward).sum(-1)


def gap(left: Tensor, right: Tensor, *terms: Tensor) -> float:
    """max |left - right| over max(1, largest |term|), the two sides and others; NaN if there is one."""
    largest = [t[t.isfinite()].abs().amax().item() for t in (left, right, *terms) if t.isfinite().any()]
    difference = torch.where(left == right, 0.0, (left - right).abs())
    return difference.amax().item() / max([1.0, *largest])


def bradley_terry(c: Claim) -> float:
    """Eq. 1: the odds of a preference are the difference of the two sums of rewards."""
    claimed, true = c.sums(c.mdp.reward), c.returns()
    return gap(claimed.diff(), true.diff(), true) if len(true) > 1 else gap(claimed, true)


def kl_objective(c: Claim) -> float:
    """Eq. 2, 3: E_pi*[sum of r + beta log pi_ref - beta log pi*] = V*(s_0), and no other policy gets more."""

    def objective(log_pi: Tensor) -> Tensor:
        inside = torch.where(c.support, c.mdp.reward + c.beta * (c.log_ref - log_pi), 0.0)
        return (visits(c.mdp, log_pi) * inside).sum()

    best, other, V0 = objective(c.solution.log_pi), objective(c.base), c.solution.V[0]
    return max(gap(best, V0, other), gap(torch.maximum(other, V0), V0, other))


def policy_of_q(c: Claim) -> float:
    """Eq. 5: log pi* = (Q* - V*) / beta, and it sums to one."""
    V, Q, log_pi = c.solution
    on, scale = c.support, Q[c.support] / c.beta
    total = torch.logsumexp(log_pi, -1)
    by_q, by_both = log_policy(Q, c.beta)[on], ((Q - V[:-1, None]) / c.beta)[on]
    return max(gap(log_pi[on], by_q, scale), gap(log_pi[on], by_both, scale), gap(total, 0 * total))


def value_of_q(c: Claim) -> float:
    """Eq. 6: V* = beta logsumexp(Q* / beta)."""
    return gap(c.solution.V[:-1], soft_value(c.solution.Q, c.beta), c.solution.Q[c.support])


def bellman(c: Claim) -> float:
    """Eq. 7: Q* = r + beta log pi_ref + V*(s'), and V*(terminal) = 0."""
    V, Q, _ = c.solution
    right = c.mdp.reward + c.beta * c.log_ref + V[c.mdp.next]
    return max(gap(Q[c.support], right[c.support], c.beta * c.log_ref[c.support]), gap(V[-1], 0 * V[-1]))


def bijection(c: Claim) -> float:
    """Lemma 1: the reward of Q* is r, and its Q* is Q* again."""
    Q, on = c.solution.Q, c.support
    again = replace(c.mdp, reward=rewards_of(c.mdp, Q, c.beta))
    return max(
        gap(again.reward[on], c.mdp.reward[on], Q[on], c.beta * c.mdp.log_ref[on]),
        gap(solve(again, c.beta).Q[on], Q[on], c.beta * c.mdp.log_ref[on]),
    )


def dpo(c: Claim) -> float:
    """Eq. 8, 9: the DPO loss of pi* on two responses is -log of their Bradley-Terry probability."""
    if len(c.returns()) < 2:
        return 0.0
    returns, two = c.returns(), 2 * (len(c.returns()) // 2)
    response = torch.arange(two)[:, None].expand(two, c.weights.shape[1]).flatten()
    pi, ref = (
        (c.paths.along(torch.where(c.support, t, 0.0)) * c.weights)[:two].flatten()
        for t in (c.solution.log_pi, c.log_ref)
    )
    loss = dpo_loss(pi, ref, response, two, c.beta).loss
    return gap(loss, -F.logsigmoid(returns[:two:2] - returns[1:two:2]), returns, c.implicit)


def shaping(c: Claim) -> float:
    """Definition 1: r + Phi(s') - Phi(s) has the policy of r, and moves all returns by -Phi(s_0)."""
    shaped = shape(c.mdp, c.phi)
    other, on = solve(shaped, c.beta), c.support
    scale = torch.cat((other.Q[on], c.solution.Q[on])) / c.beta
    return max(
        gap(other.log_pi[on], c.solution.log_pi[on], scale),
        gap(other.V, c.solution.V - c.phi, c.phi),
        gap(c.sums(shaped.reward) + c.phi[0], c.returns(), shaped.reward),
    )


def advantage(c: Claim) -> float:
    """Eq. 10, 11: beta log(pi*/pi_ref) = r + V*(s') - V*(s)."""
    V = c.solution.V
    return gap(c.implicit, c.advantage, V, c.beta * c.solution.log_pi[c.support], c.mdp.reward)


def representative(c: Claim) -> float:
    """Theorem 1: r' = beta log(pi*/pi_ref) has the same policy and V* = 0, and is the same for all of r's class."""
    other = solve(replace(c.mdp, reward=c.implicit), c.beta)
    shaped = shape(c.mdp, c.phi)
    same = implicit_rewards(shaped, solve(shaped, c.beta), c.beta)
    scale = (c.solution.V, c.beta * c.mdp.log_ref[c.support], c.phi)
    log_pi = gap(other.log_pi[c.support], c.solution.log_pi[c.support], c.solution.Q[c.support] / c.beta)
    return max(log_pi, gap(other.V, 0 * other.V, *scale), gap(same, c.implicit, *scale))


def telescoping(c: Claim) -> float:
    """sum r = V*(s_0) + sum beta log(pi*/pi_ref), for a response that ends in EOS."""
    return gap(c.returns(), c.solution.V[0] + c.sums(c.implicit), c.solution.V, c.mdp.reward)


def whole_responses(c: Claim) -> float:
    """The bandit view: pi*(y) = pi_ref(y) exp(R(y)/beta) / Z, and V*(s_0) = beta log Z."""
    log_pi, log_Z = bandit(c.mdp, c.paths, c.beta)
    scale = (c.returns() / c.beta, c.solution.V / c.beta)
    return max(gap(c.sums(c.solution.log_pi), log_pi, *scale), gap(c.solution.V[0] / c.beta, log_Z, *scale))


def prefixes(c: Claim) -> float:
    """Eq. 12 = 13, at every prefix: sum (r + beta log pi_ref) + V*(s_K+1) = V*(s_0) + sum beta log pi*."""
    on, scored = c.support, c.paths.scored
    left = torch.where(on, c.mdp.reward + c.beta * c.log_ref, 0.0)
    right = torch.where(on, c.beta * c.solution.log_pi, 0.0)
    left, right = ((c.paths.along(t) * c.weights).cumsum(-1)[scored] for t in (left, right))
    after = c.paths.along(c.solution.V[c.mdp.next])[scored]
    return gap(left + after, c.solution.V[0] + right, left, right, after)


def proxy(c: Claim) -> float:
    """Eq. 14, 15: pi_base (pi*/pi_ref)^alpha = pi_base exp(alpha A / beta), normalised, A = r + V*(s') - V*(s)."""
    on = c.support
    ratio = torch.where(on, c.solution.log_pi - c.log_ref, 0.0)
    by_ratio, by_value = ((c.base + c.alpha * t).log_softmax(-1)[on] for t in (ratio, c.advantage / c.beta))
    return gap(by_ratio, by_value, c.alpha * ratio, c.alpha * c.solution.V / c.beta)


def falling(c: Claim) -> float:
    """Eq. 16: E_pi_ref[r + V*(s') - V*(s)] = E_pi_ref[beta log(pi*/pi_ref)] = -beta KL(pi_ref || pi*)."""
    log_ref, log_pi = (torch.where(c.support, t, 0.0) for t in (c.log_ref, c.solution.log_pi))
    chance = torch.where(c.support, c.mdp.log_ref.exp(), 0.0)
    value = (chance * c.advantage).sum(-1)
    kl = F.kl_div(log_pi, log_ref, log_target=True, reduction="none")
    kl = torch.where(c.support, kl, 0.0).sum(-1)
    expected = expected_implicit_reward(c.solution.log_pi, c.log_ref, c.beta)
    return max(gap(value, expected, c.solution.V, c.implicit), gap(value, -c.beta * kl, c.solution.V, c.implicit))


IDENTITIES: dict[str, tuple[str, Callable[[Claim], float]]] = {
    "Bradley-Terry": ("1", bradley_terry),
    "KL objective": ("2, 3", kl_objective),
    "policy of Q*": ("5", policy_of_q),
    "value of Q*": ("6", value_of_q),
    "Bellman": ("7", bellman),
    "bijection r, Q*": ("Lemma 1", bijection),
    "DPO loss": ("8, 9", dpo),
    "shaping": ("Def. 1", shaping),
    "implicit reward": ("10, 11", advantage),
    "representative": ("Thm. 1", representative),
    "telescoping": ("sum of 10", telescoping),
    "bandit view": ("section 3", whole_responses),
    "search values": ("12 = 13", prefixes),
    "proxy tuning": ("14, 15", proxy),
    "falling likelihood": ("16", falling),
}


def residual_of(identity: Callable[[Claim], float], claim: Claim) -> tuple[float, str]:
    """Its residual; NaN, which fails, and the reason where the claim cannot even be computed with."""
    try:
        return identity(claim), ""
    except (FloatingPointError, ValueError) as e:
        return float("nan"), first_line(e)


def check_claims(claims: list[Claim]) -> list[Result]:
    """Every identity on every claim: the worst residuals."""
    results = []
    for id, (equation, identity) in IDENTITIES.items():
        residuals, notes = zip(*(residual_of(identity, claim) for claim in claims), strict=True)
        worst = torch.tensor(residuals, dtype=torch.float64).amax().item()
        results.append(Result(id, equation, len(claims), worst, TOLERANCE, next(filter(None, notes), "")))
    return results
