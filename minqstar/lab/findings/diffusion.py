"""Diffusion of Gaussians, exactly: what a fixed prior leaves, what fixed variances cost, which steps earn the reward.

The case: data N(0, 1), the reward q x - P x^2/2 of x_0 with its peak at 2, beta 1. So pi* draws x_0 from N(1, 1/2).
All of it is arithmetic in one dimension, so it takes seconds and no trained run (arXiv 2404.12358, Appendix B).
"""

import numpy as np
import torch
from torch import Tensor

from minqstar.lab.findings.drawing import BLUE, GREY, ORANGE, label, numbers, panels, styled
from minqstar.theory import diffusion as theory

P, Q, BETA = 1.0, 2.0, 1.0  # reward units; beta in reward units a nat
SCHEDULES = {"linear": theory.linear_noise, "cosine": theory.cosine_noise}
LENGTHS = (20, 50, 100, 200, 500, 1000)  # steps of a chain; the last is DDPM's
STOPS = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0)  # shares of the noise after which x_T is taken


def compute(_lab=None) -> dict:
    """For each schedule the three measures, and the closed form of the first. Nothing of a lab is used."""
    of = {name: {"prior": prior(noise), "variances": variances(noise), "credit": owed(noise)}
          for name, noise in SCHEDULES.items()}  # fmt: skip
    off = [np.abs(np.array(m["prior"]["luck"]) / luck_of(m["prior"]["signal"]) - 1).max() for m in of.values()]
    signal = np.geomspace(1e-5, 1, 41)
    closed_form = {"signal": signal.tolist(), "luck": luck_of(signal).tolist(), "off_by_at_most": float(max(off))}
    return {"schedules": of, "closed_form": closed_form}


def solved(noise: Tensor, linear: bool = False) -> tuple[theory.Chain, list[theory.Quadratic], theory.Chain]:
    """pi_ref, V* before each step, and pi*; with `linear` of the reward q x alone."""
    one = torch.ones(1, 1, dtype=torch.float64)
    chain = theory.denoiser(theory.gaussian(0 * one[0], one), noise)
    reward = theory.Quadratic(0 * one if linear else P * one, Q * one[0], torch.zeros((), dtype=torch.float64))
    return chain, *theory.solve_chain(chain, reward, BETA)


def prior(noise) -> dict:
    """The signal sqrt(prod(1 - b)) that x_T keeps, and what a fixed prior leaves to luck, reward units.

    x_T is where the noise of 1,000 steps stops, the later the less signal.
    """
    whole = noise(LENGTHS[-1])
    parts = [whole[: round(share * len(whole))] for share in STOPS]
    lucks = [theory.prior_luck(chain, values) for chain, values, _ in map(solved, parts)]
    return {"signal": [(1 - part).prod().sqrt().item() for part in parts], "luck": lucks}


def luck_of(signal) -> np.ndarray:
    """sd of V*(x_T), reward units, for data N(0, 1), by the signal s: w s sqrt(q^2 + (P s)^2 / 2).

    Given x_T, x_0 has the mean s x_T and the variance 1 - s^2, so V* is that of one step, with w = 1 / (1 + (1 - s^2)
    P/beta). For small s it is beta |m* - m| s, with m* and m the means of the data with and without exp(r/beta).
    """
    s = np.array(signal)
    return s * np.sqrt(Q**2 + (P * s) ** 2 / 2) / (1 + (1 - s**2) * P / BETA)


def variances(noise) -> dict:
    """What fixed variances cost of V*(s_0), reward units, by the number of steps; its slope, log by log, at the end."""
    cost = [theory.variance_cost(*solved(noise(T))[:2], BETA).sum().item() for T in LENGTHS]
    slope = np.diff(np.log(cost[-2:])) / np.diff(np.log(LENGTHS[-2:]))
    return {"steps": list(LENGTHS), "cost": cost, "slope": slope.item()}


def owed(noise) -> dict:
    """The share of all credit that the steps so far have earned, from x_T on, at each hundredth of 1,000 steps.

    `half` is the share of the steps, the last ones, that earn half of it. `linear_share` and `linear_half` are the same
    of the linear reward q x, whose credit comes back as the signal prod(1 - b) does.
    """
    found, made = {}, np.linspace(0, 1, LENGTHS[-1] + 1)
    for name, linear in (("", False), ("linear_", True)):
        chain, _, policy = solved(noise(LENGTHS[-1]), linear)
        earned = theory.credit(chain, policy, BETA).cumsum(0).numpy()  # of step 0, the prior's draw, on
        share = earned / earned[-1]
        found |= {f"{name}share": share[::10].tolist(), f"{name}half": float(1 - np.interp(0.5, share, made))}
    return {"made": made[::10].tolist(), **found}


@styled
def draw(found: dict):
    """A measure a panel; the numbers stand in the legends."""
    message = "Three habits of diffusion models, priced exactly: data N(0, 1), a reward with its peak at 2"
    figure, (line,) = panels(message, 3, height=3.8)
    closed = found["closed_form"]
    line[0].plot(closed["signal"], closed["luck"], color=GREY, linewidth=1, label="closed form")
    for (name, of), colour, marker in zip(found["schedules"].items(), (BLUE, ORANGE), "os", strict=True):
        luck, cost, earned = of["prior"], of["variances"], of["credit"]
        left = np.format_float_positional(luck["luck"][-1], 2, fractional=False)
        words = f"{name}; after all {LENGTHS[-1]:,} steps {left}"
        line[0].plot(luck["signal"], luck["luck"], marker, color=colour, label=words)
        words = f"{name}: slope {cost['slope']:.2f}, about {cost['cost'][-1] * cost['steps'][-1]:.2f}/T"
        line[1].plot(cost["steps"], cost["cost"], f"-{marker}", color=colour, label=words)
        made, share, by_signal = (100 * np.array(earned[key]) for key in ("made", "share", "linear_share"))
        line[2].plot(made, share, color=colour, label=f"{name}: half of it in the last {earned['half']:.0%}")
        line[2].plot(made, by_signal, ":", color=colour, label=f"… of a linear reward: {earned['linear_half']:.0%}")
    numbers(line[0], [0.0001, 0.01, 1])
    numbers(line[1], list(LENGTHS))
    line[2].axhline(50, color=GREY, linewidth=0.8)
    for axis in line:
        axis.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.2))
    for axis in line[:2]:
        axis.set_yscale("log")
    title = "A fixed prior leaves luck, as much\nas x_T keeps of the signal"
    label(line[0], title, "signal √∏(1 − b) of x_T", "sd of V*(x_T), reward units")
    label(line[1], "Fixed variances cost\nO(1/T) of V*(s_0)", "steps T", "short of V*(s_0), reward units")
    title = "Linear noise: late steps earn most.\nCosine noise: the middle ones do."
    label(line[2], title, "% of the steps made", "% of the credit earned")
    return figure
