"""DPO is inverse soft Q-learning, shown where it can be exact: tabular logits, all pairs, no sampling."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minqstar.theory.mdp import TokenMDP, implicit_rewards, responses, solve, visits
from minqstar.theory.qfunction import implicit_reward


class Fit(NamedTuple):
    """What the population DPO loss led to, and by iteration how far it was from the exact solution."""

    log_pi: Tensor  # (S, A) nats
    rewards: Tensor  # (S, A) reward units: the learned beta log(pi/pi_ref); 0 off the support of pi_ref
    loss: list[float]  # nats, above the smallest possible: the entropy of the preferences themselves
    policy_gap: list[float]  # max |pi - pi*|, over the states that pi_ref reaches
    reward_gap: list[float]  # max |beta log(pi/pi_ref) - A*|, reward units, over the same


def fit(mdp: TokenMDP, beta: float, iterations: int = 100) -> Fit:
    """Minimise the exact population DPO loss (Eq. 8, 9) over tabular logits (S, A), by L-BFGS from pi = pi_ref.

    Both responses of a pair are drawn from pi_ref, every pair weighs its probability, and its label Bradley-Terry's
    (Eq. 1). Its one minimiser is pi* (Theorem 1), in every state that pi_ref reaches: DPO recovers the implicit rewards
    A*, and r up to shaping.
    """
    solution, paths = solve(mdp, beta), responses(mdp)
    chance = paths.along(mdp.log_ref).sum(-1).exp()
    returns = paths.along(mdp.reward).sum(-1)
    weights = torch.outer(chance, chance) * torch.sigmoid(returns[:, None] - returns)  # P(i, j drawn, i preferred)
    entropy = -(weights * F.logsigmoid(returns[:, None] - returns)).sum()
    support = mdp.log_ref > -torch.inf
    exact = implicit_rewards(mdp, solution, beta)
    reached = visits(mdp, mdp.log_ref) > 0
    logits = torch.where(support, mdp.log_ref, 0.0).requires_grad_()
    search = torch.optim.LBFGS(
        [logits], max_iter=20, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def learned() -> tuple[Tensor, Tensor]:
        log_pi = logits.masked_fill(~support, -torch.inf).log_softmax(-1)
        on_support = (torch.where(support, t, 0.0) for t in (log_pi, mdp.log_ref))
        return log_pi, implicit_reward(*on_support, beta)

    def loss() -> Tensor:
        returns = paths.along(learned()[1]).sum(-1)
        return -(weights * F.logsigmoid(returns[:, None] - returns)).sum()

    def step() -> Tensor:
        search.zero_grad()
        value = loss()
        value.backward()
        return value

    losses, policy_gaps, reward_gaps = [], [], []
    for _ in range(iterations):
        losses.append((search.step(step) - entropy).item())
        with torch.no_grad():
            log_pi, rewards = learned()
        policy_gaps.append((log_pi.exp() - solution.log_pi.exp())[reached].abs().max().item())
        reward_gaps.append((rewards - exact)[reached].abs().max().item())
    return Fit(log_pi, rewards, losses, policy_gaps, reward_gaps)
