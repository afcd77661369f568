"""DPO is inverse soft Q-learning, shown where it can be exact: tabular logits, all comparisons, no sampling."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minqstar.theory.losses import plackett_luce
from minqstar.theory.mdp import TokenMDP, by_state, implicit_rewards, solve, visits
from minqstar.theory.paths import Responses, responses
from minqstar.theory.qfunction import implicit_reward, per_action


class Population(NamedTuple):
    """All comparisons of N things (responses, pieces of them), K at a time, with their probabilities."""

    drawn: Tensor  # (N,) * K: the probability that these are drawn together, in this order
    labels: Tensor  # (N,) reward units: what the labeller ranks by (Plackett-Luce; of pairs Bradley-Terry)
    score: Callable[[Tensor], Tensor]  # rewards (S, A) of a policy, beta log(pi/pi_ref) -> (N,) reward units


def compared(paths: Responses, drawn: Tensor, labels: Tensor) -> Population:
    """Responses, or pieces of them, each scored by its sum of rewards."""
    return Population(drawn, labels, lambda rewards: paths.along(rewards).sum(-1))


def rankings(mdp: TokenMDP, K: int = 2, without_luck: Tensor | None = None) -> Population:
    """K responses drawn from pi_ref, ranked by their returns, or by those less the `without_luck` (S, A) table's."""
    paths = responses(mdp)
    counted = mdp.reward if without_luck is None else mdp.reward - without_luck
    drawn = chance = paths.along(mdp.log_ref).sum(-1).exp()
    for _ in range(K - 1):
        drawn = drawn[..., None] * chance
    return compared(paths, drawn, paths.along(counted).sum(-1))


def minimise(loss: Callable[[], Tensor], of: Tensor, iterations: int) -> Iterator[float]:
    """L-BFGS on a leaf tensor, in place: yields after each iteration the loss that it began with."""
    search = torch.optim.LBFGS(
        [of], max_iter=20, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def step() -> Tensor:
        search.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(iterations):
        yield search.step(step).item()


class Fit(NamedTuple):
    """What the population DPO loss led to, and by iteration how far it was from the exact solution."""

    log_pi: Tensor  # (S, A) nats
    rewards: Tensor  # (S, A) reward units: the learned beta log(pi/pi_ref); 0 off the support of pi_ref
    loss: list[float]  # nats, above the smallest possible: the entropy of the preferences themselves
    policy_gap: list[float]  # max |pi - pi*|, over the states that pi_ref reaches
    reward_gap: list[float]  # max |beta log(pi/pi_ref) - A*|, reward units, over the same


def fit(
    mdp: TokenMDP,
    beta: float | Tensor,
    iterations: int = 100,
    population: Population | None = None,
    likelihood: Callable[[Tensor], Tensor] = plackett_luce,
) -> Fit:
    """Minimise an exact population loss over tabular logits (S, A), by L-BFGS from pi = pi_ref.

    By default it is DPO's (Eq. 8, 9): both responses of a pair are drawn from pi_ref, every pair weighs its
    probability, and its label Bradley-Terry's (Eq. 1). Its one minimiser is pi* (Theorem 1), in every state that
    pi_ref reaches: DPO recovers the implicit rewards A*, and r up to shaping. In a chance state there is nothing to
    learn. `likelihood` takes the scores (..., K) of a ranking, the best first, to its log-probability, nats.
    """
    solution, population = solve(mdp, beta), population or rankings(mdp)
    N, K = len(population.labels), population.drawn.dim()
    ranked = torch.cartesian_prod(*[torch.arange(N)] * K)  # (N^K, K)
    weights = population.drawn.flatten() * plackett_luce(population.labels[ranked]).exp()
    ranked, weights = ranked[weights > 0], weights[weights > 0]
    entropy = -(weights * plackett_luce(population.labels[ranked])).sum()
    exact = implicit_rewards(mdp, solution, beta)
    reached = visits(mdp, mdp.log_ref) > 0
    own, temperature = mdp.own[:, None], per_action(by_state(mdp, beta))
    logits = torch.where(mdp.support, mdp.log_ref, 0.0).requires_grad_()

    def learned() -> tuple[Tensor, Tensor]:
        chosen = logits.masked_fill(~mdp.support, -torch.inf).log_softmax(-1)
        log_pi = torch.where(own, chosen, mdp.log_ref)
        on_support = (torch.where(mdp.support, t, 0.0) for t in (log_pi, mdp.log_ref))
        return log_pi, implicit_reward(*on_support, temperature)

    def loss() -> Tensor:
        return -(weights * likelihood(population.score(learned()[1])[ranked])).sum()

    losses, policy_gaps, reward_gaps = [], [], []
    for value in minimise(loss, logits, iterations):
        losses.append(value - entropy.item())
        with torch.no_grad():
            log_pi, rewards = learned()
        policy_gaps.append((log_pi.exp() - solution.log_pi.exp())[reached].abs().max().item())
        reward_gaps.append((rewards - exact)[reached].abs().max().item())
    return Fit(log_pi, rewards, losses, policy_gaps, reward_gaps)
