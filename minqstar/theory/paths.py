"""Responses of a `TokenMDP` as paths through its table: all of them, pieces of them, and the choice among them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minqstar.theory.mdp import TokenMDP
from minqstar.theory.qfunction import check_beta


class Responses(NamedTuple):
    """R responses as the states they pass and the actions they take there, L the longest's length, EOS included."""

    states: Tensor  # (R, L) int64; S after the end
    actions: Tensor  # (R, L) int64; 0 after the end
    scored: Tensor  # (R, L) bool: where there is a token

    def along(self, values: Tensor) -> Tensor:
        """A table's values (..., S, A) along each response, (..., R, L); 0 after its end."""
        return F.pad(values, (0, 0, 0, 1))[..., self.states, self.actions]


def responses(mdp: TokenMDP) -> Responses:
    """Every response of the MDP, those of pi_ref = 0 too: all paths from state 0 to the terminal state."""
    states = torch.zeros(1, 1, dtype=torch.long)
    actions = torch.zeros(1, 0, dtype=torch.long)
    real = F.pad(mdp.token >= 0, (0, 0, 0, 1))
    real[-1, 0] = True  # what has ended stays where it is
    next = F.pad(mdp.next, (0, 0, 0, 1), value=mdp.num_states)
    while (states[:, -1] < mdp.num_states).any():
        path, action = torch.nonzero(real[states[:, -1]], as_tuple=True)
        actions = torch.cat((actions[path], action[:, None]), dim=1)
        states = torch.cat((states[path], next[states[path, -1], action][:, None]), dim=1)
    states = states[:, :-1]
    return Responses(states, actions, states < mdp.num_states)


def segment(mdp: TokenMDP, paths: Responses, start: Tensor, stop: Tensor) -> Responses:
    """A piece of each response: its tokens start <= t < stop, (R,) int64 both.

    Truncated is not terminal: a piece that stops before EOS is worth its rewards *and* V* of the state it stops in.
    ValueError names the first that is empty or reaches past the end.
    """
    lengths = paths.scored.sum(-1)
    bad = torch.nonzero((start < 0) | (start >= stop) | (stop > lengths)).flatten()
    if len(bad):
        i = bad[0]
        raise ValueError(f"segment {i}, tokens {start[i]} to {stop[i]}, is no piece of a response of {lengths[i]}")
    place = torch.arange(paths.states.shape[1])
    inside = (place >= start[:, None]) & (place < stop[:, None])
    return Responses(torch.where(inside, paths.states, mdp.num_states), torch.where(inside, paths.actions, 0), inside)


def bandit(mdp: TokenMDP, paths: Responses, beta: float) -> tuple[Tensor, Tensor]:
    """The optimum seen as one choice among whole responses: log pi*(y|x) (..., R) and log Z (...), both nats.

    pi*(y|x) = pi_ref(y|x) exp(R(y) / beta) / Z. `paths` must be all responses. Only one temperature gives one choice,
    and chance is no choice: ValueError for MDPs with either.
    """
    check_beta(beta)
    if (isinstance(beta, Tensor) and beta.dim()) or not mdp.own.all():
        raise ValueError("the bandit view needs one beta, and no state in which the environment draws")
    scores = (paths.along(mdp.log_ref) + paths.along(mdp.reward) / beta).sum(-1)
    log_Z = torch.logsumexp(scores, dim=-1)
    return scores - log_Z[..., None], log_Z
