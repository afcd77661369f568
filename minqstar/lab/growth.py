"""How time and memory grow with the size of the work, each measure doubled three times.

python -m minqstar.lab.growth
"""

import json
import math
import statistics
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from minqstar.cli import require, run
from minqstar.lab.bench import Options as Work
from minqstar.lab.bench import measure as measure_side
from minqstar.lab.workloads import SIZES

AXES = {  # what grows: the work, the option, its first value, the expected order of time
    "tokens of a text": (Work("train"), "length", 1, "n to n²: products, attention"),
    "vocabulary": (Work("train"), "vocabulary", 512, "up to n: the head only"),
    "batch": (Work("decode"), "batch", 1, "up to n: weights are read once"),
    "beam width": (Work("decode"), "beams", 2, "up to n: so is the prompt"),
    "simulations": (Work("mcts"), "simulations", 32, "n: a call each"),
}


@dataclass(frozen=True)
class Options:
    """Measure how time and memory grow."""

    rounds: int = 3
    """How often each is measured; the medians count."""
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
    found = [[measure_side(work, "ours") for work in works] for _ in range(rounds)]
    times = [statistics.median(seconds(work, line[i][0]) for line in found) for i, work in enumerate(works)]
    return {
        "values": [getattr(work, field) for work in works],
        "seconds": times,
        "peak_gb": [max(line[i][1] for line in found) for i in range(4)],
        "order": math.log2(times[-1] / times[0]) / 3,
    }


def main(options: Options):
    console = Console(highlight=False)
    report = {name: measure(name, options.rounds) for name in AXES}
    if options.json:
        print(json.dumps(report))
        return
    table = Table("what", "from, to", "ms", "times, doubled thrice", "k of n^k", "expected", "peak GB")
    for name, row in report.items():
        ratios = " ".join(f"{t / row['seconds'][0]:.2f}" for t in row["seconds"][1:])
        ends = [f"{row[key][0]:.{d}f}, {row[key][-1]:.{d}f}" for key, d in (("values", 0), ("peak_gb", 2))]
        table.add_row(
            name, ends[0], f"{1e3 * row['seconds'][0]:.3g}", ratios, f"{row['order']:.2f}", AXES[name][3], ends[1]
        )
    console.print(table)


if __name__ == "__main__":
    run(main, Options, prog="python -m minqstar.lab.growth")
