"""How fast: training, decoding and tree search, beside the big frameworks on the same machine at the same time.

    python -m minqstar.lab.bench train --size tiny --peer trl
    python -m minqstar.lab.bench decode --size gpt2 --peer transformers --beams 5
    python -m minqstar.lab.bench decode --model FOLDER --peer transformers    # somebody's checkpoint
    python -m minqstar.lab.bench mcts --size tiny --peer transformers
    python -m minqstar.lab.bench train --model MODEL --data prefs.jsonl --peer trl

Without a FOLDER both sides get GPT-2's architecture with equally many parameters, random weights, and random texts of
the same lengths. Each is a process of its own, and the processes take turns (A B A B …): a slow minute of the machine
slows both.
"""

import json
import statistics
import sys
import timeit
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Literal

import numpy as np
import torch
from rich.table import Table

from minqstar.console import Console
from minqstar.errors import require
from minqstar.lab.bench.sides import SIDES
from minqstar.lab.bench.turns import Process, alternate, side
from minqstar.lab.bench.work import CPU, Work, texts, train_dtype
from minqstar.lm.borrowed import load_borrowed
from minqstar.lm.memory import require_memory
from minqstar.lm.model import GPT
from minqstar.lm.pretrained import pretrained_config

UNITS = {"train": "pairs/s", "decode": "new tokens/s", "mcts": "simulations/s"}
NEEDS = (
    ("batch", "WHAT decode mcts"),
    ("beams", "WHAT decode"),
    ("simulations", "WHAT mcts"),
    ("model", "WHAT decode train"),
    ("data", "WHAT train"),
    ("size vocabulary", "no --model"),
    ("length", "no --data"),
)


@dataclass(frozen=True)
class Options(Work):
    """Measure training, decoding or tree search, alone or beside a peer."""

    peer: Literal["none", "trl", "transformers"] = "none"
    """Whom to measure beside: trl for train (eager, without a model compiled too), transformers for decode and mcts."""
    rounds: int = 15
    """How often the sides take turns."""
    json: bool = False
    """Print one JSON object: medians of `ours` and `peer`, each in its faster form (eager or compiled), in units per
    second, and the median `ratio` of two turns side by side; `cpu_seconds` of a unit, all threads together, of both and
    their `cpu_ratio`; peak memory of both in GB; the machine's own `limit` in the same units, and the `share_of_limit`
    that ours reaches; all `sides`, the `options`, versions and threads."""

    def __post_init__(self):
        super().__post_init__()
        require(self.rounds > 0, f"rounds must be positive, got {self.rounds}")
        fits = self.peer == "none" or (self.peer == "trl") == (self.what == "train")
        require(fits, f"{self.what} has the peer {'trl' if self.what == 'train' else 'transformers'}, not {self.peer}")
        if self.what != "train":
            needed = len(self.sides()) * self.memory()
            require_memory(needed, "the sides together", "batch, beams or simulations", CPU)

    def sides(self) -> list[str]:
        return [name for what, name in SIDES if what == self.job and name.startswith(("ours", self.peer))]


def process(work: Work, name: str) -> Process:
    """A side in a process of its own."""
    what = {field.name: getattr(work, field.name) for field in fields(Work)}
    return side(name, [sys.executable, "-m", "minqstar.lab.bench.sides", name, json.dumps(what, default=str)])


# ---- what the machine could do


def matmul_rate(dtype: torch.dtype, n: int = 2048) -> float:
    """Floating point operations per second of an n x n product, the best of six."""
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    return 2 * n**3 / min(timeit.repeat(lambda: a @ b, number=1, repeat=6))


def read_rate() -> float:
    """Bytes per second read by a sum over 512 MB, the best of six."""
    x = torch.ones(2**27)
    return 4 * len(x) / min(timeit.repeat(x.sum, number=1, repeat=6))


def limit(work: Work) -> tuple[float, str]:
    """The most units per second that the machine could do, and what that rests on."""
    size = work.scaled()
    C, L = size.n_embd, size.n_layer
    blocks, head, times = 12 * L * C**2, size.vocab_size * C, 6  # weights; operations for each and every token
    if work.model:
        with torch.device("meta"):
            blocks = sum(p.numel() for p in GPT(pretrained_config(work.model)).blocks.parameters())
    if work.what == "train":
        pairs = texts(size, 200)
        if work.data:
            groups, times = work.pairs(load_borrowed(work.model))[1], 8  # two of them for the reference
            pairs = [(group.prompt, *(ids[:-1] for ids in group.responses)) for group in groups]
        scored = np.mean([len(c) + len(r) + 2 for _, c, r in pairs])
        tokens = np.mean([len(p) for p, _, _ in pairs]) + scored
        keys = np.mean([len(p) + len(c) / 2 for p, c, _ in pairs]) / 2  # that a token sees
        flops = times * (tokens * (blocks + 2 * L * C * keys) + scored * head)
        rate, dtype = matmul_rate(train_dtype()), str(train_dtype()).removeprefix("torch.")
        return rate / flops, f"{rate / 1e9:.0f} GFLOP/s of {dtype} products, {flops / 1e9:.2f} GFLOP a pair"
    rate, weights = read_rate(), (blocks + head) * size.dtype.itemsize  # a call reads every weight once
    return work.batch * rate / weights, f"{rate / 1e9:.1f} GB/s read, {weights / 1e6:.0f} MB of weights a call"


# ---- the report


def main(options: Options):
    turns, failed = alternate({name: process(options, name) for name in options.sides()}, options.rounds)
    rates = {name: [turn.rate for turn in of] for name, of in turns.items()}
    sides = {
        name: {
            "median": statistics.median(of),
            "slowest": min(of),
            "fastest": max(of),
            "cpu_seconds": statistics.median(turn.cpu_seconds for turn in turns[name]),
            "peak_gb": turns[name][-1].peak_gb,
        }
        for name, of in rates.items()
    }

    def best(start: str) -> str:
        """The fastest of the sides whose names begin so. UserError if none could be measured."""
        names = [name for name in sides if name.startswith(start)]
        require(bool(names), "; ".join(str(e) for name, e in failed.items() if name.startswith(start)))
        return max(names, key=lambda name: sides[name]["median"])

    ours, peer = best("ours"), None if options.peer == "none" else best(options.peer)
    ratios = peer and [a / b for a, b in zip(rates[ours], rates[peer], strict=True)]
    cpu = [name and sides[name]["cpu_seconds"] for name in (ours, peer)]
    most, why = limit(options)
    libraries = ["torch", "numpy", *{"none": [], "trl": ["trl", "transformers"]}.get(options.peer, [options.peer])]
    report = {
        "ours": sides[ours]["median"],
        "peer": peer and sides[peer]["median"],
        "ratio": peer and statistics.median(ratios),
        "ours_cpu_seconds": cpu[0],
        "peer_cpu_seconds": cpu[1],
        "cpu_ratio": peer and cpu[0] / cpu[1],
        "ours_peak_gb": sides[ours]["peak_gb"],
        "peer_peak_gb": peer and sides[peer]["peak_gb"],
        "limit": most,
        "share_of_limit": sides[ours]["median"] / most,
        "versions": {name: version(name) for name in libraries},
        "sides": sides,
        "options": {name: value for name, value in asdict(options).items() if name != "json"},
        "threads": torch.get_num_threads(),
    }
    if options.json:
        print(json.dumps(report, default=str))
        return
    unit, console = UNITS[options.what], Console()
    columns = "side", unit, "slowest", "fastest", "CPU-s a unit", "peak GB"
    table = Table(*columns, title=f"{options.what}, {options.model or options.size}")
    for name, of in sides.items():
        table.add_row(name, *(f"{value:.4g}" for value in of.values()))
    console.print(table)
    for reason in failed.values():
        console.print(f"not measured: {reason}")
    if peer:
        console.print(f"ratio of {ours} to {peer}: {report['ratio']:.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
        console.print(f"ratio of their CPU-seconds a unit: {report['cpu_ratio']:.2f}")
    console.print(f"limit: {most:.4g} {unit} ({why}); {ours} reaches {report['share_of_limit']:.1%}")
