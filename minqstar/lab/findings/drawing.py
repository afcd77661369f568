"""The findings drawn: each function takes what `findings` computed, as results.json holds it, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minqstar.show import shade
from minqstar.training.checkpoint import replace_file

# Okabe and Ito's colours, told apart by everybody
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY = "#0072b2 #e69f00 #009e73 #cc79a7 #56b4e9 #d55e00 #777777".split()
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10,
    "axes.titlesize": 11, "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.8, "figure.dpi": 110,
}  # fmt: skip


def axes(columns: int, rows: int = 1, width: float = 4.3, height: float = 3.3) -> tuple[Figure, np.ndarray]:
    figure, grid = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    return figure, grid


def label(axis: Axes, x: str, y: str, title: str = ""):
    axis.set(xlabel=x, ylabel=y)
    axis.set_title(title, loc="left")


def numbers(axis: Axes, ticks: list[float], apart: float = 1.0):
    """These ticks on a logarithmic x axis, as plain numbers, but none within the factor `apart` of the one before."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick >= apart * kept[-1]:
            kept.append(tick)
    ticks = kept
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{t / 1000:g}k" if t >= 1000 else f"{t:g}" for t in ticks], minor=False)
    axis.minorticks_off()


def tokens_line(axis: Axes, y: float, tokens: list[str], rewards: list[float], per_line: int) -> float:
    """Coloured tokens from the left, in lines of so many characters; the y below them."""
    x, step = 0.0, 1.25
    for token, reward in zip(tokens, rewards, strict=True):
        token = token.replace("\n", "↵")
        if x + len(token) > per_line:
            x, y = 0.0, y - step
        colour = tuple(c / 255 for c in shade(reward))
        axis.add_patch(plt.Rectangle((x, y - 0.5), len(token), 1.0, color=colour, linewidth=0))
        axis.text(x, y, token, family="DejaVu Sans Mono", fontsize=9, va="center", ha="left", parse_math=False)
        x += len(token)
    return y - step


def credit_figure(versions: dict[str, dict]) -> Figure:
    """Each version's tokens, coloured by the learned reward and by A*."""
    per_line, y, lines = 88, 0.0, 0
    for of in versions.values():
        lines += 1 + (2 if of["exact"] else 1) * (1 + -(-sum(map(len, of["tokens"])) // (per_line - 8)))
    figure, axis = plt.subplots(figsize=(per_line * 0.0853 + 0.9, 0.27 * lines + 0.5))
    for name, of in versions.items():
        axis.text(-9, y, name, fontsize=10, fontweight="bold", va="center")
        y -= 1.3
        for kind, rewards in (("learned", of["rewards"]), ("exact", of["exact"])):
            if rewards:
                axis.text(-9, y, kind, fontsize=9, color=GREY, va="center")
                y = tokens_line(axis, y, of["tokens"], rewards, per_line) - 0.1
        y -= 0.4
    axis.set(xlim=(-9, per_line), ylim=(y, 1.2))
    axis.axis("off")
    axis.set_title("Blue is paid, orange is charged: beta log(π/π_ref) and the exact A*, reward units", loc="left")
    return figure


def credit_picture(versions: dict[str, dict], path: Path):
    with plt.rc_context(STYLE):
        save(credit_figure(versions), path)


def credit(found: dict) -> Figure:
    return credit_figure(found["versions"])


def beams(found: dict) -> Figure:
    """Win rate, length, true return, and how much the learned return promises too much: colour is beta, style the rest.

    Left of one beam, the draws of the same policy at temperature 1.
    """
    figure, grid = axes(2, 2, 5.0, 3.4)
    panels = dict(zip(("win_rate", "length", "true_return", "excess"), grid.flat, strict=True))
    widths, draw = found["widths"], 0.62
    betas = list(dict.fromkeys(name.split(",")[0] for name in found["curves"]))
    styles = {"alpha 0": ("-", "o"), "alpha 1": ("--", "s"), "length-biased labels, alpha 0": (":", "^")}
    for name, by_alpha in found["curves"].items():
        beta, biased = name.split(",")[0], "labels" in name
        for alpha, line in by_alpha.items():
            if biased and alpha != "alpha 0":
                continue
            linestyle, marker = styles["length-biased labels, alpha 0" if biased else alpha]
            what = {"color": COLOURS[betas.index(beta)], "linestyle": linestyle, "marker": marker, "markersize": 4}
            learned, labelled = (np.array(line[key], dtype=float) for key in ("learned_return", "labelled_return"))
            for key, axis in panels.items():
                values = learned - labelled if key == "excess" else np.array(line[key], dtype=float)
                axis.plot(widths, values, **what)
                if key != "excess" and alpha == "alpha 0" and (drawn := found["draws"][name][key]) is not None:
                    axis.plot([draw, widths[0]], [drawn, values[0]], **what | {"linewidth": 0.6})
            low, high = np.array(line["win_interval"]).T
            bars = np.maximum([line["win_rate"] - low, high - line["win_rate"]], 0)
            panels["win_rate"].errorbar(
                widths, line["win_rate"], bars, fmt="none", ecolor=what["color"], elinewidth=0.7
            )
    best = found["likeliest_under_exact_optimum"][betas[0]]  # of every beta the same
    for key in ("win_rate", "length", "true_return"):
        panels[key].axhline(best[key], color="black", linewidth=0.9)
    panels["win_rate"].annotate(
        "likeliest under the exact π*", (widths[-1], best["win_rate"]), (0, 3), textcoords="offset points", ha="right",
        fontsize=8,
    )  # fmt: skip
    label(panels["win_rate"], "beams", "share of posts", "Wins against the preferred summary")
    label(panels["length"], "beams", "tokens", "Mean length")
    label(panels["true_return"], "beams", "reward units", "True return")
    label(panels["excess"], "beams", "reward units", "Learned minus the labeller's return")
    for axis in grid.flat:
        numbers(axis, widths)
        if axis is not panels["excess"]:
            axis.set_xticks([draw, *widths], ["draw", *map(str, widths)])
    handles = [plt.Line2D([], [], color=c, label=beta) for beta, c in zip(betas, COLOURS, strict=False)]
    handles += [plt.Line2D([], [], color=GREY, linestyle=s, marker=m, label=of) for of, (s, m) in styles.items()]
    figure.legend(handles=handles, loc="upper center", ncols=len(handles), bbox_to_anchor=(0.5, 0))
    return figure


def likelihoods(found: dict) -> Figure:
    """Implicit returns of chosen and rejected, and those of the reference's draws on their expectation."""
    titles = {"all": "Reference: SFT on all", "chosen": "Reference: SFT on chosen", "none": "No SFT: posts read only"}
    figure, (line,) = axes(3, width=4.4, height=3.8)
    for axis, (start, course) in zip(line, found["courses"].items(), strict=True):
        for name, colour in (("chosen", BLUE), ("rejected", ORANGE)):
            axis.plot(*np.array(course["history"][f"{name}_reward"]).T, color=colour, label=f"{name}")
        steps, *of = ([m[key] for m in course["measured"]] for key in ("step", "expected", "drawn", "standard_error"))
        expected, drawn, error = of
        axis.plot(steps, expected, color=GREY, label="−β KL(π_ref‖π), Eq. 16")
        bars = 2 * np.array(error)  # of the difference of the two, draw by draw
        axis.errorbar(
            steps,
            drawn,
            bars,
            fmt="o",
            color=RED,
            markersize=4,
            capsize=2,
            label="draws of π_ref, ±2 se of the difference",
        )
        axis.axhline(0, color="black", linewidth=0.8)
        label(axis, "DPO steps", "implicit return, reward units", titles[start])
    figure.legend(*line[0].get_legend_handles_labels(), loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0))
    return figure


def equivalence(found: dict) -> Figure:
    """What searches find for the tokens that they forward, on the learned policy and on the exact one."""
    figure, (line,) = axes(2, width=5.4, height=3.9)
    kinds = {"beam": (BLUE, "o"), "mcts as": (RED, "s"), "mcts rollout": (PURPLE, "^"), "mcts value": (GREEN, "v")}
    for axis, of, key, title in (
        (line[0], found["learned"], "mean_logp", "Learned policy: log-probability found"),
        (line[1], found["exact"], "mean_regret", "Exact π*: nats missed of the optimum"),
    ):
        seen = set()
        for name, point in of.items():
            colour, marker = next((v for k, v in kinds.items() if name.startswith(k)), (GREY, "D"))
            kind = next((k for k in kinds if name.startswith(k)), name)
            kind = {
                "mcts as": "mcts, default",
                "mcts rollout": "mcts, roll-outs",
                "mcts value": "mcts, value to go",
            }.get(kind, kind)
            hollow = {"markerfacecolor": "white"} if kind == name else {}
            axis.plot(
                point["tokens_forwarded"], point[key], marker, color=colour, markersize=7, linestyle="none",
                label=None if kind in seen or hollow else kind, **hollow,
            )  # fmt: skip
            seen.add(kind)
            if name.startswith(("greedy", "best", "beam")) or name in ("mcts as beam 2", "mcts as beam 20"):
                words, above = name.removeprefix("mcts "), 4 if "mcts" not in name else -11
                place = (point["tokens_forwarded"], point[key])
                axis.annotate(words, place, (6, above), textcoords="offset points", fontsize=8)
        axis.margins(y=0.1)
        ticks = [20, 50, 100, 200, 500]
        numbers(axis, ticks)
        label(axis, "tokens forwarded a post", "nats", title)
    line[0].legend()
    trees = found["identical_trees"]
    line[1].text(
        0.97, 0.65, f"guided (Eq. 12) and likelihood (Eq. 13) search:\n{trees['identical']} of {trees['trees']} trees "
        "identical", transform=line[1].transAxes, ha="right", va="top", fontsize=9,
    )  # fmt: skip
    return figure


def q_gap(found: dict) -> Figure:
    """How near the learned rewards come to A*."""
    figure, ((scatter, by_class, tabular), (pairs, steps, beta)) = axes(3, 2, 4.2, 3.4)
    exact, learned, kinds = (np.array(found["scatter"][key]) for key in ("exact", "learned", "class"))
    for axis in (scatter, by_class):
        shown = np.abs(exact) < (np.inf if axis is scatter else 0.4)
        for colour, kind in zip((GREY, BLUE, GREEN, ORANGE), ("forced", "fact", "clause", "filler"), strict=True):
            mine = shown & (kinds == kind)
            axis.plot(exact[mine], learned[mine], ".", color=colour, markersize=4, alpha=0.6, label=kind)
        ends = [exact[shown].min(), exact[shown].max()]
        axis.plot(ends, ends, color="black", linewidth=0.8)
    label(scatter, "exact A*, reward units", "learned, reward units", "Token by token")
    scatter.legend(markerscale=2)
    label(by_class, "exact A*, reward units", "learned, reward units", "The same, |A*| < 0.4")
    for axis, key, x in ((pairs, "pairs", "preference pairs"), (steps, "steps", "DPO steps"), (beta, "beta", "beta")):
        points = {float(name): value for name, value in found[key].items()}
        at = sorted(points)
        for name, style, colour, words in (("correlation", "-o", BLUE, "correlation"), ("r2", "--s", ORANGE, "r²")):
            values = np.array([points[p][name] for p in at], dtype=float)
            axis.plot(at, values, style, color=colour, markersize=4, label=words)
        axis.set_ylim(top=1.02)
        numbers(axis, at, 1.9)
        label(axis, x, "with A*, held-out tokens", f"By {x}")
    pairs.legend()
    for name, colour, words in (("policy_gap", BLUE, "max |π − π*|"), ("reward_gap", ORANGE, "max |reward − A*|")):
        tabular.semilogy(
            np.arange(1, len(found["tabular"][name]) + 1), found["tabular"][name], color=colour, label=words
        )
    label(tabular, "calls of L-BFGS, 20 iterations each", "distance", "In a table, all pairs: to π*")
    tabular.legend()
    return figure


def proxy(found: dict) -> Figure:
    """A larger model steered by a small pair."""
    figure, (line,) = axes(3, width=4.3, height=3.5)
    alone = {"larger_dpo": ("DPO on the larger", GREEN, "--"), "small_dpo": ("the small DPO alone", GREY, ":")}
    titles = {
        "fact_errors": ("share of facts wrong", "Facts"),
        "true_return": ("mean true return, reward units", "True return"),
        "off_grammar": ("share of draws", "Off the grammar"),
    }
    for axis, (key, (words, title)) in zip(line, titles.items(), strict=True):
        values = np.array([point[key] for point in found["steered"]], dtype=float)
        axis.plot(found["alpha"], values, "-o", color=BLUE, markersize=5, label="larger base, steered")
        for name, (of, colour, style) in alone.items():
            if found[name][key] is not None:  # no draw stayed in the grammar
                axis.axhline(found[name][key], color=colour, linestyle=style, label=of)
        axis.set_ylim(bottom=0)
        label(axis, "alpha (0: the base alone)", words, title)
    line[0].legend()
    return figure


def leak(found: dict) -> Figure:
    """Probability that leaves the grammar: of whole draws, and of each next token."""
    layout = [
        ["draws steps", "draws pairs", "draws beta", "rules"],
        ["token steps", "token pairs", "token beta", "rules"],
    ]
    figure, axes = plt.subplot_mosaic(layout, figsize=(14, 6), width_ratios=[3, 3, 3, 2.6])
    for row, key, words in (("draws", "off_grammar", "of draws"), ("token", "per_token", "of next tokens")):
        for measure, x in (("steps", "DPO steps"), ("pairs", "preference pairs"), ("beta", "beta")):
            axis = axes[f"{row} {measure}"]
            points = {float(name): value[key] for name, value in found[measure].items()}
            at = sorted(points)
            share = 100 * np.array([points[p] for p in at])
            bars = 2 * (share * (100 - share) / found["draws"]) ** 0.5 if row == "draws" else None
            axis.errorbar(
                at, share, bars, fmt="-o", color=BLUE, markersize=4, capsize=2, elinewidth=0.8, label="after DPO"
            )
            axis.axhline(100 * found["reference"][key], color=ORANGE, linestyle="--", label="reference")
            axis.axhline(0, color=GREEN, linestyle=":", label="π* and π_ref, exact")
            axis.set_ylim(bottom=-0.05 * axis.get_ylim()[1])
            numbers(axis, at, 1.9)
            label(axis, x, f"% {words}", f"Off the grammar, by {x}" if row == "draws" else "")
    axes["draws steps"].legend()
    rules, axis = found["decoding"], axes["rules"]
    share = np.array([100 * of["off_grammar"] for of in rules.values()][::-1])
    bars = 2 * (share * (100 - share) / found["draws"]) ** 0.5
    axis.barh(list(rules)[::-1], share, xerr=bars, color=BLUE, height=0.6, error_kw={"capsize": 2})
    label(axis, "% of draws", "", "… by how one draws")
    return figure


FIGURES: dict[str, Callable[[dict], Figure]] = {
    "credit": credit, "beams": beams, "likelihoods": likelihoods, "equivalence": equivalence, "q_gap": q_gap,
    "proxy": proxy, "leak": leak,
}  # fmt: skip


def save(figure: Figure, path: Path):
    figure.tight_layout()
    replace_file(
        path, lambda aside: figure.savefig(aside, format="png", bbox_inches="tight", metadata={"Software": None})
    )
    plt.close(figure)


def draw(name: str, found: dict, path: Path):
    with plt.rc_context(STYLE):
        save(FIGURES[name](found), path)
