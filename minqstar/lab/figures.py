"""The paper's findings, each as numbers and a figure, from runs trained where they do not exist.

    python -m minqstar.lab.figures --quick                 # all of them, small, in a quarter of an hour
    python -m minqstar.lab.figures --out data/results      # the full set that the README shows, in under two hours
    python -m minqstar.lab.figures --only beams            # one of them
    python -m minqstar.lab.figures --only real --model MODEL --data prefs.jsonl     # of somebody's chat model

Everything computed is kept in runs/pairs/figures (figures-quick): after an interruption the same command goes on,
unless the main run is another by then. Whoever changes the code of a finding removes that folder.
"""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minqstar.cli import run
from minqstar.console import Console
from minqstar.errors import Stopped, UserError, first_line, needs, require
from minqstar.files import check_output, owner, replace_file
from minqstar.lab.findings import (
    beams,
    best_of_n,
    credit,
    diffusion,
    equivalence,
    leak,
    likelihoods,
    proxy,
    q_gap,
    real,
)
from minqstar.lab.findings.drawing import save
from minqstar.lab.findings.lab import FULL, QUICK, Kept, Lab

FINDINGS = {  # each: compute(lab) gives its numbers, plain JSON; draw(numbers) its figure
    "credit": credit, "beams": beams, "best_of_n": best_of_n, "likelihoods": likelihoods, "equivalence": equivalence,
    "q_gap": q_gap, "proxy": proxy, "leak": leak, "diffusion": diffusion, "real": real,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Reproduce the paper's findings, with the exact oracle beside them."""

    only: str = ""
    """One of credit, beams, best_of_n, likelihoods, equivalence, q_gap, proxy, leak, diffusion, real; by default all
    but real. diffusion needs no run."""
    model: Path | None = None
    """Of real: a Hugging Face folder of a small chat model, which is trained."""
    data: tuple[Path, ...] = ()
    """Of real: files of preference pairs."""
    quick: bool = False
    """A smaller set: fewer runs on fewer pairs, fewer posts."""
    out: Path | None = None
    """Folder for the PNGs and results.json. Default: runs/pairs/figures/results, runs/pairs/figures-quick/results."""
    runs: Path = Path("runs/pairs")
    """Folder with the main run (sft and dpo, on pairs), trained if it is not there, and for the figures' runs."""

    def __post_init__(self):
        require(self.only in ("", *FINDINGS), f"only must be one of {', '.join(FINDINGS)}, got {self.only!r}")
        given = self.only != "real" or (self.model and self.data)
        require(bool(given), "real is of somebody's model: give --model FOLDER and --data FILE")


NEEDS = (("model data", "--only real"), ("quick", "no --only real"))


def rounded(value):
    """Five significant digits, which is more than any figure shows."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def main(options: Options):
    needs("matplotlib", "figures", "a picture")
    work = options.runs / ("figures-quick" if options.quick else "figures")
    out = options.out or work / "results"
    results = out / "results.json"
    with owner(results):
        out.mkdir(parents=True, exist_ok=True)
        kept = read_results(results, FINDINGS)
        check_pictures(results, [out / f"{name}.png" for name in FINDINGS])
        if options.only in ("real", "diffusion"):  # of no main run
            of = real.Real(options.model, options.data, work) if options.only == "real" else None
            make([options.only], of, kept, results)
            return
        lab = Lab(options.runs, work, QUICK if options.quick else FULL)
        same = kept.setdefault("of", lab.folder.name) == lab.folder.name
        require(same, f"{results} is of another main run or scale; give another --out, or remove {results.parent}")
        make([options.only] if options.only else [name for name in FINDINGS if name != "real"], lab, kept, results)


def make(names: list[str], lab: Kept | None, kept: dict, results: Path):
    """Compute some findings; write each as it is there, beside those that are kept, and draw it."""
    say = Console().print
    try:
        for name in names:
            started = time.perf_counter()
            kept[name] = rounded(FINDINGS[name].compute(lab))
            whole = {key: kept[key] for key in ("of", *FINDINGS) if key in kept}
            write_results(whole, results)
            save(FINDINGS[name].draw(kept[name]), results.with_name(f"{name}.png"))
            say(f"{name}: {results.with_name(name)}.png, {time.perf_counter() - started:.0f} s")
    except Stopped as e:
        e.args = ("stopped; the same command goes on from here",)
        raise
    say(f"the numbers are in {results}")


def check_pictures(results: Path, pictures: Iterable[Path]):
    """UserError unless these pictures can be written beside their numbers, and nothing of others is lost."""
    for picture in pictures:
        check_output(picture, ".png")
        ours = results.exists() or not picture.exists()
        require(ours, f"{picture} is there, but no {results}: it is somebody else's; give another --out")


def write_results(kept: dict, results: Path):
    text = json.dumps(kept, separators=(",", ":"), allow_nan=False)
    replace_file(results, lambda new: new.write_text(text + "\n"))


def read_results(path: Path, names: Iterable[str]) -> dict:
    """What was computed before; UserError if the file holds anything but what has these names."""
    try:
        kept = dict(json.loads(path.read_bytes())) if path.exists() else {}
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({first_line(e)}); give another --out, or remove {path.parent}") from e
    require(kept.keys() <= {"of", *names}, f"{path} holds something else; give another --out")
    return kept


if __name__ == "__main__":
    run(main, Options, "python -m minqstar.lab.figures", NEEDS)
