"""Muon for the blocks' matrices, AdamW for the rest, and one learning-rate schedule for both."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minqstar.errors import fitting, require


@dataclass(frozen=True)
class OptimConfig:
    matrices: Literal["muon", "adamw"] = "muon"
    """What updates the blocks' matrices: Muon learns in fewer steps, AdamW steps faster where models are wide."""
    lr: float = 0.02
    """Peak learning rate of the blocks' matrices."""
    adam_lr: float = 0.02
    """Peak learning rate of AdamW (the rest: the embedding, which is the head too, norms and biases)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of both."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to zero after the warm-up."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from zero."""
    clip: float = 1.0
    """Bound on the global gradient norm."""

    def __post_init__(self):
        for name in ("lr", "adam_lr", "clip"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} must be positive and finite, got {value}")
        require(
            0 <= self.weight_decay < math.inf, f"weight_decay must be finite and not negative, got {self.weight_decay}"
        )
        require(0 <= self.warmup <= 1, f"warmup is a share of the steps, between 0 and 1, got {self.warmup}")


class Muon(torch.optim.Muon):
    """torch's Muon, its state and its update (arXiv 2502.16982), with matrices of one shape orthogonalised together.

    One by one, small matrices spend most of the time between kernels.
    """

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        params = group["params"]
        grads = [p.grad for p in params]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        moments = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(moments, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, moments, momentum)  # Nesterov's
        if decay:
            torch._foreach_mul_(params, 1 - lr * decay)
        wide = [u if u.shape[0] <= u.shape[1] else u.T for u in updates]
        for shape in {u.shape for u in wide}:
            of_shape = [i for i, u in enumerate(wide) if u.shape == shape]
            directions = orthogonalize(torch.stack([wide[i] for i in of_shape]), *group["ns_coefficients"])
            for i, direction in zip(of_shape, directions, strict=True):
                rows, columns = params[i].shape
                direction = direction if rows <= columns else direction.T
                params[i].add_(direction, alpha=-lr * math.sqrt(max(1, rows / columns)))


def orthogonalize(x: Tensor, a: float, b: float, c: float, steps: int = 5) -> Tensor:
    """Every matrix of (N, rows, columns) with singular values brought near 1: Newton-Schulz steps in bfloat16."""
    x = x.bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Optimizer:
    """Two torch optimizers that step together, or one of them, on the weights that are not frozen."""

    def __init__(self, model: nn.Module, config: OptimConfig):
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        require(bool(self.named), "every weight of the model is frozen: there is nothing to train")
        matrices = [p for name, p in self.named.items() if name.startswith("blocks.") and p.ndim == 2]
        taken = {id(p) for p in matrices}
        others = [p for p in self.named.values() if id(p) not in taken]
        decay = {"weight_decay": config.weight_decay}
        adam = {"betas": (0.9, 0.95), "fused": True, **decay}
        self.clip = config.clip
        self.parts, self.peaks = [], []
        if matrices:
            muon = config.matrices == "muon"
            self.parts.append(Muon(matrices, **decay) if muon else torch.optim.AdamW(matrices, **adam))
            self.peaks.append(config.lr)
        if others:  # an adapter, say, has none
            self.parts.append(torch.optim.AdamW(others, **adam))
            self.peaks.append(config.adam_lr)

    def step(self, scale: float) -> float:
        """One update at `scale` times the peak learning rates; clears the gradients, returns their global norm.

        FloatingPointError if that norm is not finite, with no weight changed, or if the weights then overflow.
        """
        for p in self.named.values():
            if p.grad is not None and p.grad.is_sparse:  # an embedding whose tied head the loss does not use
                p.grad = p.grad.to_dense()
        norm = nn.utils.clip_grad_norm_(self.named.values(), self.clip)
        if not norm.isfinite():
            raise FloatingPointError("the gradient is not finite")
        for part, peak in zip(self.parts, self.peaks, strict=True):
            part.param_groups[0]["lr"] = peak * scale
            part.step()
            part.zero_grad(set_to_none=True)
        with torch.no_grad():
            norms = torch.stack(torch._foreach_norm(list(self.named.values())))
        if not norms.isfinite().all():
            raise FloatingPointError("the weights overflow")
        return norm.item()

    def state_dict(self) -> dict[str, Tensor]:
        """Every moment as `weight/key`: flat, so that it can be stored without pickle."""
        name_of = {p: name for name, p in self.named.items()}
        states = ((name_of[p], state) for part in self.parts for p, state in part.state.items())
        return {f"{name}/{key}": value for name, state in states for key, value in state.items()}

    def moments(self, step: int) -> dict[str, Tensor]:
        """What `state_dict` holds after so many steps: names, and tensors of the shapes and types."""
        if step == 0:
            return {}
        name_of = {p: name for name, p in self.named.items()}
        count = torch.tensor(float(step))
        kinds = {
            Muon: {"momentum_buffer": None},
            torch.optim.AdamW: {"step": count, "exp_avg": None, "exp_avg_sq": None},
        }
        return {
            f"{name_of[p]}/{key}": p if like is None else like
            for part in self.parts
            for p in part.param_groups[0]["params"]
            for key, like in kinds[type(part)].items()
        }

    def load_state_dict(self, state: dict[str, Tensor], step: int):
        """The moments of a `state_dict` of so many steps, moved to the weights' device. ValueError if they do not fit.

        Fused kernels trust shapes and types: whatever does not fit would be read beyond its end.
        """
        fitting(state, self.moments(step))
        part_of = {p: part for part in self.parts for p in part.param_groups[0]["params"]}
        for key, value in state.items():
            name, moment = key.rsplit("/", 1)
            good = value.item() == step if moment == "step" else moment != "exp_avg_sq" or value.min() >= 0
            if not good:
                raise ValueError(f"{key} is out of bounds")
            p = self.named[name]
            part_of[p].state[p][moment] = value.to(p.device, copy=True)


def schedule(config: OptimConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate at a step in [0, steps): a linear warm-up, then the decay."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)  # 1 at the end of the warm-up, above 0 at the last step
    return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[config.schedule]
