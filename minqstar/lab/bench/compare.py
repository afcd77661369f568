"""How fast: training, decoding and tree search, against the big frameworks on the same machine and in the same run.

    python -m minqstar.lab.bench train --size tiny --peer trl
    python -m minqstar.lab.bench decode --size gpt2 --peer transformers --beams 5
    python -m minqstar.lab.bench mcts --size tiny --peer transformers

Both sides get GPT-2's architecture with equal parameters, random weights and random text of the same lengths. Each
is a process of its own, which warms up and then waits for its turns of half a second or more (A B A B …), so that
what the machine does besides hits both.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from rich.table import Table

from minqstar.console import Console
from minqstar.errors import UserError, require
from minqstar.lab.bench.workloads import SIDES, SIZES, Size, texts, train_dtype

UNITS = {"train": "pairs/s", "decode": "new tokens/s", "mcts": "simulations/s"}
TURN = 0.5  # seconds at the least
MOST = {
    "batch": 10**4, "rounds": 10**4, "simulations": 10**5, "length": 16, "beams": 10**4, "vocabulary": 2**20
}  # fmt: skip


def matmul_rate(dtype: torch.dtype, n: int = 2048) -> float:
    """Floating point operations per second of an n x n product, the best of six."""
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    best = min(timed(lambda: a @ b) for _ in range(6))
    return 2 * n**3 / best


def read_rate() -> float:
    """Bytes per second read by a sum over 512 MB, the best of six."""
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
    rounds: int = 15
    """How often the sides take turns."""
    json: bool = False
    """Print one JSON object: medians of `ours` and `peer`, each in its faster form (eager or compiled), in units per
    second, and the median `ratio` of two turns side by side; peak memory of both in GB; the machine's own `limit` in
    the same units, and the `share_of_limit` that ours reaches; all `sides`, the `options`, versions and threads."""
    side: Annotated[str, tyro.conf.arg(help="Used by the bench itself: measure one side in this process.")] = ""

    def __post_init__(self):
        for name in ("batch", "rounds", "simulations", "length", "beams", "vocabulary"):
            least = 0 if name in ("beams", "vocabulary") else 1
            value = getattr(self, name)
            good = least <= value <= MOST[name]
            require(good, f"{name} must be between {least} and {MOST[name]:,}, got {value}")
        fits = self.peer == "none" or (self.peer == "trl") == (self.what == "train")
        require(fits, f"{self.what} has the peer {'trl' if self.what == 'train' else 'transformers'}, not {self.peer}")


NEEDS = (("batch", "WHAT decode mcts"), ("beams", "WHAT decode"), ("simulations", "WHAT mcts"))


def size_of(options: Options) -> Size:
    size = SIZES[options.size]
    prompts, responses = (tuple(options.length * n for n in span) for span in (size.prompts, size.responses))
    row_length, vocabulary = options.length * size.row_length, options.vocabulary or size.vocab_size
    warm_up = max(3, size.warm_up // options.length**2)  # about as long in all
    return replace(
        size, prompts=prompts, responses=responses, row_length=row_length, vocab_size=vocabulary, warm_up=warm_up
    )


class Turn(NamedTuple):
    rate: float  # units per second
    peak_gb: float  # of the process so far


class Side:
    """A process that does one side's work, when it is its turn. UserError if it dies, with its last words."""

    def __init__(self, options: Options, name: str):
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        words = [sys.executable, "-m", "minqstar.lab.bench", options.what, "--size", options.size, "--side", name]
        for field in ("batch", "beams", "simulations", "length", "vocabulary"):
            if (value := getattr(options, field)) != type(options).__dataclass_fields__[field].default:
                words += [f"--{field}", str(value)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(words, text=True, **pipes)
        try:
            self.turn()  # until it is warm
        except BaseException:  # a signal, too: nobody else knows of the process yet
            self.close()
            raise

    def turn(self) -> Turn:
        try:
            print(file=self.process.stdin, flush=True)
            return Turn(*json.loads(self.process.stdout.readline()))
        except (BrokenPipeError, ValueError):
            self.process.wait()
            self.errors.seek(0)
            raise UserError(f"{self.name}: {(self.errors.read().strip().splitlines() or ['it died'])[-1]}") from None

    def close(self):
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def end_with(parent: int):
    """End this process when its parent has ended, even killed: nobody would wait for its answer."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class Turns:
    """Inside a side's process: called after each piece of work, it waits for the next turn when one is over."""

    def __init__(self, warm_up: int):
        self.left, self.units = warm_up, 0.0
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        self.out, sys.stdout = sys.stdout, sys.stderr  # what a library prints is not an answer
        self.begin()

    def begin(self):
        if not sys.stdin.readline():
            sys.exit()
        self.units, self.started = 0.0, time.perf_counter()

    def __call__(self, units: float):
        self.left, self.units = self.left - 1, self.units + units
        seconds = time.perf_counter() - self.started
        if self.left <= 0 and seconds >= TURN:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(json.dumps([self.units / seconds, peak]), file=self.out, flush=True)
            self.begin()


def alternate(sides: dict[str, Callable[[], Side]], rounds: int) -> tuple[dict[str, list[Turn]], dict[str, UserError]]:
    """The turns of each side, and what befell those that failed: no compiler, a peer that is not installed."""
    with ExitStack() as stack:
        alive, failed = {}, {}
        turns: dict[str, list[Turn]] = {name: [] for name in sides}
        for name, start in sides.items():
            try:
                alive[name] = stack.enter_context(closing(start()))
            except UserError as e:
                failed[name] = e
        for _ in range(rounds):
            for name, side in alive.items():
                turns[name].append(side.turn())
    return {name: turns[name] for name in alive}, failed


def main(options: Options):
    size = size_of(options)
    if options.side:
        turns = Turns(size.warm_up if options.what == "train" else 1)
        return SIDES[options.what, options.side](size, options, turns)
    taken = ("ours", options.peer)
    names = [side for what, side in SIDES if what == options.what and side.startswith(taken)]
    turns, failed = alternate({name: partial(Side, options, name) for name in names}, options.rounds)
    rates = {name: [turn.rate for turn in line] for name, line in turns.items()}
    peaks = {name: line[-1].peak_gb for name, line in turns.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours, peer = (best(medians, start, failed) if start != "none" else None for start in taken)
    ratios = peer and [a / b for a, b in zip(rates[ours], rates[peer], strict=True)]
    most, why = limit(options, size)
    libraries = ["torch", "numpy", *{"none": [], "trl": ["trl", "transformers"]}.get(options.peer, [options.peer])]
    report = {
        "ours": medians[ours],
        "peer": peer and medians[peer],
        "ratio": peer and statistics.median(ratios),
        "ours_peak_gb": peaks[ours],
        "peer_peak_gb": peer and peaks[peer],
        "limit": most,
        "share_of_limit": medians[ours] / most,
        "versions": {name: version(name) for name in libraries},
        "sides": {
            name: {"median": medians[name], "slowest": min(of), "fastest": max(of)} for name, of in rates.items()
        },
        "options": {name: value for name, value in asdict(options).items() if name not in ("json", "side")},
        "threads": torch.get_num_threads(),
    }
    if options.json:
        print(json.dumps(report))
        return
    table = Table("side", UNITS[options.what], "slowest", "fastest", "peak GB", title=f"{options.what}, {options.size}")
    for side in medians:
        cells = (medians[side], min(rates[side]), max(rates[side]), peaks[side])
        table.add_row(side, *(f"{cell:.4g}" for cell in cells))
    console = Console()
    console.print(table)
    for reason in failed.values():
        console.print(f"not measured: {reason}")
    if peer:
        console.print(f"ratio of {ours} to {peer}: {report['ratio']:.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    console.print(f"limit: {most:.4g} {UNITS[options.what]} ({why}); {ours} reaches {report['share_of_limit']:.1%}")


def best(medians: dict[str, float], start: str, failed: dict[str, UserError]) -> str:
    """The fastest of the sides whose name begins so. UserError if none could be measured."""
    sides = [side for side in medians if side.startswith(start)]
    require(bool(sides), "; ".join(str(e) for side, e in failed.items() if side.startswith(start)))
    return max(sides, key=medians.get)
