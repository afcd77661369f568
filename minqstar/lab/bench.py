"""How fast: training, decoding and tree search, against the big frameworks on the same machine and in the same run.

    python -m minqstar.lab.bench train --size tiny --peer trl
    python -m minqstar.lab.bench decode --size gpt2 --peer transformers --beams 5
    python -m minqstar.lab.bench mcts --size tiny --peer transformers

Both sides get GPT-2's architecture with equal parameters, random weights and random text of the same lengths. Each
measurement is a process of its own; sides take turns (A B A B …), so that what the machine does besides hits both.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from minqstar.cli import UserError, require, run
from minqstar.lab.workloads import SIDES, SIZES, Size, texts, train_dtype

UNITS = {"train": "pairs/s", "decode": "new tokens/s", "mcts": "simulations/s"}


def matmul_rate(dtype: torch.dtype, n: int = 2048) -> float:
    """Floating point operations per second of an n x n product, the best of five."""
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    best = min(timed(lambda: a @ b) for _ in range(6))
    return 2 * n**3 / best


def read_rate() -> float:
    """Bytes per second read by a sum over 512 MB, the best of five."""
    x = torch.ones(2**27)
    return 4 * len(x) / min(timed(x.sum) for _ in range(6))


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def limit(options: "Options", size: Size) -> tuple[float, str]:
    """The most units per second that the machine could do, and what that rests on."""
    C, L = size.n_embd, size.n_layer
    blocks, head = 12 * L * C**2, size.vocab_size * C  # weights
    if options.what == "train":
        pairs = texts(size, 200)
        scored = np.mean([len(c) + len(r) + 2 for _, c, r in pairs])
        tokens = np.mean([len(p) for p, _, _ in pairs]) + scored
        keys = np.mean([len(p) + len(c) / 2 for p, c, _ in pairs]) / 2  # that a token sees
        flops = 6 * (tokens * (blocks + 2 * L * C * keys) + scored * head)
        rate = matmul_rate(train_dtype())
        return (
            rate / flops,
            f"{rate / 1e9:.0f} GFLOP/s of {str(train_dtype())[6:]} products, {flops / 1e9:.2f} GFLOP a pair",
        )
    weights = (blocks + head) * size.dtype.itemsize
    rate = read_rate()
    calls = rate / weights  # a call reads every weight once
    note = f"{rate / 1e9:.1f} GB/s read, {weights / 1e6:.0f} MB of weights a call"
    return calls * options.batch, note


@dataclass(frozen=True)
class Options:
    """Measure training, decoding or tree search, beside a peer."""

    what: Annotated[Literal["train", "decode", "mcts"], tyro.conf.Positional] = "train"
    """Pairs per second of DPO; new tokens per second; simulations per second."""
    size: Literal["tiny", "gpt2"] = "tiny"
    """4 layers of 128 channels and 512 tokens, or GPT-2's 12 of 768 and 50,257."""
    peer: Literal["none", "trl", "transformers"] = "none"
    """Whom to measure beside: trl for train (eager and compiled), transformers for decode and mcts."""
    batch: int = 1
    """Of decode and mcts: prompts at once."""
    beams: int = 0
    """Of decode: beams of each prompt; 0 is greedy."""
    simulations: int = 64
    """Of mcts: leaves of each tree."""
    length: int = 1
    """How many times as long the texts are."""
    vocabulary: int = 0
    """Tokens of the vocabulary; 0 is the size's own."""
    rounds: int = 3
    """How often the sides take turns."""
    json: bool = False
    """Print one JSON object: medians of `ours` and `peer`, each in its faster form (eager or compiled), and their
    `ratio`, in units per second; peak memory of both in GB; the machine's own `limit` in the same units, and the
    `share_of_limit` that ours reaches."""
    side: Annotated[str, tyro.conf.arg(help="Used by the bench itself: measure one side in this process.")] = ""

    def __post_init__(self):
        for name, least in {
            "batch": 1,
            "rounds": 1,
            "simulations": 1,
            "length": 1,
            "beams": 0,
            "vocabulary": 0,
        }.items():
            require(getattr(self, name) >= least, f"{name} must be at least {least}, got {getattr(self, name)}")
        fits = self.peer == "none" or (self.peer == "trl") == (self.what == "train")
        require(fits, f"{self.what} has the peer {'trl' if self.what == 'train' else 'transformers'}, not {self.peer}")


def size_of(options: Options) -> Size:
    size = SIZES[options.size]
    prompts, responses = (tuple(options.length * n for n in span) for span in (size.prompts, size.responses))
    row_length, vocabulary = options.length * size.row_length, options.vocabulary or size.vocab_size
    steps = max(3, size.steps // options.length**2)  # about as long in all
    return replace(
        size, prompts=prompts, responses=responses, row_length=row_length, vocab_size=vocabulary, steps=steps
    )


def measure(options: Options, side: str) -> tuple[float, float]:
    """Units per second and peak memory in GB of one side, in a process of its own."""
    words = [sys.executable, "-m", "minqstar.lab.bench", options.what, "--size", options.size, "--side", side]
    for name in ("batch", "beams", "simulations", "length", "vocabulary"):
        words += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"{side}: {(done.stderr.strip().splitlines() or ['it died'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["rate"], found["peak_gb"]


def main(options: Options):
    size = size_of(options)
    if options.side:
        rate = SIDES[options.what, options.side](size, options)
        print(json.dumps({"rate": rate, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
        return
    taken = ("ours", options.peer)
    rates: dict[str, list[float]] = {
        side: [] for what, side in SIDES if what == options.what and side.startswith(taken)
    }
    peaks = dict.fromkeys(rates, 0.0)
    failed: dict[str, UserError] = {}  # no compiler, a peer that is not installed
    for _ in range(options.rounds):
        for side in [side for side in rates if side not in failed]:
            try:
                rate, peak = measure(options, side)
            except UserError as e:
                failed[side] = e
                continue
            rates[side].append(rate)
            peaks[side] = max(peaks[side], peak)
    medians = {side: statistics.median(values) for side, values in rates.items() if side not in failed}
    ours, peer = (best(medians, start, failed) if start != "none" else None for start in taken)
    most, why = limit(options, size)
    libraries = ["torch", "numpy", *{"none": [], "trl": ["trl", "transformers"]}.get(options.peer, [options.peer])]
    report = {
        "ours": medians[ours],
        "peer": peer and medians[peer],
        "ratio": peer and medians[ours] / medians[peer],
        "ours_peak_gb": peaks[ours],
        "peer_peak_gb": peer and peaks[peer],
        "limit": most,
        "share_of_limit": medians[ours] / most,
        "versions": {name: version(name) for name in libraries},
    }
    if options.json:
        print(json.dumps(report))
        return
    table = Table("side", UNITS[options.what], "slowest", "fastest", "peak GB", title=f"{options.what}, {options.size}")
    for side in medians:
        cells = (medians[side], min(rates[side]), max(rates[side]), peaks[side])
        table.add_row(side, *(f"{cell:.4g}" for cell in cells))
    console = Console(highlight=False)
    console.print(table)
    for reason in failed.values():
        console.print(f"not measured: {reason}")
    if peer:
        console.print(f"ratio of {ours} to {peer}: {report['ratio']:.2f}")
    console.print(f"limit: {most:.4g} {UNITS[options.what]} ({why}); {ours} reaches {report['share_of_limit']:.1%}")


def best(medians: dict[str, float], start: str, failed: dict[str, UserError]) -> str:
    """The fastest of the sides whose name begins so. UserError if none could be measured."""
    sides = [side for side in medians if side.startswith(start)]
    require(bool(sides), "; ".join(str(e) for side, e in failed.items() if side.startswith(start)))
    return max(sides, key=medians.get)


if __name__ == "__main__":
    run(main, Options, prog="python -m minqstar.lab.bench")
