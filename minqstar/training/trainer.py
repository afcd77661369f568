"""The one training loop, for every stage."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from minqstar.errors import UserError, fitting, require
from minqstar.lm.model import GPT
from minqstar.theory.losses import chosen_nll, dpo_loss, sft_loss
from minqstar.training.data import Batch, PackedData
from minqstar.training.optim import OptimConfig, Optimizer, schedule
from minqstar.training.scoring import ReferenceCache, autocast, token_logps

MOST = {"min_steps": 10**9, "batch_tokens": 10**9, "micro_tokens": 10**9, "row_length": 2**16}


@dataclass(frozen=True)
class StageConfig(OptimConfig):
    epochs: float = 1.0
    """Passes over the data."""
    min_steps: int = 200
    """Optimizer steps at the least: a small data set is passed over more often; 0 leaves it to epochs alone."""
    batch_tokens: int = 2880
    """Tokens, padding included, of one optimizer step."""
    micro_tokens: int = 16384
    """Tokens of one forward and backward pass: larger steps accumulate gradients."""
    row_length: int = 360
    """Tokens of a packed row; a longer prompt with its responses lengthens all rows."""

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.epochs <= 1e6, f"epochs must be between 0 and a million, got {self.epochs}")
        for name in ("min_steps", "batch_tokens", "micro_tokens", "row_length"):
            value, least = getattr(self, name), int(name != "min_steps")
            require(least <= value <= MOST[name], f"{name} must be between {least} and {MOST[name]:,}, got {value}")


@dataclass(frozen=True)
class SFTConfig(StageConfig):
    epochs: float = 1.2
    """Passes over the data."""
    on: Literal["all", "chosen"] = "all"
    """Which responses of preference pairs to imitate; the reference should be the policy that drew both."""


@dataclass(frozen=True)
class DPOConfig(StageConfig):
    lr: float = 0.0018
    """Peak learning rate of the blocks' matrices."""
    adam_lr: float = 0.0035
    """Peak learning rate of AdamW (the rest: the embedding, which is the head too, norms and biases)."""
    beta: float = 0.5
    """Strength of the KL to the reference, reward units a nat."""
    sft_weight: float = 0.0
    """Weight of the chosen answers' negative log-likelihood, a mean over the tokens of each, in the loss
    (arXiv 2404.19733)."""

    def __post_init__(self):
        super().__post_init__()
        require(1e-6 <= self.beta <= 1e6, f"beta must be positive, between 1e-6 and 1e6, got {self.beta}")
        require(0 <= self.sft_weight <= 1e6, f"sft_weight must be between 0 and 1e6, got {self.sft_weight}")


class Objective(Protocol):
    """What a stage minimises: the mean of `loss` over all units of a global batch."""

    def read(self, model: GPT, batch: Batch) -> Tensor:
        """What the loss is a function of: log pi of the scored tokens (S,), unless an objective reads more."""
        return token_logps(model, batch)

    def units(self, batch: Batch) -> int: ...

    def sums(self, token_logps: Tensor, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        """Each metric's sum over the batch's units; `loss` (nats) comes with a gradient."""


class SFT(Objective):
    """The mean negative log-likelihood of scored tokens."""

    def units(self, batch: Batch) -> int:
        return len(batch.target)

    def sums(self, token_logps: Tensor, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        return {"loss": sft_loss(token_logps)}


class DPO(Objective):
    """The mean DPO loss of pairs and rankings (Eq. 8, 9), the reference's log-probs read from their cache.

    With an SFT weight w each one's loss is dpo + w * (mean over the best answer's tokens of -log pi).
    """

    def __init__(self, cache: ReferenceCache, beta: float, sft_weight: float = 0.0):
        self.cache, self.beta, self.sft_weight = cache, beta, sft_weight

    def units(self, batch: Batch) -> int:
        return len(batch.sizes)

    def sums(self, token_logps: Tensor, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        ref = self.cache[rows].to(token_logps.device)
        loss, chosen, rejected, accuracy = dpo_loss(token_logps, ref, batch.response, batch.sizes, self.beta)
        metrics = dict(accuracy=accuracy, margin=chosen - rejected, chosen_reward=chosen, rejected_reward=rejected)
        if self.sft_weight:
            metrics["chosen_nll"] = nll = chosen_nll(token_logps, batch.response, batch.sizes)
            loss = loss + self.sft_weight * nll
        return {"loss": loss.sum(), **{name: value.detach().sum() for name, value in metrics.items()}}


class Plan(NamedTuple):
    """How a stage goes through its rows.

    A *pass* is the rows of one forward and backward. Which rows share a pass is decided once; epochs shuffle passes.
    Low-precision kernels round by shape and by place in the batch, so only the same pass gives the same bits: the
    reference cached on these passes equals an unchanged policy exactly.
    """

    passes: list[np.ndarray]  # row indices of each
    per_step: int  # passes of one optimizer step
    steps: int
    seed: int

    def visited(self, more: int = 0) -> list[np.ndarray]:
        """The passes that these steps, and some more, come by: all of them, but in a part of the first epoch."""
        count = (self.steps + more) * self.per_step
        return [self.passes[i] for i in np.unique(pass_order(len(self.passes), self.seed, 0, count))]


def plan(data: PackedData, config: StageConfig, seed: int) -> Plan:
    """As few passes as the two limits on tokens allow, nearly equal in size: a step's loss is a mean, so the rows of
    a small pass would weigh more than others in every epoch."""
    rows = min(len(data), max(1, config.batch_tokens // data.row_length))
    per_step = -(-rows // max(1, config.micro_tokens // data.row_length))
    order = np.random.default_rng([seed, 0]).permutation(len(data))
    passes = np.array_split(order, -(-len(data) // -(-rows // per_step)))
    per_step = min(per_step, len(passes))
    steps = max(1, config.min_steps, round(config.epochs * len(passes) / per_step))
    return Plan(passes, per_step, steps, seed)


def pass_order(count: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Passes start..stop of an endless sequence of epochs, each a permutation of its own."""
    epochs = range(start // count, (stop - 1) // count + 1)
    order = np.concatenate([np.random.default_rng([seed, 1 + epoch]).permutation(count) for epoch in epochs])
    first = epochs[0] * count
    return order[start - first : stop - first]


def update(
    model: GPT,
    optimizer: Optimizer,
    objective: Objective,
    batches: list[tuple[np.ndarray, Batch]],
    dtype: torch.dtype,
    scale: float,
) -> dict[str, float]:
    """One optimizer step on a global batch given in micro-batches; the metrics before it, means over its units.

    FloatingPointError, with no weight changed, if the loss or the gradient is not finite.
    """
    device = next(model.parameters()).device
    units = sum(objective.units(batch) for _, batch in batches)
    totals: dict[str, float] = {}
    for rows, batch in batches:
        batch = batch.to(device)
        with autocast(device, dtype):
            read = objective.read(model, batch)
        sums = objective.sums(read, batch, rows)
        (sums["loss"] / units).backward()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value.item() / units
    if not math.isfinite(totals["loss"]):
        raise FloatingPointError(f"the loss is {totals['loss']}")
    totals["grad_norm"] = optimizer.step(scale)
    return totals


class Trainer:
    """One stage. Between two steps all that decides the rest of it is in `state_dict`."""

    def __init__(
        self, model: GPT, data: PackedData, config: StageConfig, objective: Objective, dtype: torch.dtype, seed: int
    ):
        self.model, self.data, self.config, self.objective = model, data, config, objective
        self.dtype, self.seed = dtype, seed
        self.optimizer = Optimizer(model, config)
        self.passes, self.per_step, self.steps, _ = plan(data, config, seed)
        self.step = self.tokens_seen = 0
        self.seconds = 0.0

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors (weights, moments, the state of the random numbers) and plain values (counters).

        Frozen weights are left out. The order of the data is a function of seed and step, and so needs no state.
        """
        tensors = {f"model/{name}": p.detach() for name, p in self.optimizer.named.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self.optimizer.state_dict().items()}
        tensors["rng"] = torch.get_rng_state()
        return tensors, {"step": self.step, "tokens_seen": self.tokens_seen, "seconds": self.seconds}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict):
        """Stand where a `state_dict` was taken. ValueError or KeyError if it is not of a trainer like this one."""
        step, tokens, seconds = (values[name] for name in ("step", "tokens_seen", "seconds"))
        for name, value, most in ("step", step, self.steps), ("tokens_seen", tokens, 2**63), ("seconds", seconds, 1e12):
            if not (type(value) in (int, float) and 0 <= value <= most and (name == "seconds" or type(value) is int)):
                raise ValueError(f"{name} is {value!r}")
        parts = {"model": {}, "optimizer": {}, "rng": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        fitting(parts["rng"], {"": torch.get_rng_state()})
        fitting(parts["model"], self.optimizer.named)
        self.optimizer.load_state_dict(parts["optimizer"], step)
        self.model.load_state_dict(parts["model"], strict=False)  # frozen weights stay
        torch.set_rng_state(parts["rng"][""])
        self.step, self.tokens_seen, self.seconds = step, tokens, seconds

    def run(self) -> Iterator[dict]:
        """Train to the end of the stage, from wherever it stands; the metrics of every step, as it is made.

        UserError, with the weights of the step before, where the loss or the gradient is not finite.
        """
        self.model.train()
        started = time.perf_counter() - self.seconds
        while self.step < self.steps:
            first = self.step * self.per_step
            order = pass_order(len(self.passes), self.seed, first, first + self.per_step)
            batches = [(self.passes[i], self.data.batch(self.passes[i])) for i in order]
            scale = schedule(self.config, self.step, self.steps)
            try:
                metrics = update(self.model, self.optimizer, self.objective, batches, self.dtype, scale)
            except FloatingPointError as e:
                raise UserError(f"step {self.step}: {e}; lower the learning rates lr and adam-lr of the stage") from e
            self.tokens_seen += sum(int((batch.group >= 0).sum()) for _, batch in batches)
            self.seconds = time.perf_counter() - started
            position = {"step": self.step, "steps": self.steps}
            self.step += 1
            yield {
                **position,
                **metrics,
                "lr": self.config.lr * scale,
                "tokens_seen": self.tokens_seen,
                "seconds": self.seconds,
            }
        self.model.eval()
