"""How the findings' figures look. Only this file knows matplotlib, and only once something is drawn."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path

import numpy as np

from minqstar.files import replace_file

# Okabe and Ito's colours: colour-blind readers tell them apart, too
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#0072b2 #e69f00 #009e73 #cc79a7 #d55e00 #777777".split()
WIDTH = 9.0  # inches: as wide as a page shows, so that no figure is scaled down
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9,
    "axes.titlesize": 10, "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.8, "figure.dpi": 110,
    "lines.markersize": 4, "figure.titlesize": 11, "figure.titleweight": "bold",
}  # fmt: skip


def styled(draw: Callable) -> Callable:
    """A function that draws, in the findings' style."""

    @wraps(draw)
    def drawn(*found):
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*found)

    return drawn


def panels(message: str, columns: int, rows: int = 1, height: float = 3.0, **options) -> tuple:
    """A figure that says its message above, and its axes (rows, columns), each row `height` inches high."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height * rows), layout="constrained")
    figure.suptitle(message, x=0.01, ha="left")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def label(axis, title: str, x: str, y: str):
    axis.set(xlabel=x, ylabel=y)
    axis.set_title(title, loc="left")


def numbers(axis, ticks: list[float], apart: float = 1.0):
    """These ticks on a logarithmic x axis, as plain numbers, but none within the factor `apart` of the one before."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick >= apart * kept[-1]:
            kept.append(tick)
    axis.set_xscale("log")
    axis.set_xticks(kept, [f"{t / 1000:g}k" if t >= 1000 else f"{t:g}" for t in kept], minor=False)
    axis.minorticks_off()


def ranges(axis, places, measures: list[dict], colour: str, words: str = ""):
    """Measures with their intervals."""
    values, (low, high) = np.array([m["all"] for m in measures]), np.array([m["interval"] for m in measures]).T
    axis.errorbar(places, values, [values - low, high - values], fmt="o", color=colour, capsize=3, label=words)


def by_number(points: dict[str, dict], *names: str) -> tuple[list[float], list[np.ndarray]]:
    """The sorted numbers that are the keys, and for each name its values in that order."""
    at = sorted(points, key=float)
    return [float(key) for key in at], [np.array([points[key][name] for key in at], dtype=float) for name in names]


def save(figure, path: Path):
    """Write a PNG, whole or not at all; the same figure gives the same bytes."""
    write = lambda aside: figure.savefig(aside, format="png", metadata={"Software": None})  # noqa: E731
    replace_file(path, write)
