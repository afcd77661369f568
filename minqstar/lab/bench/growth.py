"""How time and memory grow with the size of the work, each measure doubled three times.

python -m minqstar.lab.bench.growth
"""

import json
import math
import statistics
from dataclasses import dataclass, replace
from functools import partial

from rich.table import Table

from minqstar.cli import run
from minqstar.console import Console
from minqstar.errors import require
from minqstar.lab.bench.compare import Options as Work
from minqstar.lab.bench.compare import Side, alternate
from minqstar.lab.bench.workloads import SIZES

AXES = {  # what grows: the work, the option, its first value, the expected k of time as n^k
    "tokens of a text": (Work("train"), "length", 1, "1 to 2"),  # products, attention
    "vocabulary": (Work("train"), "vocabulary", 512, "0 to 1"),  # the head only
    "batch": (Work("decode"), "batch", 1, "0 to 1"),  # weights are read once
    "beam width": (Work("decode"), "beams", 2, "0 to 1"),  # so is the prompt
    "simulations": (Work("mcts"), "simulations", 32, "1"),  # a call each
}


@dataclass(frozen=True)
class Options:
    """Measure how time and memory grow."""

    rounds: int = 5
    """How often each is measured, in turns; the medians count."""
    json: bool = False
    """Print one JSON object: for each measure its `values`, `seconds` and `peak_gb`, and the `order` k of n^k."""

    def __post_init__(self):
        require(self.rounds > 0, f"rounds must be positive, got {self.rounds}")


def seconds(work: Work, rate: float) -> float:
    """Of one unit of work at a rate of the bench: a pair, or the call that serves all prompts."""
    tokens = SIZES[work.size].new_tokens
    units = {"train": 1, "decode": work.batch * tokens, "mcts": work.batch * work.simulations}
    return units[work.what] / rate


def measure(name: str, rounds: int) -> dict:
    """One row of the table."""
    first, field, start, _ = AXES[name]
    works = [replace(first, **{field: start * 2**i}) for i in range(4)]
    turns, failed = alternate({str(i): partial(Side, work, "ours") for i, work in enumerate(works)}, rounds)
    for error in failed.values():
        raise error
    rates = [statistics.median(turn.rate for turn in line) for line in turns.values()]
    times = [seconds(work, rate) for work, rate in zip(works, rates, strict=True)]
    return {
        "values": [getattr(work, field) for work in works],
        "seconds": times,
        "peak_gb": [line[-1].peak_gb for line in turns.values()],
        "order": math.log2(times[-1] / times[0]) / 3,
    }


def main(options: Options):
    console = Console()
    report = {name: measure(name, options.rounds) for name in AXES}
    if options.json:
        print(json.dumps(report))
        return
    table = Table("what", "values", "ms", "times, doubled thrice", "k", "expected", "GB")
    for name, row in report.items():
        ratios = " ".join(f"{t / row['seconds'][0]:.1f}" for t in row["seconds"][1:])
        values, memory = (
            f"{row[key][0]:.{digits}f}-{row[key][-1]:.{digits}f}" for key, digits in (("values", 0), ("peak_gb", 1))
        )
        first = f"{1e3 * row['seconds'][0]:.3g}"
        table.add_row(name, values, first, ratios, f"{row['order']:.2f}", AXES[name][3], memory)
    console.print(table)


if __name__ == "__main__":
    run(main, Options, prog="python -m minqstar.lab.bench.growth")
