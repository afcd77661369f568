"""The token-credit league: every method's token rewards beside the exact A*, on the same posts and the same clock.

    python -m minqstar.lab.league --quick                # every method once, on a quarter of the pairs
    python -m minqstar.lab.league --out data/results     # the full league: three seeds
    python -m minqstar.lab.league --only ipo             # one method, or one of limits, beams, robust, squeeze

What is computed is kept in runs/pairs/league (league-quick): after an interruption the same command goes on.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table as TextTable

from minqstar.cli import run
from minqstar.console import Console
from minqstar.errors import Stopped, needs, require
from minqstar.files import owner
from minqstar.lab.figures import check_pictures, read_results, rounded, write_results
from minqstar.lab.findings.drawing import save
from minqstar.lab.findings.lab import FULL, QUICK, Lab
from minqstar.lab.league import draw, robust, squeeze
from minqstar.lab.league.methods import METHODS
from minqstar.lab.league.studies import STUDIES
from minqstar.lab.league.study import GOAL, League

PICTURES = {  # files league….png
    "league": draw.league,
    "robust": lambda found: robust.draw(draw.named(found)),
    "squeeze": lambda found: squeeze.draw(draw.named(found)),
}


@dataclass(frozen=True)
class Options:
    """Train every method from the same SFT run and compare its token rewards with the exact A*."""

    only: str = ""
    """One method (dpo, plackett_luce, rpo, ipo, tdpo, kto, simpo, cpl, tbrm, step, reward_head, ppo, rto, ppo_true),
    or one study of those that are trained (limits, beams, robust, squeeze)."""
    quick: bool = False
    """One seed, a quarter of the pairs, a quarter of the posts."""
    out: Path | None = None
    """Folder for league.json and its figures. Default: runs/pairs/league/results, runs/pairs/league-quick/results."""
    runs: Path = Path("runs/pairs")
    """Folder with the main run (sft and dpo, on pairs), trained if it is not there, and for what the league trains."""

    def __post_init__(self):
        names = (*METHODS, *STUDIES)
        require(self.only in ("", *names), f"only must be one of {', '.join(names)}, got {self.only!r}")


def main(options: Options):
    needs("matplotlib", "figures", "a picture")
    work = options.runs / ("league-quick" if options.quick else "league")
    out = options.out or work / "results"
    results = out / "league.json"
    with owner(results):
        out.mkdir(parents=True, exist_ok=True)
        kept = read_results(results, ("methods", *STUDIES))
        check_pictures(results, [place(results, name) for name in PICTURES])
        lab = Lab(options.runs, work, QUICK if options.quick else FULL)
        same = kept.setdefault("of", lab.folder.name) == lab.folder.name
        require(same, f"{results} is of another main run or scale; give another --out, or remove {results.parent}")
        make(League(lab, options.quick), options.only, kept, results)
        for title in TABLES:
            Console().print(table(title, kept["methods"]))


def place(results: Path, name: str) -> Path:
    return results.with_name(f"{name}.png" if name == "league" else f"league_{name}.png")


def make(league: League, only: str, kept: dict, results: Path):
    """Seed by seed every method, and then the studies; what is new is written at once."""
    say, methods = Console().print, kept.setdefault("methods", {})
    try:
        for seed in range(league.size.seeds):
            for name in METHODS:
                if only in ("", name):
                    started = time.perf_counter()
                    known = methods.setdefault(name, {**METHODS[name].said(), "seeds": []})
                    known["seeds"][seed:] = [rounded(league.entry(name, seed)), *known["seeds"][seed + 1 :]]
                    write_results(kept, results)
                    say(f"{name}, seed {seed}: {time.perf_counter() - started:.0f} s")
        for name, study in STUDIES.items():
            if only in ("", name):
                kept[name] = rounded(study(league))
                write_results(kept, results)
        for name, picture in PICTURES.items():
            if methods if name == "league" else name in kept:
                save(picture(kept if name == "league" else kept[name]), place(results, name))
    except Stopped as e:
        e.args = ("stopped; the same command goes on from here",)
        raise
    say(f"the numbers are in {results}")


TABLES = {  # by title: heading, where the figure stands, digits
    "token rewards beside the exact A*": {
        "r²": ("credit r2", 3), "scaled\nr²": ("credit r2_scaled", 3), "corr.": ("credit correlation", 2),
        "facts'\nr²": ("credit by_class fact r2", 2), "AUROC": ("credit auroc", 3),
        "pairs\nright": ("credit pair_accuracy", 3), "spread": ("credit spread", 2), "s": ("seconds", 0),
        f"s to\n{GOAL}": ("to_credit", 0),
    },
    "policies": {
        "wrong\nfacts": ("policy fact_error_rate", 3), "true\nreturn": ("policy judge_return", 2),
        "off the\ngrammar": ("policy off_grammar_rate", 3), "KL to\npi_ref": ("policy kl_to_ref", 2),
        "own\nspread": ("policy own_spread", 2), "tokens": ("policy mean_length", 1),
    },
}  # fmt: skip


def table(title: str, methods: dict) -> TextTable:
    """A line a method: means over its seeds."""
    columns = TABLES[title]
    found = TextTable(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("method", *columns):
        found.add_column(heading, no_wrap=True)
    for name, of in methods.items():
        cells = [(draw.values(of, path), digits) for path, digits in columns.values()]
        whole = [len(values) == len(of["seeds"]) for values, _ in cells]  # of every seed
        if any(whole):
            shown = zip(cells, whole, strict=True)
            found.add_row(name, *(f"{sum(v) / len(v):.{d}f}" if there else "-" for (v, d), there in shown))
    return found


if __name__ == "__main__":
    run(main, Options, "python -m minqstar.lab.league")
