"""The token-level MDP as a table, solved exactly (arXiv 2404.12358, section 3).

A state is a prompt and the tokens so far, an action is the next token, a transition appends it. Where the
set of reachable states is small the whole MDP is a table, and soft Bellman backward induction gives V*, Q*
and pi* to machine precision. Everything is float64 and in log space.

Conventions: beta > 0 and r, V, Q share one unit, the *reward unit*; log-probabilities are in nats. After
EOS the state is terminal and V* = 0. Wherever a beta is asked for, a tensor (..., S) gives each state its own.

In a *chance state* the environment (a user, a tool) draws the token, by the law in `log_ref`, and the policy has no
say. It is what a state becomes as its beta goes to infinity: V*(s) = E[r(s,a) + V*(s')], and the log-ratio is 0.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from minqstar.theory.qfunction import check_beta, per_action, soft_value


@dataclass(frozen=True)
class TokenMDP:
    """A deterministic, acyclic MDP over S states with at most A actions each, or a batch of MDPs of one shape.

    State 0 is s_0. States are in topological order: every action leads to a later state, or to the terminal
    state, which has the index S. A tree of prefixes (`tree`) and an automaton that merges them are both such tables.
    ValueError if the shapes do not fit or the graph has a cycle.
    """

    token: Tensor  # (S, A) int64: the token that each action appends; -1 where a state has fewer actions
    next: Tensor  # (S, A) int64: the state it leads to, in (s, S]; S where there is no action
    log_ref: Tensor  # (..., S, A) float64: log pi_ref(a|s), nats; -inf where there is no action
    reward: Tensor  # (..., S, A) float64: r(s, a), reward units; finite everywhere
    chance: Tensor | None = None  # (S,) bool: where the environment draws the token, by the law in log_ref

    def __post_init__(self):
        S = len(self.token)
        if self.token.shape != self.next.shape or self.log_ref.shape[-2:] != self.token.shape:
            raise ValueError("token, next and log_ref must agree in their last two dimensions (S, A)")
        if self.log_ref.shape != self.reward.shape:
            raise ValueError(f"log_ref {self.log_ref.shape} and reward {self.reward.shape} differ in shape")
        if not ((self.next > torch.arange(S)[:, None]) & (self.next <= S)).all():
            raise ValueError("states are not in topological order: an action leads back, or past the terminal state")
        if self.chance is not None and (self.chance.dtype != torch.bool or self.chance.shape != (S,)):
            raise ValueError(f"chance must be one bool for each of the {S} states, got {tuple(self.chance.shape)}")

    @property
    def num_states(self) -> int:
        return len(self.token)

    @property
    def own(self) -> Tensor:
        """(S,) bool: where the policy chooses."""
        return torch.ones(self.num_states, dtype=torch.bool) if self.chance is None else ~self.chance

    @property
    def support(self) -> Tensor:
        """(..., S, A) bool: where pi_ref has mass."""
        return self.log_ref > -torch.inf


class Solution(NamedTuple):
    """What backward induction returns. V has one entry more than there are states: V[..., S] = 0, terminal."""

    V: Tensor  # (..., S+1) float64, reward units
    Q: Tensor  # (..., S, A) float64, reward units; -inf off the support of pi_ref
    log_pi: Tensor  # (..., S, A) float64, nats; -inf off the support of pi_ref


def tree(num_tokens: int, horizon: int) -> tuple[Tensor, Tensor]:
    """`token` and `next` (S, A) of all strings of at most `horizon` tokens, EOS at any depth and forced at the last.

    Tokens are 0 .. num_tokens - 1 and EOS is num_tokens. States are the prefixes by length, then in the order of
    their digits: the string i of a length continues with token a to the string i * num_tokens + a of the next.
    """
    sizes = [num_tokens**depth for depth in range(horizon + 1)]
    S = sum(sizes)
    inner = S - sizes[-1]
    token = torch.arange(num_tokens + 1).repeat(S, 1)
    token[inner:, :-1] = -1
    next = torch.full((S, num_tokens + 1), S)
    next[:inner, :-1] = torch.arange(1, S).view(inner, num_tokens)  # children are numbered in their parents' order
    return token, next


def where(bad: Tensor) -> str:
    """The first true entry of a mask (..., S) or (..., S, A), S states and A actions, in words."""
    index = torch.nonzero(bad)[0].tolist()
    return ", ".join(f"{name} {i}" for name, i in zip(("action", "state", "MDP"), reversed(index), strict=False))


def validate(mdp: TokenMDP):
    """ValueError, with the place, unless rewards are finite and pi_ref is a distribution over each state's actions.

    A pi_ref that is 1 (log 0) on the whole of its support stands for *no reference*: what costs beta is then not the
    KL to pi_ref but the negative entropy. The law of a chance state is a distribution in any case.
    """
    bad = ~mdp.reward.isfinite()
    if bad.any():
        raise ValueError(f"the reward is not finite at {where(bad)}")
    bad = mdp.log_ref.isnan() | (mdp.log_ref > -torch.inf) & (mdp.token < 0)
    if bad.any():
        raise ValueError(f"pi_ref is NaN, or gives mass to no action, at {where(bad)}")
    off = ~(torch.logsumexp(mdp.log_ref, dim=-1).abs() < 1e-9)
    counts = ((mdp.log_ref == 0) == mdp.support).all(-1) & mdp.support.any(-1)
    no_reference = (counts | ~mdp.own).all()
    for who, bad in (("pi_ref", off & mdp.own & ~no_reference), ("the environment's law", off & ~mdp.own)):
        if bad.any():
            raise ValueError(f"{who} does not sum to one at {where(bad[..., None]).split(', ', 1)[1]}")


def heights(mdp: TokenMDP) -> list[Tensor]:
    """States by their longest distance to the terminal state, nearest first: each level needs only earlier ones."""
    height = torch.zeros(mdp.num_states + 1, dtype=torch.long)
    while True:
        above = 1 + torch.where(mdp.token >= 0, height[mdp.next], 0).amax(-1)
        if torch.equal(above, height[:-1]):
            return [torch.nonzero(above == h).flatten() for h in range(1, int(above.max()) + 1)]
        height[:-1] = above


def by_state(mdp: TokenMDP, beta: float | Tensor) -> Tensor:
    """beta as a tensor that broadcasts to (..., S). ValueError where it is not positive, not finite or does not fit."""
    check_beta(beta)
    beta = torch.as_tensor(beta, dtype=torch.float64)
    if beta.dim() and beta.shape[-1] != mdp.num_states:
        raise ValueError(f"beta has {beta.shape[-1]} entries for {mdp.num_states} states")
    return beta.expand(*beta.shape[:-1], mdp.num_states)


def prior_cost(mdp: TokenMDP, beta: Tensor) -> Tensor:
    """What Q* holds beside r + V*(s'): beta log pi_ref, (..., S, A); in a chance state 0, and -inf off its support."""
    free = torch.where(mdp.support, 0.0, -torch.inf)
    return torch.where(mdp.own[:, None], per_action(beta) * mdp.log_ref, free)


def expected_value(mdp: TokenMDP, Q: Tensor, states: Tensor) -> Tensor:
    """E Q (..., n) of some states (n,) from their Q (..., n, A), as pi_ref draws the action."""
    law = mdp.log_ref[..., states, :].exp()
    return torch.where(law > 0, law * Q, 0.0).sum(-1)


def values_of(mdp: TokenMDP, Q: Tensor, beta: Tensor, states: Tensor) -> Tensor:
    """V (..., n) of some states (n,) from their Q (..., n, A): Eq. 6, and in a chance state the expectation."""
    soft = soft_value(Q, beta[..., states])
    return soft if mdp.chance is None else torch.where(mdp.chance[states], expected_value(mdp, Q, states), soft)


def solve(mdp: TokenMDP, beta: float | Tensor) -> Solution:
    """Soft Bellman backward induction: Eq. 7, 6 and 5, in that order, from the last states to the first.

    Q*(s,a) = r(s,a) + beta log pi_ref(a|s) + V*(s'),  V*(s) = beta logsumexp_a Q*(s,a)/beta,
    log pi*(a|s) = (Q*(s,a) - V*(s)) / beta, with the state's own beta. In a chance state Q*(s,a) = r(s,a) + V*(s'),
    V*(s) is its expectation and log pi* the law. ValueError if beta is not positive and finite, or the MDP not valid.
    """
    beta = by_state(mdp, beta)
    validate(mdp)
    Q = mdp.reward + prior_cost(mdp, beta)
    V = torch.zeros(*Q.shape[:-2], mdp.num_states + 1, dtype=torch.float64)
    for level in heights(mdp):
        Q[..., level, :] += V[..., mdp.next[level]]
        V[..., level] = values_of(mdp, Q[..., level, :], beta, level)
    return Solution(V, Q, torch.where(mdp.own[:, None], (Q - V[..., :-1, None]) / per_action(beta), mdp.log_ref))


def hard_max(mdp: TokenMDP) -> tuple[Tensor, Tensor]:
    """V (..., S+1) and Q (..., S, A) of the limit beta -> 0: Q = r + V(s') on the support of pi_ref, V = max_a Q.

    A chance state keeps its expectation.
    """
    validate(mdp)
    Q = torch.where(mdp.support, mdp.reward, -torch.inf)
    V = torch.zeros(*Q.shape[:-2], mdp.num_states + 1, dtype=torch.float64)
    for level in heights(mdp):
        Q[..., level, :] += V[..., mdp.next[level]]
        best = Q[..., level, :].amax(-1)
        V[..., level] = torch.where(mdp.own[level], best, expected_value(mdp, Q[..., level, :], level))
    return V, Q


def rewards_of(mdp: TokenMDP, Q: Tensor, beta: float | Tensor) -> Tensor:
    """Lemma 1, the inverse of `solve`: r(s,a) = Q(s,a) - beta log pi_ref(a|s) - V(s'), (..., S, A), reward units.

    Any Q (..., S, A), finite on the support of pi_ref, is the Q* of exactly this reward. Off the support, where Q* is
    -inf whatever the reward, r is unidentified and 0 is returned. In a chance state r(s,a) = Q(s,a) - V(s').
    """
    beta = by_state(mdp, beta)
    V = torch.nn.functional.pad(values_of(mdp, Q, beta, torch.arange(mdp.num_states)), (0, 1))  # V*(terminal) = 0
    return torch.where(mdp.support, Q - prior_cost(mdp, beta) - V[..., mdp.next], 0.0)


def shape(mdp: TokenMDP, phi: Tensor) -> TokenMDP:
    """Definition 1: r'(s,a) = r(s,a) + Phi(s') - Phi(s), for Phi (..., S+1) in reward units with Phi(terminal) = 0."""
    if phi.shape[-1] != mdp.num_states + 1 or (phi[..., -1] != 0).any():
        raise ValueError("phi needs one entry a state and a last one, for the terminal state, that is 0")
    return replace(mdp, reward=mdp.reward + phi[..., mdp.next] - phi[..., :-1, None])


def implicit_rewards(mdp: TokenMDP, solution: Solution, beta: float | Tensor) -> Tensor:
    """A*(s,a) = beta log(pi*/pi_ref)(a|s), (..., S, A), reward units (Eq. 10, 11); 0 where pi_ref is 0."""
    beta = per_action(by_state(mdp, beta))
    return torch.where(mdp.support, beta * (solution.log_pi - mdp.log_ref), 0.0)


def luck(mdp: TokenMDP, solution: Solution) -> Tensor:
    """What a chance state's token brings above its expectation: r(s,a) + V*(s') - V*(s), (..., S, A); 0 elsewhere.

    Its mean is 0. On every path R = V*(s_0) + sum beta log(pi*/pi_ref) + sum luck: Eq. 10 summed, chance included.
    """
    V = solution.V
    here = mdp.support & ~mdp.own[:, None]
    return torch.where(here, mdp.reward + V[..., mdp.next] - V[..., :-1, None], 0.0)


def visits(mdp: TokenMDP, log_policy: Tensor) -> Tensor:
    """The probability (..., S, A) that a response drawn from the policy takes action a in state s."""
    policy = log_policy.exp()
    reach = torch.zeros(*policy.shape[:-2], mdp.num_states + 1, dtype=torch.float64)
    reach[..., 0] = 1.0
    for level in reversed(heights(mdp)):  # farthest from the end first: all ways into a state come before it
        flow = reach[..., level, None] * policy[..., level, :]
        reach.index_add_(-1, mdp.next[level].flatten(), flow.flatten(-2))
    return reach[..., :-1, None] * policy
