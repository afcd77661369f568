"""Solutions of the exercises. Each has the name of the function that its chapter leaves open."""

from math import exp, log

import torch


def soft_value(rewards: list[float], pi_ref: list[float], next_values: list[float], beta: float) -> float:
    """Chapter 1."""
    return beta * log(sum(p * exp((r + V) / beta) for r, p, V in zip(rewards, pi_ref, next_values, strict=True)))


def advantages(reward: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Chapter 2."""
    return reward + value[1:] - value[:-1]


def charge(right: float, wrong: float, beta: float) -> float:
    """Chapter 3. What comes after the number is in both values, so the number can be taken alone."""
    value = beta * log(0.75 * exp(right / beta) + 0.25 * exp(wrong / beta))
    return wrong - value


def pair_loss(chosen, ref_chosen, rejected, ref_rejected, beta: float):
    """Chapter 4."""
    margin = beta * (chosen - ref_chosen).sum() - beta * (rejected - ref_rejected).sum()
    return -torch.nn.functional.logsigmoid(margin)


def r_squared(learned: torch.Tensor, exact: torch.Tensor) -> float:
    """Chapter 5."""
    return 1 - ((learned - exact).square().mean() / exact.var(correction=0)).item()


def minus_beta_kl(log_pi: torch.Tensor, log_ref: torch.Tensor, beta: float) -> torch.Tensor:
    """Chapter 6."""
    return beta * torch.where(log_ref > -torch.inf, log_ref.exp() * (log_pi - log_ref), 0.0).sum(-1)


def guided_value(reward: torch.Tensor, log_ref: torch.Tensor, value: torch.Tensor, beta: float) -> torch.Tensor:
    """Chapter 7."""
    return (reward + beta * log_ref).cumsum(0) + value[1:]


def preference(better: torch.Tensor, worse: torch.Tensor) -> float:
    """Chapter 8."""
    return torch.sigmoid(better.sum() - worse.sum()).item()
