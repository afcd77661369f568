"""Why it is fast: what each lever is worth, and how time and memory grow with the work.

    python -m minqstar.lab.bench.levers              # the same work with and without each lever, in turns
    python -m minqstar.lab.bench.levers --growth     # the same work, larger and larger

A lever is one thing that is done for speed alone. Each is taken away by itself, while the others stay. Training is the
main job's: SFT of the default model on summaries of the TL;DR world, 2,880 tokens a step. The rest is the bench's work.
"""

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from minqstar.cli import run
from minqstar.console import Console
from minqstar.errors import UserError, require
from minqstar.lab.bench.compare import process
from minqstar.lab.bench.sides import Pieces, decoding, searching
from minqstar.lab.bench.turns import alternate
from minqstar.lab.bench.work import CPU, SIZES, Work, train_dtype
from minqstar.lm.fast import compiled
from minqstar.lm.model import GPT, GPTConfig
from minqstar.lm.tokenizer import load_tokenizer
from minqstar.training.data import Batch, PackedData, tokenize
from minqstar.training.scoring import autocast, token_logps
from minqstar.training.trainer import SFT, SFTConfig, Trainer
from minqstar.world.tldr import DataConfig, World, draw_rows

# ---- the work


def training(
    shared: bool = True, row_length: int = 360, dtype: torch.dtype | None = None, compile: bool = False,
    live_reference: bool = False,
) -> Pieces:  # fmt: skip
    """SFT steps; units are responses. Not `shared`: a copy of the prompt stands before every response."""
    tokenizer, dtype = load_tokenizer(), dtype or train_dtype()
    rows = list(draw_rows(World(tokenizer), DataConfig(sft=1600), "sft"))
    groups, _ = tokenize(rows, tokenizer, 1024, share=shared)
    data = PackedData(groups, tokenizer.pad, row_length)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab))
    model = compiled(model) if compile else model
    trainer = Trainer(model, data, SFTConfig(row_length=row_length, min_steps=10**6), SFT(), dtype, 0)
    for _ in trainer.run():
        if live_reference:
            with torch.no_grad(), autocast(CPU, dtype):
                token_logps(model, data.batch(trainer.passes[trainer.step % len(trainer.passes)]))
        yield data.responses_in_row.sum() / len(trainer.passes)  # the mean


def tokens(size: str = "tiny", beams: int = 0, compile: bool = False) -> Pieces:
    """Sixteen new tokens after one prompt."""
    return decoding(replace(SIZES[size], new_tokens=16), Work("decode", beams=beams), compile)


def trees(at_once: int) -> Pieces:
    return searching(SIZES["tiny"], Work("mcts", batch=at_once, simulations=32))


# ---- what stands in for a lever that is taken away


def head_everywhere(model: GPT, batch: Batch) -> Tensor:
    logits = model.logits(model(batch.tokens, batch.positions, batch.mask(), before=batch.before))
    return logits.float().log_softmax(-1).flatten(0, 1)[batch.source, batch.target]


def plain_rms_norm(x: Tensor, eps: float = 1e-6, gains: None = None) -> Tensor:
    return x * torch.rsqrt(torch.linalg.vecdot(x, x)[..., None] / x.shape[-1] + eps)


def fused(q: Tensor, k: Tensor, v: Tensor, seen) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.bias)


gpt2 = partial(tokens, "gpt2")
PLAIN = {"lm.model.rms_norm": plain_rms_norm, "lm.model.SquaredReLU.apply": lambda x: F.relu(x).square()}
LEVERS: dict[str, tuple[Callable[[], Pieces], Callable[[], Pieces], dict[str, Any]]] = {
    # name: the work with the lever, the work without it, and what else to replace where it is taken away
    "a prompt read once for its four responses": (training, partial(training, shared=False), {}),
    "several groups a row, not one and padding": (training, partial(training, row_length=220), {}),  # one fits
    "head on scored positions only": (training, training, {"training.trainer.token_logps": head_everywhere}),
    "bfloat16 products": (training, partial(training, dtype=torch.float32), {}),
    "attention in spans": (training, training, {"lm.attention.SPAN": 10**9}),
    "attention written out, not the fused kernel": (training, training, {"lm.model.attend": fused}),
    "gradients of norm and activation by hand": (training, training, PLAIN),
    "Muon by shapes, not matrix by matrix": (training, training, {"training.optim.Muon": torch.optim.Muon}),
    "reference cached, not scored at each step": (training, partial(training, live_reference=True), {}),
    "compiled blocks (--compile)": (partial(training, compile=True), training, {}),
    "packed weights: greedy, gpt2": (gpt2, gpt2, {"search.evaluator.packed": lambda model: model}),
    "compiled step: greedy, tiny": (partial(tokens, compile=True), tokens, {}),
    "compiled step: five beams, tiny": (partial(tokens, beams=5, compile=True), partial(tokens, beams=5), {}),
    "sixteen trees a call, not one": (partial(trees, 16), partial(trees, 1), {}),
}


def worth(name: str, rounds: int) -> float:
    """How many times as fast the work is with a lever: a ratio of the median seconds of a unit."""
    with_it, without_it, replaced = LEVERS[name]
    sides = [(with_it(), {}), (without_it(), replaced)]
    spent: list[list[float]] = [[], []]
    for _ in range(rounds + 3):
        for seconds, (work, patches) in zip(spent, sides, strict=True):
            with ExitStack() as stack:
                for place, value in patches.items():
                    stack.enter_context(patch(f"minqstar.{place}", value))
                started = time.perf_counter()
                units = next(work)
                seconds.append((time.perf_counter() - started) / units)
    ours, others = (statistics.median(seconds[3:]) for seconds in spent)  # the first three warm up
    return others / ours


# ---- how time and memory grow

MEASURES = {  # what grows: the work, the option, its first value, and the k that is expected of time as n^k
    "tokens of a text": (Work("train"), "length", 1, "1 to 2: products, attention"),
    "vocabulary": (Work("train"), "vocabulary", 512, "0 to 1: only the head grows"),
    "batch": (Work("decode"), "batch", 1, "0 to 1: weights are read once"),
    "beam width": (Work("decode"), "beams", 2, "0 to 1: weights and prompt are read once"),
    "simulations": (Work("mcts"), "simulations", 32, "1: a call each"),
}


def growth(name: str, rounds: int) -> dict:
    """Seconds and memory of one pair, or of one call for all prompts, while the option doubles three times."""
    first, option, start, _ = MEASURES[name]
    works = [replace(first, **{option: start * 2**i}) for i in range(4)]
    turns, failed = alternate({str(i): process(work, "ours") for i, work in enumerate(works)}, rounds)
    for error in failed.values():
        raise error
    seconds = []
    for work, of in zip(works, turns.values(), strict=True):
        units = {"train": 1, "decode": work.batch * work.scaled().new_tokens, "mcts": work.batch * work.simulations}
        seconds.append(units[work.what] / statistics.median(turn.rate for turn in of))
    return {
        "values": [getattr(work, option) for work in works],
        "seconds": seconds,
        "peak_gb": [of[-1].peak_gb for of in turns.values()],
        "order": math.log2(seconds[-1] / seconds[0]) / 3,
    }


@dataclass(frozen=True)
class Options:
    """Measure what each lever is worth, or how time and memory grow with the work."""

    growth: bool = False
    """Double one measure of the work at a time, three times, in place of taking levers away."""
    only: str = ""
    """Only the levers, or with --growth the measures, whose name holds this text."""
    rounds: int = 15
    """How often the sides take turns; the medians count."""
    json: bool = False
    """Print one JSON object: for each lever how many times as fast the work is with it; with --growth for each measure
    its `values`, `seconds` and `peak_gb`, and the `order` k of n^k."""

    def __post_init__(self):
        require(self.rounds > 0, f"rounds must be positive, got {self.rounds}")
        require(bool(self.names()), f"no {'measure' if self.growth else 'lever'} has {self.only!r} in its name")

    def names(self) -> list[str]:
        return [name for name in (MEASURES if self.growth else LEVERS) if self.only in name]


def main(options: Options):
    measure, found = growth if options.growth else worth, {}
    for name in options.names():
        try:
            found[name] = measure(name, options.rounds)
        except UserError as e:
            warnings.warn(f"{name} is not measured: {e}", stacklevel=1)
    if options.json:
        print(json.dumps(found))
        return
    if options.growth:
        table = Table("measure", "from, to", "ms", "times as long", "k", "expected k", "peak GB")
        for name, of in found.items():
            (n, *_, most), (first, *later), (gb, *_, most_gb) = of["values"], of["seconds"], of["peak_gb"]
            ratios = " ".join(f"{seconds / first:.1f}" for seconds in later)
            cells = f"{n} to {most:,}", f"{1e3 * first:.3g}", ratios, f"{of['order']:.2f}", MEASURES[name][3]
            table.add_row(name, *cells, f"{gb:.1f} to {most_gb:.1f}")
    else:
        table = Table("lever", "times as fast")
        for name, ratio in found.items():
            table.add_row(name, f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    run(main, Options, prog="python -m minqstar.lab.bench.levers")
