"""Best of n, ranked by the implicit reward, is over-optimised: it promises ever more, and wins less.

The implicit return beta log(pi/pi_ref) is right for answers like those that pi was trained on, draws of pi_ref. The
more draws one looks at, the odder the best by it: both models find it unlikely, pi_ref even more so. A log-probability
cannot be raised in that way.
"""

import numpy as np
import torch

from minqstar.evaluate import MAX_NEW_TOKENS
from minqstar.lab.findings.drawing import BLUE, GREEN, RED, label, numbers, panels, styled
from minqstar.lab.findings.lab import Lab, chunks, outcome
from minqstar.search.decode import Decoded, decode, sampler
from minqstar.search.evaluator import Network
from minqstar.training.data import Group

SIZES = (1, 2, 4, 8, 16, 32, 64)
AT_ONCE = 16  # posts, each with all of its draws


def compute(lab: Lab) -> dict:
    """By what ranks, for every n: what the oracle says of the best of the first n draws, and its implicit return."""
    return lab.piece("best_of_n", lambda: ranked(lab, *drawn(lab)))


def drawn(lab: Lab) -> tuple[list[list[Decoded]], dict[str, np.ndarray]]:
    """Of the first posts the most draws at temperature 1, and by what ranks them their scores (posts, draws).

    Implicit returns (reward units), log-probs (nats), and true returns, -inf off the grammar.
    """
    choose, ends = sampler(torch.Generator().manual_seed(0)), lab.main.tokenizer.ends
    prompts = [group.prompt for group in lab.groups[: lab.scale.posts]]
    draws: list[list[Decoded]] = []
    returns: list[list[float]] = []
    with lab.session.progress("draws", len(prompts)) as advance:
        for some in chunks(prompts, AT_ONCE):
            lines = decode(Network(lab.main.model), some, ends, MAX_NEW_TOKENS, choose, SIZES[-1])
            draws += lines
            groups = [Group(p, tuple(draw.tokens for draw in line)) for p, line in zip(some, lines, strict=True)]
            returns += lab.returns(lab.main, groups)
            advance(len(some))
    judge = lambda post, line: [lab.world.judge_tokens(post, draw.tokens).total for draw in line]  # noqa: E731
    true = np.array([judge(*both) for both in zip(lab.posts, draws, strict=False)])
    return draws, {
        "reward": np.array(returns),
        "likelihood": np.array([[draw.score for draw in line] for line in draws]),
        "judge": np.where(np.isnan(true), -np.inf, true),
    }


def ranked(lab: Lab, draws: list[list[Decoded]], scores: dict[str, np.ndarray]) -> dict:
    """By what ranks, a list over n of each figure. Finished draws come before truncated ones, as in `best_of_n`."""
    truncated = np.array([[draw.truncated for draw in line] for line in draws])
    found: dict = {"n": list(SIZES), "posts": len(draws)}
    for by, score in scores.items():
        line = []
        for n in SIZES:
            best = np.where(truncated, -np.inf, score)[:, :n].argmax(-1)
            responses = [of[i] for of, i in zip(draws, best, strict=True)]
            implicit = float(np.take_along_axis(scores["reward"], best[:, None], -1).mean())
            line.append({**outcome(lab, responses), "implicit_return": implicit})
        found[by] = {key: [point[key] for point in line] for key in line[0]}
    return found


@styled
def draw(found: dict):
    """What is promised, what is won, and what leaves the grammar, by n."""
    figure, (line,) = panels("Best of n by implicit reward is over-optimised: it promises more and wins less", 3)
    titles = {
        "implicit_return": ("What it promises rises", "mean implicit return"),
        "win_rate": ("What it wins falls", "wins against the preferred"),
        "off_grammar": ("It leaves the grammar", "share of posts"),
    }
    for axis, (key, (title, words)) in zip(line, titles.items(), strict=True):
        for by, style, colour in (("reward", "-o", RED), ("likelihood", "--s", BLUE), ("judge", ":^", GREEN)):
            axis.plot(found["n"], found[by][key], style, color=colour, label=f"by {by}")
            if key == "win_rate":
                axis.fill_between(found["n"], *np.array(found[by]["win_interval"]).T, color=colour, alpha=0.12, lw=0)
        axis.set_ylim(bottom=0)
        numbers(axis, found["n"])
        label(axis, title, "n draws", words)
    line[0].legend()
    return figure
