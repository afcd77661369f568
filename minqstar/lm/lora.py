"""LoRA: train a product of two thin matrices beside each weight, and leave the weight as it is (arXiv 2106.09685).

y = x W^T + scale (x A^T) B^T, scale = alpha / rank. A (rank, in) is drawn at random and B (out, rank) starts at zero,
so an untrained adapter adds exactly 0. The model without its adapter *is* the reference: see `base_model`.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqstar.errors import UserError, fitting, require
from minqstar.lm.fast import twin
from minqstar.lm.model import GPT

LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # the linear layers of a block, of every family


@dataclass(frozen=True)
class LoRAConfig:
    """The adapter: how large, and where."""

    rank: int = 0
    """Rank of the trained update of each matrix (LoRA); 0 trains the weights themselves."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank."""
    on: tuple[str, ...] = LAYERS
    """Which linear layers of the blocks have an update."""

    def __post_init__(self):
        good = type(self.rank) is int and 0 <= self.rank <= 2**16
        require(good, f"rank must be a whole number between 0 and 65,536, got {self.rank!r}")
        require(0 < self.alpha < math.inf, f"alpha must be positive and finite, got {self.alpha}")
        object.__setattr__(self, "on", tuple(self.on))  # from JSON it comes as a list
        odd = [name for name in self.on if name not in LAYERS]
        require(not odd, f"LoRA on {', '.join(odd)}: there is no such layer; there are {', '.join(LAYERS)}")
        require(bool(self.on), f"LoRA must be on one of {', '.join(LAYERS)}")


class LoRALinear(nn.Module):
    """A linear layer with frozen weights, plus the trained update of low rank."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        bound = base.in_features**-0.5  # kaiming_uniform_(a=sqrt(5)), as a fresh nn.Linear has it
        drawn = (2 * torch.rand(rank, base.in_features, generator=generator) - 1) * bound
        self.lora_a = nn.Parameter(drawn.to(base.weight))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_a) * self.scale, self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The layer of the weight W + scale B A, in the place of the frozen one."""
        self.base.weight += self.scale * (self.lora_b @ self.lora_a)
        return self.base


def add_lora(model: GPT, config: LoRAConfig, seed: int):
    """Freeze every weight, and put an untrained adapter on the layers that the configuration names.

    No global random number is drawn. UserError if the rank is 0, or if the model has an adapter already.
    """
    require(config.rank > 0, "LoRA needs a rank above 0")
    require(not adapter_tensors(model), "the model has an adapter already; merge it first")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    chosen = [f"blocks.{i}.{name}" for i in range(len(model.blocks)) for name in LAYERS if name in config.on]
    for name in chosen:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), config.rank, config.alpha, generator))


def adapter_tensors(model: GPT) -> dict[str, Tensor]:
    """A (rank, in) and B (out, rank) of every adapted layer by name: all that training changes, to be saved alone."""
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith((".lora_a", ".lora_b"))}


@torch.no_grad()
def load_adapter(model: GPT, tensors: dict[str, Tensor]):
    """Put saved `adapter_tensors` back. UserError if they are of other layers, ranks, sizes or types."""
    own = adapter_tensors(model)
    try:
        fitting(tensors, own)
    except ValueError as e:
        raise UserError(f"the adapter does not fit this model: {e}") from e
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def base_model(model: GPT) -> GPT:
    """The model without its adapter: a plain GPT that holds the very same frozen weights, not a copy of them.

    Compiled in bfloat16 it rounds otherwise than the adapted model, which is another graph. The reference that an
    untrained policy equals bit for bit is there the adapted model itself, before it is trained.
    """
    return _without_adapter(twin(model), lambda layer: layer.base)


def merged(model: GPT) -> GPT:
    """A plain GPT of its own memory, of the weights W + scale B A: the adapted model up to rounding."""
    return _without_adapter(copy.deepcopy(model), LoRALinear.merged).requires_grad_(True)


def _without_adapter(model: GPT, plain: Callable[[LoRALinear], nn.Linear]) -> GPT:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            model.set_submodule(name, plain(layer))
    return model
