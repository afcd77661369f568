"""What made it fast: the same work with and without each lever, the two taking turns.

    python -m minqstar.lab.bench.levers

Training is the main job's: the default model on summaries of the TL;DR world, 2,880 tokens a step. Decoding is the
bench's. Each lever is taken away by itself, the others stay.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from minqstar.cli import run
from minqstar.console import Console
from minqstar.errors import require
from minqstar.lab.bench.workloads import CPU, SIZES, Endless, random_model, texts, train_dtype
from minqstar.lm.fast import compiled
from minqstar.lm.model import GPT, GPTConfig
from minqstar.lm.tokenizer import load_tokenizer
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import decode, greedy
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.training.data import Batch, PackedData, tokenize
from minqstar.training.scoring import autocast, token_logps
from minqstar.training.trainer import SFT, SFTConfig, Trainer
from minqstar.world.tldr import DataConfig, World, draw_rows

Work = Iterator[float]  # does a piece of work at each step, and says how many units it was


def training(
    shared: bool = True,
    row_length: int = 360,
    dtype: torch.dtype | None = None,
    fast: Callable[[GPT], GPT] = lambda model: model,
    live_reference: bool = False,
) -> Work:
    """SFT steps; units are responses. Not shared: every response after a copy of its prompt."""
    tokenizer, dtype = load_tokenizer(), dtype or train_dtype()
    rows = list(draw_rows(World(tokenizer), DataConfig(sft=1600), "sft"))
    groups, _ = tokenize(rows, tokenizer, 1024, share=shared)
    data = PackedData(groups, tokenizer.pad, row_length)
    torch.manual_seed(0)
    model = fast(GPT(GPTConfig(vocab_size=tokenizer.n_vocab)))
    trainer = Trainer(model, data, SFTConfig(row_length=row_length, min_steps=10**6), SFT(), dtype, 0)
    for _ in trainer.run():
        if live_reference:
            with torch.no_grad(), autocast(CPU, dtype):
                token_logps(model, data.batch(trainer.passes[trainer.step % len(trainer.passes)]))
        yield data.responses_in_row.sum() / len(trainer.passes)  # on average


def one_group_a_row() -> Work:
    """Rows as long as the longest group, one group in each: padding instead of packing."""
    return training(row_length=220)


def decoding(size: str = "tiny", beams: int = 0, fast: bool = False) -> Work:
    """Greedy or by beams, one prompt; units are tokens."""
    kind = SIZES[size]
    prompts, model = [prompt for prompt, _, _ in texts(kind, 1)], random_model(kind).to(kind.dtype).eval()
    what = (Endless(model, compiled=fast), prompts, kind.vocab_size - 2, 16)
    while True:
        beam_search(*what, BeamConfig(beams)) if beams else decode(*what, greedy)
        yield 16.0


def trees(at_once: int) -> Work:
    """Tree searches of 16 prompts; units are trees."""
    kind = SIZES["tiny"]
    prompts, evaluator = [prompt for prompt, _, _ in texts(kind, 16)], Endless(random_model(kind).eval())
    while True:
        for start in range(0, 16, at_once):
            mcts(evaluator, prompts[start : start + at_once], 510, 8, MCTSConfig(budget=40, leaf="value"))
        yield 16.0


def head_everywhere(model: GPT, batch: Batch) -> Tensor:
    logits = model.logits(model(batch.tokens, batch.positions, batch.mask(), before=batch.before))
    return logits.float().log_softmax(-1).flatten(0, 1)[batch.source, batch.target]


def plain_rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(torch.linalg.vecdot(x, x)[..., None] / x.shape[-1] + 1e-6)


def fused(q: Tensor, k: Tensor, v: Tensor, seen) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.bias)


PLAIN = {
    "lm.model.rms_norm": plain_rms_norm,
    "lm.model.SquaredReLU": SimpleNamespace(apply=lambda x: F.relu(x).square()),
}

LEVERS: dict[str, tuple[Callable[[], Work], Callable[[], Work], dict[str, Any]]] = {
    # name: the work with it, the work without it, and what else to replace there
    "a prompt read once for its four responses": (training, partial(training, shared=False), {}),
    "several groups a row, not one and padding": (training, one_group_a_row, {}),
    "head on scored positions only": (training, training, {"training.trainer.token_logps": head_everywhere}),
    "bfloat16 products": (training, partial(training, dtype=torch.float32), {}),
    "attention in spans": (training, training, {"lm.attention.SPAN": 10**9}),
    "attention written out, not the fused kernel": (training, training, {"lm.model.attend": fused}),
    "gradients of norm and activation by hand": (training, training, PLAIN),
    "Muon by shapes, not matrix by matrix": (training, training, {"training.optim.Muon": torch.optim.Muon}),
    "reference cached, not scored at each step": (training, partial(training, live_reference=True), {}),
    "compiled blocks (--compile)": (partial(training, fast=compiled), training, {}),
    "packed weights: greedy, gpt2": (
        partial(decoding, "gpt2"),
        partial(decoding, "gpt2"),
        {"search.evaluator.packed": lambda model: model},
    ),
    "compiled step: greedy, tiny": (partial(decoding, fast=True), decoding, {}),
    "compiled step: five beams, tiny": (partial(decoding, beams=5, fast=True), partial(decoding, beams=5), {}),
    "sixteen trees a call, not one": (partial(trees, 16), partial(trees, 1), {}),
}


@dataclass(frozen=True)
class Options:
    """Measure what each lever is worth."""

    only: str = ""
    """Only the levers whose name holds this text."""
    rounds: int = 15
    """How often both sides take turns, after three that warm up; the medians count."""
    json: bool = False
    """Print one JSON object: how many times as fast with each lever as without it."""

    def __post_init__(self):
        require(self.rounds > 0, f"rounds must be positive, got {self.rounds}")
        require(any(self.only in name for name in LEVERS), f"no lever's name holds {self.only!r}")


def worth(name: str, rounds: int) -> float:
    """How many times as fast with the lever: a ratio of median seconds a unit."""
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
    ours, others = (statistics.median(seconds[3:]) for seconds in spent)
    return others / ours


def main(options: Options):
    names = [name for name in LEVERS if options.only in name]
    found = {name: worth(name, options.rounds) for name in names}
    if options.json:
        print(json.dumps(found))
        return
    table = Table("lever", "times as fast")
    for name, ratio in found.items():
        table.add_row(name, f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    run(main, Options, prog="python -m minqstar.lab.bench.levers")
