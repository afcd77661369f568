"""Where probability mass goes: how much of it DPO moves off the grammar, and what lessens that."""

import numpy as np
import torch

from minqstar.evaluate import decode_all, off_grammar_rate
from minqstar.lab.findings.drawing import BLUE, GREEN, ORANGE, by_number, label, numbers, panels, styled
from minqstar.lab.findings.lab import Lab, log_policies, sampled
from minqstar.lm.model import GPT
from minqstar.search.decode import greedy, sampler
from minqstar.search.evaluator import Network

RULES = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.7": {"temperature": 0.7},
    "top-p 0.95": {"top_p": 0.95},
    "top-p 0.9": {"top_p": 0.9},
    "greedy": None,
}


def compute(lab: Lab) -> dict:
    """The leakage of the reference and of policies, by steps, beta and pairs; and the outcome by how one draws."""

    def of(name: str, model: GPT) -> dict:
        return lab.piece(f"leak_{name}", lambda: leakage(lab, model))

    def draws(name: str, rules: dict | None) -> dict:
        choose = greedy if rules is None else sampler(torch.Generator().manual_seed(0), **rules)
        return lab.piece(f"leak_by_{name}", lambda: sampled(lab, Network(lab.main.model), choose))

    _, policies = lab.course("all")
    return {
        "draws": len(lab.groups),
        "reference": of("reference", policies.pop(0)),
        "steps": {str(step): of(f"step{step}", model) for step, model in policies.items()},
        "beta": {f"{beta:g}": of(f"beta{beta:g}", lab.run(beta).model) for beta in lab.scale.betas},
        "pairs": {str(n): of(f"pairs{n}", lab.run(pairs=n).model) for n in lab.scale.pairs},
        "decoding": {name: draws(name, rules) for name, rules in RULES.items()},
    }


def leakage(lab: Lab, model: GPT) -> dict[str, float]:
    """The share of draws that leave the grammar, and the probability of it at each token.

    The latter is a mean over the tokens of the first posts' two held-out responses, draws of pi_ref.
    """
    draws = decode_all(model, [group.prompt for group in lab.groups], lab.main.tokenizer.ends, 0)
    some = list(zip(lab.posts, lab.groups, strict=True))[: lab.scale.posts]
    both = [(post, group.prompt, response) for post, group in some for response in group.responses]
    log_pi = log_policies(model, [prompt for _, prompt, _ in both], [response for *_, response in both])
    allowed = torch.zeros_like(log_pi, dtype=torch.bool)
    at = 0
    for post, _, response in both:
        automaton = lab.world.automata[post.scenario]
        for state in automaton.walk(response)[0]:
            allowed[at, list(automaton.arc_of[state])] = True
            at += 1
    outside = log_pi.masked_fill(allowed, -torch.inf).double().logsumexp(-1).exp()
    verdicts = [lab.world.judge_tokens(post, draw.tokens) for post, draw in zip(lab.posts, draws, strict=True)]
    return {"off_grammar": off_grammar_rate(verdicts), "per_token": outside.mean().item()}


@styled
def draw(found: dict):
    """Of each next token by steps and by pairs; of whole draws by how one draws."""
    figure, (line,) = panels("DPO moves little probability off the grammar; colder draws hardly leave it", 3)
    titles = {"steps": ("Most leaks early in DPO", "DPO steps"), "pairs": ("… and with few or many pairs", "pairs")}
    for axis, (key, (title, x)) in zip(line, titles.items(), strict=False):
        at, (share,) = by_number(found[key], "per_token")
        axis.plot(at, 100 * share, "-o", color=BLUE, label="after DPO")
        axis.axhline(100 * found["reference"]["per_token"], color=ORANGE, linestyle="--", label="reference")
        axis.axhline(0, color=GREEN, linestyle=":", label="exact π* and π_ref")
        axis.set_ylim(bottom=-0.02)
        numbers(axis, at, 1.9)
        label(axis, title, x, "% of a next token's probability" if axis is line[0] else "")
    line[0].legend(loc="center")
    rules, axis = found["decoding"], line[2]
    share = np.array([100 * of["off_grammar"] for of in rules.values()][::-1])
    bars = 2 * (share * (100 - share) / found["draws"]) ** 0.5
    axis.barh(list(rules)[::-1], share, xerr=bars, color=BLUE, height=0.6, error_kw={"capsize": 2})
    axis.set_xlim(left=0)
    label(axis, "Cold or cut draws stay in it", "% of draws off the grammar", "")
    return figure
