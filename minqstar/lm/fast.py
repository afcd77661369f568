"""What makes the same model faster on the machine at hand: number types, packed weights, compiled graphs."""

import copy
import warnings
from functools import cache

import torch
from torch import Tensor, nn

from minqstar.errors import first_line
from minqstar.lm.model import GPT


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones: GPUs since Ampere, CPUs with the instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def twin(model: GPT) -> GPT:
    """New modules that hold the very same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class PackedLinear(nn.Module):
    """A frozen bfloat16 layer in the blocked layout that oneDNN prefers: few rows are multiplied twice as fast.

    The two operations are those with which torch.compile freezes a linear layer on a CPU.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1), bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packed(model: GPT) -> GPT:
    """For decoding: a bfloat16 model on a CPU with its matrices packed, as they are now; any other model as it is."""
    weight = model.wte.weight
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not has_fast_bf16(weight.device):
        return model
    model = twin(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child.weight, child.bias))
    if model.config.tied:
        model.packed_head = PackedLinear(weight, None)
    return model


def compiled(model: GPT) -> GPT:
    """For training: the same weights, in blocks that share one compiled graph for each shape of a batch."""
    if not can_compile(model.wte.weight.device):
        return model
    model = twin(model)
    for block in model.blocks:
        block.compile(dynamic=block is model.blocks[-1])  # which goes on with as many tokens as are scored
    return model


@cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, tried on a small function; if it does not, one warning says why."""
    try:
        torch.compile(lambda x: (x * 2).sin(), dynamic=False)(torch.ones(8, device=device))
    except Exception as e:  # whatever a missing or broken compiler raises
        warnings.warn(f"torch.compile does not work here ({first_line(e)}); going on without it", stacklevel=2)
        return False
    return True
