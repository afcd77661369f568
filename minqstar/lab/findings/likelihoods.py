"""Likelihoods fall during DPO (the paper's Fig. 3), as Eq. 16 says they must: from three references."""

import numpy as np
import torch

from minqstar.evaluate import MAX_NEW_TOKENS, pair_figures
from minqstar.lab.findings.drawing import BLUE, GREY, ORANGE, RED, label, panels, styled
from minqstar.lab.findings.lab import ROWS, Lab, chunks, log_policies
from minqstar.lm.model import GPT
from minqstar.search.decode import decode, sampler
from minqstar.search.evaluator import Network
from minqstar.theory.qfunction import expected_implicit_reward, implicit_reward
from minqstar.training.scoring import score_groups

DRAWS_A_POST = 4


def compute(lab: Lab) -> dict:
    """Implicit returns while DPO goes on: of the pairs trained on, and of draws of pi_ref beside their expectation."""
    courses = {start: lab.piece(f"likelihoods_{start}", lambda of=start: watched(lab, of)) for start in STARTS}
    measured = [m for course in courses.values() for m in course["measured"]]
    worst = max(abs(m["difference"]) / max(m["standard_error"], 1e-12) for m in measured)
    return {"draws": lab.scale.draws, "courses": courses, "largest_difference_in_standard_errors": worst}


def watched(lab: Lab, start: str) -> dict:
    """A course: its pairs' returns, smoothed, and what `Watch` measures of its policies."""
    history, policies = lab.course(start)
    watch = Watch(lab, policies.pop(0))
    measured = [{"step": step, **watch.measure(model)} for step, model in policies.items()]
    return {"history": {name: smooth(values) for name, values in history.items()}, "measured": measured}


class Watch:
    """Draws of a reference, and what a policy that began there makes of them."""

    def __init__(self, lab: Lab, reference: GPT):
        self.lab, self.beta, n = lab, lab.main.beta, DRAWS_A_POST
        prompts = [group.prompt for group in lab.groups][: lab.scale.draws // n]
        choose, ends = sampler(torch.Generator().manual_seed(0)), lab.main.tokenizer.ends
        self.prompts, self.draws = [], []
        for some in chunks(prompts, ROWS):
            self.prompts += [prompt for prompt in some for _ in range(n)]
            lines = decode(Network(reference), some, ends, MAX_NEW_TOKENS, choose, n)
            self.draws += [draw.tokens for line in lines for draw in line]
        self.log_ref = log_policies(reference, self.prompts, self.draws)
        self.ref_of_pairs = score_groups(reference, lab.groups, lab.main.tokenizer.pad)

    def measure(self, model: GPT) -> dict:
        """Implicit returns of the reference's draws: their mean, its expectation by Eq. 16, and the difference.

        The two have one expectation, draw by draw: `difference` is the mean of the paired one, `standard_error` its
        own. Beside them the figures of the held-out pairs.
        """
        log_pi = log_policies(model, self.prompts, self.draws)
        at, chosen = torch.arange(len(log_pi)), torch.tensor([token for draw in self.draws for token in draw])
        rewards = implicit_reward(log_pi[at, chosen].double(), self.log_ref[at, chosen].double(), self.beta)
        parts = zip(log_pi.split(4096), self.log_ref.split(4096), strict=True)
        expected = torch.cat([expected_implicit_reward(p.double(), r.double(), self.beta) for p, r in parts])
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


STARTS = {
    "all": "SFT on all answers:\nchosen falls, less than π_ref's draws",
    "chosen": "SFT on chosen answers:\nchosen falls as π_ref's draws do",
    "none": "No SFT, posts read only:\nboth fall far, and alike",
}


@styled
def draw(found: dict):
    """A reference a panel: returns of chosen and rejected, and those of the reference's draws on their expectation."""
    figure, (line,) = panels("Answers get less likely during DPO, the chosen ones too, as Eq. 16 says", 3, height=3.6)
    for axis, (start, course) in zip(line, found["courses"].items(), strict=True):
        for name, style, colour in (("chosen", "-", BLUE), ("rejected", "--", ORANGE)):
            axis.plot(*np.array(course["history"][f"{name}_reward"]).T, style, color=colour, label=name)
        of = ([m[key] for m in course["measured"]] for key in ("step", "expected", "drawn", "standard_error"))
        steps, expected, drawn, error = map(np.array, of)
        axis.plot(steps, expected, color=GREY, label="−β KL(π_ref‖π), Eq. 16")
        words = "draws of π_ref, ±2 standard errors of the difference"
        axis.errorbar(steps, drawn, 2 * error, fmt="o", color=RED, capsize=2, label=words)
        axis.axhline(0, color="black", linewidth=0.8)
        label(axis, STARTS[start], "DPO steps", "implicit return, reward units" if axis is line[0] else "")
    figure.legend(*line[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
