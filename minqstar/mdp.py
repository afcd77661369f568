"""The token-level MDP as a table, solved exactly (arXiv 2404.12358, section 3).

A state is a prompt and the tokens so far, an action is the next token, a transition appends it. Where the
set of reachable states is small the whole MDP is a table, and soft Bellman backward induction gives V*, Q*
and pi* to machine precision. Everything is float64 and in log space.

Conventions: beta > 0 and r, V, Q share one unit, the *reward unit*; log-probabilities are in nats. After
EOS the state is terminal and V* = 0.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenMDP:
    """A deterministic, acyclic MDP over S states with at most A actions each, or a batch of MDPs of one shape.

    State 0 is s_0. States are in topological order: every action leads to a later state, or to the terminal
    state, which has the index S. A tree of prefixes and an automaton that merges them are both such tables.
    """

    token: Tensor  # (S, A) int64: the token that each action appends; -1 where a state has fewer actions
    next: Tensor  # (S, A) int64: the state it leads to, in (s, S]; S where there is no action
    log_ref: Tensor  # (..., S, A) float64: log pi_ref(a|s), nats; -inf where there is no action
    reward: Tensor  # (..., S, A) float64: r(s, a), reward units; finite everywhere

    def __post_init__(self):
        S = len(self.token)
        if self.token.shape != self.next.shape or self.log_ref.shape[-2:] != self.token.shape:
            raise ValueError("token, next and log_ref must agree in their last two dimensions (S, A)")
        if self.log_ref.shape != self.reward.shape:
            raise ValueError(f"log_ref {self.log_ref.shape} and reward {self.reward.shape} differ in shape")
        if not ((self.next > torch.arange(S)[:, None]) & (self.next <= S)).all():
            raise ValueError("states are not in topological order: an action leads back, or past the terminal state")

    @property
    def num_states(self) -> int:
        return len(self.token)


class Solution(NamedTuple):
    """What backward induction returns. V has one entry more than there are states: V[..., S] = 0, terminal."""

    V: Tensor  # (..., S+1) float64, reward units
    Q: Tensor  # (..., S, A) float64, reward units; -inf off the support of pi_ref
    log_pi: Tensor  # (..., S, A) float64, nats; -inf off the support of pi_ref


def heights(mdp: TokenMDP) -> list[Tensor]:
    """States by their longest distance to the terminal state, nearest first: each level needs only earlier ones."""
    S = mdp.num_states
    height = [0] * (S + 1)
    successors = mdp.next.tolist()
    actions = (mdp.token >= 0).tolist()
    for s in reversed(range(S)):
        height[s] = 1 + max((height[n] for n, real in zip(successors[s], actions[s], strict=True) if real), default=0)
    height = torch.tensor(height[:S])
    return [torch.nonzero(height == h).flatten() for h in range(1, int(height.max()) + 1)]


def solve(mdp: TokenMDP, beta: float) -> Solution:
    """Soft Bellman backward induction: Eq. 7, 6 and 5, in that order, from the last states to the first.

    Q*(s,a) = r(s,a) + beta log pi_ref(a|s) + V*(s'),  V*(s) = beta logsumexp_a Q*(s,a)/beta,
    log pi*(a|s) = (Q*(s,a) - V*(s)) / beta.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    Q = mdp.reward + beta * mdp.log_ref
    V = torch.zeros(*Q.shape[:-2], mdp.num_states + 1, dtype=torch.float64)
    for level in heights(mdp):
        Q[..., level, :] += V[..., mdp.next[level]]
        V[..., level] = beta * torch.logsumexp(Q[..., level, :] / beta, dim=-1)
    return Solution(V, Q, (Q - V[..., :-1, None]) / beta)


def implicit_rewards(mdp: TokenMDP, solution: Solution, beta: float) -> Tensor:
    """A*(s,a) = beta log(pi*/pi_ref)(a|s), (..., S, A), reward units (Eq. 10, 11); 0 where pi_ref is 0."""
    support = mdp.log_ref > -torch.inf
    return torch.where(support, beta * (solution.log_pi - mdp.log_ref), 0.0)


def visits(mdp: TokenMDP, log_policy: Tensor) -> Tensor:
    """The probability (..., S, A) that a response drawn from the policy takes action a in state s."""
    policy = log_policy.exp()
    reach = torch.zeros(*policy.shape[:-2], mdp.num_states + 1, dtype=torch.float64)
    reach[..., 0] = 1.0
    for level in reversed(heights(mdp)):  # farthest from the end first: all ways into a state come before it
        flow = reach[..., level, None] * policy[..., level, :]
        reach.index_add_(-1, mdp.next[level].flatten(), flow.flatten(-2))
    return reach[..., :-1, None] * policy
