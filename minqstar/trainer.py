"""The one training loop, for every stage."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from minqstar.cli import require
from minqstar.data import Batch, PackedData
from minqstar.losses import dpo_loss, sft_loss
from minqstar.model import GPT
from minqstar.optim import OptimConfig, Optimizer, schedule
from minqstar.scoring import ReferenceCache, autocast, token_logps


@dataclass(frozen=True)
class StageConfig(OptimConfig):
    epochs: float = 1.0
    """Passes over the data."""
    min_steps: int = 200
    """Optimizer steps at the least: a small data set is passed over more often."""
    batch_tokens: int = 2880
    """Tokens, padding included, of one optimizer step."""
    micro_tokens: int = 16384
    """Tokens of one forward and backward pass: larger steps accumulate gradients."""
    row_length: int = 360
    """Tokens of a packed row; a longer prompt with its responses lengthens all rows."""

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.epochs < math.inf, f"epochs must be positive and finite, got {self.epochs}")
        for name in ("min_steps", "batch_tokens", "micro_tokens", "row_length"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class SFTConfig(StageConfig):
    on: Literal["all", "chosen"] = "all"
    """Which responses of preference pairs to imitate; the reference should be the policy that drew both."""


@dataclass(frozen=True)
class DPOConfig(StageConfig):
    lr: float = 0.003
    """Peak learning rate of Muon (the blocks' matrices)."""
    adam_lr: float = 0.003
    """Peak learning rate of AdamW (the embedding, which is the head too)."""
    beta: float = 0.5
    """Strength of the KL to the reference, reward units a nat."""

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.beta < math.inf, f"beta must be positive and finite, got {self.beta}")


class Objective(Protocol):
    """What a stage minimises: the mean of `loss` over all units of a global batch."""

    def units(self, batch: Batch) -> int: ...

    def sums(self, token_logps: Tensor, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        """Each metric's sum over the batch's units; `loss` (nats) comes with a gradient."""


class SFT:
    """The mean negative log-likelihood of scored tokens."""

    def units(self, batch: Batch) -> int:
        return len(batch.target)

    def sums(self, token_logps: Tensor, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        return {"loss": sft_loss(token_logps)}


class DPO:
    """The mean DPO loss of pairs (Eq. 8, 9), the reference's log-probs read from their cache."""

    def __init__(self, cache: ReferenceCache, beta: float):
        self.cache, self.beta = cache, beta

    def units(self, batch: Batch) -> int:
        return batch.num_responses // 2

    def sums(self, token_logps: Tensor, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        ref = self.cache[rows].to(token_logps.device)
        loss, chosen, rejected = dpo_loss(token_logps, ref, batch.response, batch.num_responses, self.beta)
        margin = (chosen - rejected).detach()
        correct = (margin > 0).float() + 0.5 * (margin == 0).float()
        metrics = {
            "accuracy": correct,
            "margin": margin,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }
        return {"loss": loss.sum(), **{name: value.detach().sum() for name, value in metrics.items()}}


def plan(data: PackedData, config: StageConfig) -> tuple[int, int]:
    """Rows of one optimizer step, and the number of steps."""
    rows = min(len(data), max(1, config.batch_tokens // data.row_length))
    return rows, max(config.min_steps, round(config.epochs * len(data) / rows))


def row_order(num_rows: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Rows start..stop of an endless sequence of epochs, each a permutation of its own."""
    epochs = range(start // num_rows, (stop - 1) // num_rows + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_rows) for epoch in epochs])
    first = epochs[0] * num_rows
    return order[start - first : stop - first]


def update(
    model: GPT,
    optimizer: Optimizer,
    objective: Objective,
    batches: list[tuple[np.ndarray, Batch]],
    dtype: torch.dtype,
    scale: float,
) -> dict[str, float]:
    """One optimizer step on a global batch given in micro-batches; the metrics before it, means over its units."""
    device = next(model.parameters()).device
    units = sum(objective.units(batch) for _, batch in batches)
    totals: dict[str, float] = {}
    for rows, batch in batches:
        batch = batch.to(device)
        with autocast(device, dtype):
            logps = token_logps(model, batch)
        sums = objective.sums(logps, batch, rows)
        (sums["loss"] / units).backward()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value.item() / units
    totals["grad_norm"] = optimizer.step(scale)
    return totals


def train(
    model: GPT,
    data: PackedData,
    config: StageConfig,
    objective: Objective,
    dtype: torch.dtype,
    seed: int,
    log: Callable[[dict], None],
):
    """Run the stage to its end; `log` gets one dict of metrics for every step."""
    optimizer = Optimizer(model, config)
    rows_per_step, steps = plan(data, config)
    rows_per_pass = max(1, config.micro_tokens // data.row_length)
    model.train()
    seen, started = 0, time.perf_counter()
    for step in range(steps):
        order = row_order(len(data), seed, step * rows_per_step, (step + 1) * rows_per_step)
        parts = [order[i : i + rows_per_pass] for i in range(0, len(order), rows_per_pass)]
        batches = [(rows, data.batch(rows)) for rows in parts]
        scale = schedule(config, step, steps)
        metrics = update(model, optimizer, objective, batches, dtype, scale)
        seen += sum(int((batch.group >= 0).sum()) for _, batch in batches)
        seconds = time.perf_counter() - started
        log(
            {
                "step": step,
                "steps": steps,
                **metrics,
                "lr": config.lr * scale,
                "tokens_seen": seen,
                "seconds": seconds,
            }
        )
    model.eval()
