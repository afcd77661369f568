"""What a wider beam finds (the paper's Fig. 2): by beta, by the beam's alpha, and with a labeller who likes length."""

from functools import partial

import numpy as np

from minqstar.errors import require
from minqstar.evaluate import MAX_NEW_TOKENS, decode_all
from minqstar.lab.findings.drawing import BLUE, GREEN, GREY, ORANGE, label, numbers, panels, styled
from minqstar.lab.findings.lab import ROWS, Lab, chunks, outcome
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import Decoded
from minqstar.search.evaluator import Network, Table
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.theory.mdp import solve
from minqstar.training.data import Group

BIAS = 0.3  # reward units a token, of the labeller who likes length: more than a filler costs


def compute(lab: Lab) -> dict:
    """By beta and labeller: beams of every width, draws at temperature 1, and the likeliest under the exact pi*."""
    studies = [(f"beta {beta:g}", beta, 0.0) for beta in lab.scale.betas]
    studies += [(f"beta {beta:g}, length-biased labels", beta, BIAS) for beta in lab.scale.biased_betas]
    curves, draws, ceiling = {}, {}, {}
    for name, beta, bias in studies:
        what = (lab, beta, bias)
        curves[name] = lab.piece(f"beams_{beta:g}_{bias:g}", partial(widths, *what))
        draws[name] = lab.piece(f"draws_{beta:g}_{bias:g}", partial(drawn, *what))
        if not bias:
            ceiling[name] = outcome(lab, likeliest(lab, beta))
    found = {"curves": curves, "draws": draws, "likeliest_under_exact_optimum": ceiling}
    return {"widths": list(lab.scale.widths), "posts": lab.scale.posts, "length_bias": BIAS, **found}


def widths(lab: Lab, beta: float, bias: float) -> dict:
    """By the beam's alpha, at every width: what the oracle says, and the learned return.

    That is the implicit return and the exact V*(s_0), by telescoping; DPO leaves V* open.
    """
    run_ = lab.run(beta, bias=bias)
    prompts, values = [group.prompt for group in lab.groups[: lab.scale.posts]], lab.values(beta, bias)
    found = {}
    with lab.session.progress("beams", len(lab.scale.alphas) * len(lab.scale.widths)) as advance:
        for alpha in lab.scale.alphas:
            line = []
            for width in lab.scale.widths:
                config = BeamConfig(width, alpha=alpha)
                best: list[Decoded] = []
                for some in chunks(prompts, ROWS):
                    searched = beam_search(Network(run_.model), some, run_.tokenizer.ends, MAX_NEW_TOKENS, config)
                    best += [responses[0] for responses in searched]
                groups = [Group(prompt, (b.tokens,)) for prompt, b in zip(prompts, best, strict=True)]
                learned = np.array(lab.returns(run_, groups))[:, 0] + values[: len(best)]
                line.append({**outcome(lab, best, bias, learned), "logp": float(np.mean([b.score for b in best]))})
                advance()
            found[f"alpha {alpha:g}"] = {key: [point[key] for point in line] for key in line[0]}
    return found


def drawn(lab: Lab, beta: float, bias: float) -> dict:
    """What the oracle says of a draw for each post."""
    run_ = lab.run(beta, bias=bias)
    prompts = [group.prompt for group in lab.groups[: lab.scale.posts]]
    return outcome(lab, decode_all(run_.model, prompts, run_.tokenizer.ends, 0))


def likeliest(lab: Lab, beta: float) -> list[Decoded]:
    """The likeliest response under the exact pi*: tree search to its proof."""
    posts = lab.posts[: lab.scale.posts]
    found: list = [None] * len(posts)
    for _, places, mdp in lab.world.tables(posts):
        table = Table(mdp, solve(mdp, beta), beta, lab.main.tokenizer.n_vocab)
        searched, _ = mcts(table, [[]] * len(places), lab.main.tokenizer.ends, MAX_NEW_TOKENS, MCTSConfig(10**4))
        for place, of in zip(places, searched, strict=True):
            require(of.proved, "tree search has not closed an exact tree")
            found[place] = of.response
    return found


@styled
def draw(found: dict):
    """Four comparisons, one a panel; left of one beam stand draws of the same policy at temperature 1."""
    figure, ((wins, length), (biased, off)) = panels("Wider beams find little more, and do not ramble", 2, 2)
    unbiased = [name for name in found["curves"] if "labels" not in name]
    labelled = next(name for name in found["curves"] if "labels" in name)
    of = labelled.split(",")[0]
    for name, style in zip(unbiased, ("-o", "--s", ":^"), strict=False):
        line(wins, found, name, "alpha 0", "win_rate", name, style, (BLUE, ORANGE, GREEN)[unbiased.index(name)])
    line(length, found, of, "alpha 0", "length", "log π summed (alpha 0)", "-o", BLUE)
    line(length, found, of, "alpha 1", "length", "divided by length (alpha 1)", "--s", ORANGE)
    for axis, key in ((biased, "win_rate"), (off, "off_grammar")):
        line(axis, found, of, "alpha 0", key, "true labels", "-o", BLUE)
        line(axis, found, labelled, "alpha 0", key, "labels like length", "--s", ORANGE)
    best = found["likeliest_under_exact_optimum"][unbiased[0]]  # of every beta the same
    for axis, key in ((wins, "win_rate"), (length, "length"), (biased, "win_rate")):
        axis.axhline(best[key], color=GREY, linestyle="-.", linewidth=1, label="likeliest under the exact π*")
    label(wins, "Five beams win no more than one", "beams", "wins against the preferred")
    label(length, f"Normalised by length, no longer ({of})", "beams", "mean tokens")
    label(biased, f"Where labels like length, beams help ({of})", "beams", "wins against the preferred")
    label(off, f"… for fewer leave the grammar ({of})", "beams", "share off the grammar")
    for axis in (wins, biased):
        axis.set_ylim(top=1.0)
    length.set_ylim(0, 40)
    off.set_ylim(bottom=0)
    for axis in (wins, length, biased, off):
        numbers(axis, found["widths"])
        axis.set_xticks([DRAW, *found["widths"]], ["draw", *map(str, found["widths"])])
        axis.legend()
    return figure


DRAW = 0.62  # where a draw stands on the axis of widths


def line(axis, found: dict, name: str, alpha: str, key: str, words: str, style: str, colour: str):
    """One figure of one policy, by width; shares with the middle 95% of bootstrapped means."""
    values = np.array(found["curves"][name][alpha][key], dtype=float)
    axis.plot(found["widths"], values, style, color=colour, label=words)
    if (drawn := found["draws"][name][key]) is not None:
        axis.plot([DRAW, found["widths"][0]], [drawn, values[0]], style, color=colour, linewidth=0.6)
    if key == "win_rate":
        low, high = np.array(found["curves"][name][alpha]["win_interval"]).T
        axis.fill_between(found["widths"], low, high, color=colour, alpha=0.12, linewidth=0)
