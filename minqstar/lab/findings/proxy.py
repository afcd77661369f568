"""Proxy tuning (Eq. 14, 15): a small pair of policy and reference steers a larger base model."""

import numpy as np

from minqstar.lab.findings.drawing import BLUE, GREEN, GREY, label, panels, styled
from minqstar.lab.findings.lab import CPU, Lab, sampled
from minqstar.search.evaluator import Network, Proxy
from minqstar.training.checkpoint import load_run


def compute(lab: Lab) -> dict:
    """What the oracle says of the base's draws as it is steered, and of DPO on the larger and on the small model."""
    base = load_run(lab.larger_reference, CPU).model

    def steered(alpha: float) -> dict:
        return sampled(lab, Proxy(Network(base), Network(lab.main.model), Network(lab.main.reference), alpha))

    mixes = lab.piece("proxy", lambda: {"mixes": [steered(alpha) for alpha in lab.scale.mixes]})["mixes"]
    larger = lab.run(reference=lab.larger_reference)
    return {
        "alpha": list(lab.scale.mixes),
        "parameters": {"larger": base.num_parameters(), "small": lab.main.model.num_parameters()},
        "steered": mixes,
        "larger_dpo": lab.piece("proxy_larger_dpo", lambda: sampled(lab, Network(larger.model))),
        "small_dpo": lab.piece("proxy_small_dpo", lambda: sampled(lab, Network(lab.main.model))),
    }


@styled
def draw(found: dict):
    """By strength: wrong facts, true return, and the share off the grammar."""
    figure, (line,) = panels("A small pair steers a larger model better than DPO trains it in as many steps", 3)
    alone = {"larger_dpo": ("DPO on the larger", GREEN, "--"), "small_dpo": ("the small DPO alone", GREY, ":")}
    titles = {
        "fact_errors": ("Fewer facts are wrong", "share of facts"),
        "true_return": ("The true return rises", "mean, reward units"),
        "off_grammar": ("Alpha 2 leaves the grammar more", "share of draws"),
    }
    for axis, (key, (title, words)) in zip(line, titles.items(), strict=True):
        values = np.array([point[key] for point in found["steered"]], dtype=float)
        axis.plot(found["alpha"], values, "-o", color=BLUE, label="larger base, steered")
        for name, (of, colour, style) in alone.items():
            if found[name][key] is not None:  # no draw stayed in the grammar
                axis.axhline(found[name][key], color=colour, linestyle=style, label=of)
        axis.set_ylim(bottom=0)
        label(axis, title, "alpha (0: the base alone)", words)
    line[0].legend()
    return figure
