"""Likelihoods during DPO, and during CPL, which has no reference (the paper's Fig. 3), beside what Eq. 16 says."""

import numpy as np
import torch
from torch import Tensor

from minqstar.evaluate import MAX_NEW_TOKENS, pair_figures
from minqstar.lab.findings.drawing import BLUE, GREY, ORANGE, RED, label, panels, styled
from minqstar.lab.findings.lab import ROWS, Lab, chunks, log_policies
from minqstar.lm.model import GPT
from minqstar.search.decode import decode, sampler
from minqstar.search.evaluator import Network
from minqstar.theory.losses import dpo_loss
from minqstar.theory.qfunction import expected_implicit_reward, implicit_reward
from minqstar.training.data import Batch
from minqstar.training.scoring import score_groups
from minqstar.training.trainer import Objective

DRAWS_A_POST = 4


class CPL(Objective):
    """DPO's loss without a reference, log pi_ref = 0, so that returns are beta log pi (arXiv 2310.13639)."""

    def __init__(self, beta: float):
        self.beta = beta

    def units(self, batch: Batch) -> int:
        return len(batch.sizes)

    def sums(self, token_logps: Tensor, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        terms = dpo_loss(token_logps, None, batch.response, batch.sizes, self.beta)
        return {name: term.sum() for name, term in terms._asdict().items()}


def compute(lab: Lab) -> dict:
    """Implicit returns while training goes on: of the pairs trained on, of draws of p beside their expectation."""
    courses = {name: lab.piece(f"likelihoods_{name}", lambda of=name: watched(lab, of)) for name in COURSES}
    measured = [m for course in courses.values() for m in course["measured"]]
    worst = max(abs(m["difference"]) / max(m["standard_error"], 1e-12) for m in measured)
    return {"draws": lab.scale.draws, "courses": courses, "largest_difference_in_standard_errors": worst}


def watched(lab: Lab, name: str) -> dict:
    """A course: its pairs' returns, smoothed, and what `Watch` measures of its policies.

    DPO's draws are of the reference it began at. CPL has none: its draws are of the SFT model, whatever it began at.
    """
    if name.startswith("cpl_"):
        history, policies = lab.course(name.removeprefix("cpl_"), CPL(lab.main.beta))
        watch = Watch(lab, lab.main.reference, without_reference=True)
    else:
        history, policies = lab.course(name)
        watch = Watch(lab, policies.pop(0))
    measured = [{"step": step, **watch.measure(model)} for step, model in policies.items()]
    return {"history": {name: smooth(values) for name, values in history.items()}, "measured": measured}


class Watch:
    """Draws of a model p, and what a policy makes of them: of p, if it is the reference, or `without_reference`."""

    def __init__(self, lab: Lab, p: GPT, without_reference: bool = False):
        self.lab, self.beta, n = lab, lab.main.beta, DRAWS_A_POST
        prompts = [group.prompt for group in lab.groups][: lab.scale.draws // n]
        choose, ends = sampler(torch.Generator().manual_seed(0)), lab.main.tokenizer.ends
        self.prompts, self.draws = [], []
        for some in chunks(prompts, ROWS):
            self.prompts += [prompt for prompt in some for _ in range(n)]
            lines = decode(Network(p), some, ends, MAX_NEW_TOKENS, choose, n)
            self.draws += [draw.tokens for line in lines for draw in line]
        self.drawn = torch.tensor([token for draw in self.draws for token in draw])
        self.log_p = log_policies(p, self.prompts, self.draws)
        self.log_ref, self.entropy = self.of_drawn(self.log_p), torch.zeros(len(self.drawn))
        self.ref_of_pairs = score_groups(p, lab.groups, lab.main.tokenizer.pad)
        if without_reference:  # log pi_ref = 0
            self.log_ref.zero_()
            parts = map(Tensor.double, self.log_p.split(4096))
            self.entropy = torch.cat([-(part.exp() * part).sum(-1) for part in parts])
            self.ref_of_pairs = [[0 * logps for logps in group] for group in self.ref_of_pairs]

    def of_drawn(self, log_policy: Tensor) -> Tensor:
        """log pi (N,) of the tokens that were drawn, out of log pi (N, V)."""
        return log_policy[torch.arange(len(self.drawn)), self.drawn].double()

    def measure(self, model: GPT) -> dict:
        """Implicit returns of the draws: their mean, its expectation, -beta KL(p||pi) (Eq. 16), and the difference.

        Without a reference the returns are beta log pi, and the expectation is -beta (H(p) + KL(p||pi)). The two have
        one expectation, draw by draw: `difference` is the mean of the paired one, `standard_error` its own. Beside
        them the figures of the held-out pairs.
        """
        log_pi = log_policies(model, self.prompts, self.draws)
        rewards = implicit_reward(self.of_drawn(log_pi), self.log_ref, self.beta)
        parts = zip(log_pi.split(4096), self.log_p.split(4096), strict=True)
        expected = torch.cat([expected_implicit_reward(pi.double(), p.double(), self.beta) for pi, p in parts])
        expected = expected - self.beta * self.entropy
        lengths = [len(draw) for draw in self.draws]
        returns, expectations = (torch.stack([part.sum() for part in of.split(lengths)]) for of in (rewards, expected))
        paired = returns - expectations
        of_pairs = score_groups(model, self.lab.groups, self.lab.main.tokenizer.pad)
        return {
            "drawn": returns.mean().item(),
            "expected": expectations.mean().item(),
            "difference": paired.mean().item(),
            "standard_error": (paired.std() / len(paired) ** 0.5).item(),
            **pair_figures(of_pairs, self.ref_of_pairs, self.beta),
        }


def smooth(values: list[float], points: int = 100) -> list[list[float]]:
    """Means over equal stretches: [steps made, mean]; the first value was measured before any."""
    parts = np.array_split(np.arange(len(values)), min(points, len(values)))
    return [[float(part.mean()), float(np.mean(np.array(values)[part]))] for part in parts]


COURSES = {
    "all": "SFT on all answers:\nchosen falls, less than π_ref's draws",
    "chosen": "SFT on chosen answers:\nchosen falls as π_ref's draws do",
    "none": "No SFT, posts read only:\nboth fall far, and alike",
    "cpl_all": "CPL (no reference) after SFT:\ndraws of p, the SFT model, can only fall",
    "cpl_none": "CPL without SFT:\nall rise, alike, and stay far from π = p",
}


@styled
def draw(found: dict):
    """A course a panel: returns of chosen and rejected, and those of draws on their expectation; CPL below."""
    message = "Answers get less likely, the chosen ones too, as Eq. 16 says; only CPL without SFT lifts them"
    figure, axes = panels(message, 3, 2, height=3.2)
    most = found["courses"]["cpl_all"]["measured"][0]["expected"]  # there pi = p
    for axis, (name, course) in zip(axes.flat, found["courses"].items(), strict=False):
        for side, style, colour in (("chosen", "-", BLUE), ("rejected", "--", ORANGE)):
            axis.plot(*np.array(course["history"][f"{side}_reward"]).T, style, color=colour, label=side)
        of = ([m[key] for m in course["measured"]] for key in ("step", "expected", "drawn", "standard_error"))
        steps, expected, drawn, error = map(np.array, of)
        axis.plot(
            steps, expected, color=GREY, label="expected of draws (Eq. 16):\n−β KL(π_ref‖π);\nCPL: −β (H(p) + KL(p‖π))"
        )
        words = "draws of π_ref (CPL: of p),\n±2 standard errors of the\ndifference"
        axis.errorbar(steps, drawn, 2 * error, fmt="o", color=RED, capsize=2, label=words)
        cpl = name.startswith("cpl_")
        words = f"their largest expectation:\n0; CPL: −β H(p) = {most:.2f}"
        axis.axhline(most if cpl else 0, color="black", linewidth=0.8, label=words)
        y = f"implicit return{' β log π' if cpl else ''}, reward units"
        label(axis, COURSES[name], "steps", y if axis in axes[:, 0] else "")
    axes[1, 2].axis("off")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center left", labelspacing=1.2)
    return figure
