"""The token-level MDP as a table, solved exactly (arXiv 2404.12358, section 3).

A state is a prompt and the tokens so far, an action is the next token, a transition appends it. Where the
set of reachable states is small the whole MDP is a table, and soft Bellman backward induction gives V*, Q*
and pi* to machine precision. Everything is float64 and in log space.

Conventions: beta > 0 and r, V, Q share one unit, the *reward unit*; log-probabilities are in nats. After
EOS the state is terminal and V* = 0.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from minqstar.theory.qfunction import check_beta, soft_value


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
    """ValueError, with the place, unless rewards are finite and pi_ref is a distribution over each state's actions."""
    bad = ~mdp.reward.isfinite()
    if bad.any():
        raise ValueError(f"the reward is not finite at {where(bad)}")
    bad = mdp.log_ref.isnan() | (mdp.log_ref > -torch.inf) & (mdp.token < 0)
    if bad.any():
        raise ValueError(f"pi_ref is NaN, or gives mass to no action, at {where(bad)}")
    bad = ~(torch.logsumexp(mdp.log_ref, dim=-1).abs() < 1e-9)
    if bad.any():
        raise ValueError(f"pi_ref does not sum to one at {where(bad[..., None]).split(', ', 1)[1]}")


def heights(mdp: TokenMDP) -> list[Tensor]:
    """States by their longest distance to the terminal state, nearest first: each level needs only earlier ones."""
    height = torch.zeros(mdp.num_states + 1, dtype=torch.long)
    while True:
        above = 1 + torch.where(mdp.token >= 0, height[mdp.next], 0).amax(-1)
        if torch.equal(above, height[:-1]):
            return [torch.nonzero(above == h).flatten() for h in range(1, int(above.max()) + 1)]
        height[:-1] = above


def solve(mdp: TokenMDP, beta: float) -> Solution:
    """Soft Bellman backward induction: Eq. 7, 6 and 5, in that order, from the last states to the first.

    Q*(s,a) = r(s,a) + beta log pi_ref(a|s) + V*(s'),  V*(s) = beta logsumexp_a Q*(s,a)/beta,
    log pi*(a|s) = (Q*(s,a) - V*(s)) / beta. ValueError if beta is not positive and finite, or the MDP is not valid.
    """
    check_beta(beta)
    validate(mdp)
    Q = mdp.reward + beta * mdp.log_ref
    V = torch.zeros(*Q.shape[:-2], mdp.num_states + 1, dtype=torch.float64)
    for level in heights(mdp):
        Q[..., level, :] += V[..., mdp.next[level]]
        V[..., level] = soft_value(Q[..., level, :], beta)
    return Solution(V, Q, (Q - V[..., :-1, None]) / beta)


def hard_max(mdp: TokenMDP) -> tuple[Tensor, Tensor]:
    """V (..., S+1) and Q (..., S, A) of the limit beta -> 0: Q = r + V(s') on the support of pi_ref, V = max_a Q."""
    validate(mdp)
    Q = torch.where(mdp.log_ref > -torch.inf, mdp.reward, -torch.inf)
    V = torch.zeros(*Q.shape[:-2], mdp.num_states + 1, dtype=torch.float64)
    for level in heights(mdp):
        Q[..., level, :] += V[..., mdp.next[level]]
        V[..., level] = Q[..., level, :].amax(-1)
    return V, Q


def rewards_of(mdp: TokenMDP, Q: Tensor, beta: float) -> Tensor:
    """Lemma 1, the inverse of `solve`: r(s,a) = Q(s,a) - beta log pi_ref(a|s) - V(s'), (..., S, A), reward units.

    Any Q (..., S, A), finite on the support of pi_ref, is the Q* of exactly this reward. Off the support, where Q* is
    -inf whatever the reward, r is unidentified and 0 is returned.
    """
    check_beta(beta)
    V = torch.nn.functional.pad(soft_value(Q, beta), (0, 1))  # V*(terminal) = 0
    support = mdp.log_ref > -torch.inf
    return torch.where(support, Q - beta * mdp.log_ref - V[..., mdp.next], 0.0)


def shape(mdp: TokenMDP, phi: Tensor) -> TokenMDP:
    """Definition 1: r'(s,a) = r(s,a) + Phi(s') - Phi(s), for Phi (..., S+1) in reward units with Phi(terminal) = 0."""
    if phi.shape[-1] != mdp.num_states + 1 or (phi[..., -1] != 0).any():
        raise ValueError("phi needs one entry a state and a last one, for the terminal state, that is 0")
    return replace(mdp, reward=mdp.reward + phi[..., mdp.next] - phi[..., :-1, None])


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


class Responses(NamedTuple):
    """R responses as the states they pass and the actions they take there, L the longest's length, EOS included."""

    states: Tensor  # (R, L) int64; S after the end
    actions: Tensor  # (R, L) int64; 0 after the end
    scored: Tensor  # (R, L) bool: where there is a token

    def along(self, values: Tensor) -> Tensor:
        """A table's values (..., S, A) along each response, (..., R, L); 0 after its end."""
        return torch.nn.functional.pad(values, (0, 0, 0, 1))[..., self.states, self.actions]


def responses(mdp: TokenMDP) -> Responses:
    """Every response of the MDP, those of pi_ref = 0 too: all paths from state 0 to the terminal state."""
    states = torch.zeros(1, 1, dtype=torch.long)
    actions = torch.zeros(1, 0, dtype=torch.long)
    real = torch.nn.functional.pad(mdp.token >= 0, (0, 0, 0, 1))
    real[-1, 0] = True  # what has ended stays where it is
    next = torch.nn.functional.pad(mdp.next, (0, 0, 0, 1), value=mdp.num_states)
    while (states[:, -1] < mdp.num_states).any():
        path, action = torch.nonzero(real[states[:, -1]], as_tuple=True)
        actions = torch.cat((actions[path], action[:, None]), dim=1)
        states = torch.cat((states[path], next[states[path, -1], action][:, None]), dim=1)
    states = states[:, :-1]
    return Responses(states, actions, states < mdp.num_states)


def bandit(mdp: TokenMDP, paths: Responses, beta: float) -> tuple[Tensor, Tensor]:
    """The optimum seen as one choice among whole responses: log pi*(y|x) (..., R) and log Z (...), both nats.

    pi*(y|x) = pi_ref(y|x) exp(R(y) / beta) / Z. `paths` must be all responses.
    """
    check_beta(beta)
    scores = (paths.along(mdp.log_ref) + paths.along(mdp.reward) / beta).sum(-1)
    log_Z = torch.logsumexp(scores, dim=-1)
    return scores - log_Z[..., None], log_Z
