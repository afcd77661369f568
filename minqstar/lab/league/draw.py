"""The league's figure: whose token credit is right, what its policy is worth, and beams on two of the policies."""

import numpy as np

from minqstar.lab.findings.drawing import BLUE, GREY, ORANGE, label, panels, styled

SHORT = {
    "dpo": "DPO", "plackett_luce": "rankings of 4", "rpo": "RPO", "ipo": "IPO", "tdpo": "TDPO2", "kto": "KTO",
    "simpo": "SimPO", "cpl": "CPL", "tbrm": "TBRM", "step": "steps", "reward_head": "reward head", "ppo": "PPO on head",
    "rto": "RTO", "ppo_true": "PPO, true R", "optimum": "exact π*",
}  # fmt: skip


def named(found: dict[str, dict]) -> dict[str, dict]:
    """Figures by the names that pictures show."""
    return {SHORT.get(name, name): of for name, of in found.items()}


def figure(entry: dict, path: str) -> float | None:
    """A figure of an entry by the names on its way there; None if it has none."""
    found = entry
    for name in path.split():
        found = (found or {}).get(name)
    return found


@styled
def league(kept: dict):
    """Methods by their r²: credit, true return with the optimum, spread; below, beams on DPO's and PPO's policies."""
    methods = kept["methods"]
    names = sorted(methods, key=lambda name: -(mean(methods[name], "credit r2_scaled") or -9))
    beams = kept.get("beams", {})
    drawn, axes = panels(
        "A policy's log-ratios know which token earned what; a reward head does not", 3, 2 if beams else 1, height=3.6
    )
    of = {
        "r² to the exact A*": ("credit r2", "own units (filled), best scale (open)"),
        "True return of a draw": ("policy judge_return", "reward units; line: exact optimum"),
        "Spread of penalised returns": ("credit spread", "reward units; 0 only at the optimum"),
    }
    for axis, (title, (path, words)) in zip(axes[0], of.items(), strict=True):
        for place, name in enumerate(names):
            bar(axis, place, methods[name], path, BLUE)
            if path == "credit r2":
                bar(axis, place, methods[name], "credit r2_scaled", ORANGE, hollow=True)
        axis.set_yticks(range(len(names)), [SHORT[n] for n in names] if axis is axes[0][0] else [""] * len(names))
        axis.set_ylim(len(names) - 0.5, -0.5)
        label(axis, title, words, "")
    axes[0][0].set_xlim(-0.2, 1)
    for best in {mean(methods[n], "policy optimal_judge_return") for n in names} - {None}:
        axes[0][1].axvline(best, color="black", linewidth=0.8)
    if beams:
        shown = {"win_rate": "Win rate against the preferred", "length": "Length, tokens", "true_return": "True return"}
        for axis, (key, title) in zip(axes[1], shown.items(), strict=True):
            for (name, line), colour in zip(beams["curves"].items(), (BLUE, ORANGE, GREY), strict=False):
                axis.plot(beams["widths"], [point[key] for point in line], "o-", color=colour, label=SHORT[name])
            axis.set_xticks(beams["widths"])
            label(axis, title, "beam width (1: greedy)", "")
        axes[1][0].legend()
    return drawn


def values(method: dict, path: str) -> list[float]:
    found = [figure(seed, path) for seed in method["seeds"]]
    return [value for value in found if value is not None]


def mean(method: dict, path: str) -> float | None:
    found = values(method, path)
    return float(np.mean(found)) if found else None


def bar(axis, place: int, method: dict, path: str, colour: str, hollow: bool = False):
    """The mean of the seeds, and their range."""
    found = values(method, path)
    if found:
        axis.plot([min(found), max(found)], [place, place], color=colour)
        axis.plot(np.mean(found), place, "o", color=colour, markerfacecolor="white" if hollow else colour)
