"""How near the learned rewards come to the exact A*: by pairs, steps and beta; and in a table, where DPO is exact."""

import json

import numpy as np
import torch

from minqstar.evaluate import gap_figures, rewards_and_truth
from minqstar.lab.findings.drawing import BLUE, GREEN, GREY, ORANGE, by_number, label, numbers, panels, styled
from minqstar.lab.findings.lab import Lab
from minqstar.lm.model import GPT
from minqstar.theory.mdp import TokenMDP, tree
from minqstar.theory.tabular import fit
from minqstar.training.checkpoint import Run
from minqstar.training.scoring import score_groups

KINDS = {"forced": (GREY, "x"), "fact": (BLUE, "o"), "clause": (GREEN, "^"), "filler": (ORANGE, "s")}
POINTS = 3000  # tokens of the scatter


def compute(lab: Lab) -> dict:
    """Figures of the gap from the runs' summaries and from the main run's course; some tokens; the limit in a table."""

    def of(run_: Run) -> dict:
        figures = json.loads((run_.path / "summary.json").read_text())["eval"]
        return {name: figures[f"q_gap_{name}"] for name in ("rmse", "correlation", "r2")}

    rewards, truth, classes = tokens(lab, lab.main.model)
    some = np.random.default_rng(0).permutation(len(rewards))[:POINTS]
    tabular = fit(small_tree(), beta=0.5)
    return {
        "pairs": {str(n): of(lab.run(pairs=n)) for n in lab.scale.pairs},
        "beta": {f"{beta:g}": of(lab.run(beta)) for beta in lab.scale.betas},
        "steps": lab.piece("q_gap_steps", lambda: steps(lab)),
        "scatter": {
            "learned": np.round(rewards[some], 4).tolist(),
            "exact": np.round(truth[some], 4).tolist(),
            "class": classes[some].tolist(),
        },
        "tabular": {"loss": tabular.loss, "policy_gap": tabular.policy_gap, "reward_gap": tabular.reward_gap},
    }


def tokens(lab: Lab, model: GPT) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all tokens of the held-out pairs: learned rewards, exact A*, classes. The reference is the main run's."""
    both = (score_groups(of, lab.groups, lab.main.tokenizer.pad) for of in (model, lab.main.reference))
    return rewards_and_truth(lab.world, lab.posts, lab.groups, *both, lab.main.beta)


def steps(lab: Lab) -> dict:
    """The gap after some steps of DPO."""
    _, policies = lab.course("all")
    return {str(step): gap_figures(*tokens(lab, model)[:2]) for step, model in policies.items() if step}


def small_tree() -> TokenMDP:
    """All strings of at most three tokens out of three, with a random pi_ref and random rewards."""
    (token, next_), generator = tree(3, 3), torch.Generator().manual_seed(0)
    logits, reward = (torch.randn(token.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return TokenMDP(token, next_, logits.masked_fill(token < 0, -torch.inf).log_softmax(-1), reward)


@styled
def draw(found: dict):
    """Token by token; by pairs, steps and beta; in a table."""
    message = "DPO learns the exact advantage A* of a token, and nearer with more data"
    figure, ((scatter, by_class, tabular), (pairs, steps, beta)) = panels(message, 3, 2, 2.8)
    exact, learned, kinds = (np.array(found["scatter"][key]) for key in ("exact", "learned", "class"))
    for axis in (scatter, by_class):
        shown = np.abs(exact) < (np.inf if axis is scatter else 0.4)
        for kind, (colour, marker) in KINDS.items():
            mine = shown & (kinds == kind)
            axis.plot(exact[mine], learned[mine], marker, color=colour, markersize=3, alpha=0.5, label=kind)
        ends = [exact[shown].min(), exact[shown].max()]
        axis.plot(ends, ends, color="black", linewidth=0.8)
    label(scatter, "Rewards lie on A*, facts' widely", "exact A*, reward units", "learned, reward units")
    label(by_class, "… the small ones too (|A*| < 0.4)", "exact A*, reward units", "")
    scatter.legend(markerscale=2, handletextpad=0)
    for axis, key, title, x in (
        (pairs, "pairs", "More pairs, nearer", "preference pairs"),
        (steps, "steps", "More steps, nearer", "DPO steps"),
        (beta, "beta", "The world's own beta is best", "beta"),
    ):
        at, (correlation, r2) = by_number(found[key], "correlation", "r2")
        axis.plot(at, correlation, "-o", color=BLUE, label="correlation")
        axis.plot(at, r2, "--s", color=ORANGE, label="r²")
        axis.set_ylim(min(0, axis.get_ylim()[0]), 1.02)
        numbers(axis, at, 1.9)
        label(axis, title, x, "with A*, held-out tokens" if axis is pairs else "")
    pairs.legend(loc="lower right")
    for name, style, colour, words in (
        ("policy_gap", "-", BLUE, "max |π − π*|"),
        ("reward_gap", "--", ORANGE, "max |reward − A*|"),
    ):
        values = found["tabular"][name]
        tabular.semilogy(np.arange(1, len(values) + 1), values, style, color=colour, label=words)
    label(tabular, "In a table DPO finds π*", "calls of L-BFGS, 20 iterations each", "distance")
    tabular.legend()
    return figure
