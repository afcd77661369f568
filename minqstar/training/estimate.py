"""How much memory and time a stage takes, found before any is spent: its passes run on tensors without storage.

The code that runs is the model's own, forward and backward, so the figures follow whatever the model does.
"""

import timeit
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from minqstar.lm.attention import Seen, prepare
from minqstar.lm.lora import LoRAConfig, add_lora
from minqstar.lm.model import GPT, GPTConfig
from minqstar.training.data import Batch, PackedData
from minqstar.training.scoring import autocast, token_logps
from minqstar.training.trainer import StageConfig, plan

DEPTHS = (2, 3)  # blocks of the models that run; bytes and operations grow with each block alike
KEPT = 1.5  # of a pass on a CPU the C library holds so much more than is alive: 1.3 to 1.6 times, as measured
REACHED = 0.5  # share of the machine's rate of products that training reaches, about


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not tensor.is_sparse:  # whose values are tensors of their own
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, self.bytes)
        return made

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.alive.values())


@dataclass(frozen=True)
class Prepared(Batch):
    """A batch whose mask is made, since its spans are read off real numbers."""

    seen: Seen

    def mask(self) -> Seen:
        return self.seen


@dataclass(frozen=True)
class Estimate:
    """What a stage takes; bytes, unless said."""

    parameters: int  # numbers
    trained: int  # of these
    weights: int
    moments: int  # of the optimizer
    step: int  # gradients and activations, where they are most
    cache: int  # the reference's log-probs
    tokens: int  # passed over in all steps, padding included
    steps: int
    flops: float  # of all steps, floating-point operations

    @property
    def peak(self) -> int:
        """The most memory that is held at once. At the end of DPO the reference is there too, and a merged copy."""
        merged = self.weights if self.trained < self.parameters else 0
        return self.moments + self.cache + self.weights + max(self.step, self.weights + merged)

    def table(self, name: str, seconds: float, here: int) -> Table:
        """All of it, with the `seconds` of its operations and the bytes that the program holds now, in a table."""
        minutes, gb = seconds / 60, 1e9
        lines = {
            "parameters": f"{self.parameters:,}",
            "of these trained": f"{self.trained:,}",
            "weights": f"{self.weights / gb:.3f} GB",
            "moments of the optimizer": f"{self.moments / gb:.3f} GB",
            "gradients and activations of one pass": f"{self.step / gb:.3f} GB",
            "the reference's log-probs": f"{self.cache / gb:.3f} GB",
            "the program itself": f"{here / gb:.3f} GB",
            "memory at its peak": f"{(self.peak + here) / gb:.3f} GB",
            "optimizer steps": f"{self.steps:,}",
            "tokens, padding included": f"{self.tokens:,}",
            "minutes, about": f"{minutes:.1f}" if minutes < 10 else f"{minutes:,.0f}",
        }
        table = Table(name, "", box=None, pad_edge=False)
        for line in lines.items():
            table.add_row(*line)
        return table


def estimate(
    architecture: GPTConfig, data: PackedData, config: StageConfig, seed: int, dtype: torch.dtype,
    lora: LoRAConfig, recompute: bool, reference: bool,
) -> Estimate:  # fmt: skip
    """What a stage takes, `reference` if it scores its rows under one first. No weight is made."""
    planned = plan(data, config, seed)
    passes, per_step, steps, _ = planned
    rows = max(passes, key=lambda rows: int((data.first_scored[rows + 1] - data.first_scored[rows]).sum()))
    batch = data.batch(rows)
    seen = prepare(batch.mask(), dtype)
    small = [_one_pass(replace(architecture, n_layer=n), batch, seen, dtype, lora, recompute) for n in DEPTHS]
    deep = {key: one + (architecture.n_layer - DEPTHS[0]) * (two - one)
            for key, one, two in ((key, *(of[key] for of in small)) for key in small[0])}  # fmt: skip
    matrices = config.matrices == "muon"
    scored = len(planned.visited()) * reference  # passes of the reference, forward alone
    return Estimate(
        parameters=deep["parameters"],
        trained=deep["trained"],
        weights=4 * deep["parameters"],
        moments=4 * (2 * deep["trained"] - matrices * deep["matrices"]),  # Muon has one a weight, AdamW two
        step=4 * deep["trained"] + round(KEPT * (deep["peak"] - 4 * (deep["parameters"] + deep["trained"]))),
        cache=4 * data.num_scored * reference,
        tokens=steps * per_step * len(rows) * data.row_length,
        steps=steps,
        flops=steps * per_step * deep["flops"] + scored * deep["forward"],
    )


def _one_pass(
    architecture: GPTConfig, batch: Batch, seen: Seen, dtype: torch.dtype, lora: LoRAConfig, recompute: bool
) -> dict[str, int]:
    """Parameters, the most bytes alive, and operations, of one forward and backward."""
    with FakeTensorMode(allow_non_fake_inputs=True), Living() as living:
        model = GPT(architecture)
        if lora.rank:
            add_lora(model, lora, 0)
        model.recompute = recompute
        living.peak = living.bytes
        given = Prepared(**vars(batch), seen=seen)
        with FlopCounterMode(display=False) as counter:
            with autocast(torch.device("cpu"), dtype):
                logps = token_logps(model, given)
            forward = counter.get_total_flops()
            logps.sum().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return {
            "parameters": model.num_parameters(),
            "trained": sum(p.numel() for p in trained.values()),
            "matrices": sum(p.numel() for name, p in trained.items() if name.startswith("blocks.") and p.ndim == 2),
            "peak": living.peak,
            "forward": forward,
            "flops": counter.get_total_flops(),
        }


def rate(dtype: torch.dtype, device: torch.device, n: int = 1024) -> float:
    """Floating-point operations per second of an n x n product, the best of five."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(timeit.repeat(lambda: (a @ b).sum().item(), number=1, repeat=5))
