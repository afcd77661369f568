"""Which tokens of a summary DPO pays for, beside the exact A* (the paper's Fig. 1), on summaries edited to be wrong.

A wrong fact is charged at its *decisive* token, the first at which the right value is out of reach.
"""

import textwrap
from collections.abc import Sequence

import numpy as np

from minqstar.errors import UserError, visible
from minqstar.evaluate import gap_figures
from minqstar.lab.findings.drawing import GREY, WIDTH, panels, styled
from minqstar.lab.findings.lab import Lab
from minqstar.score import Scored, token_rewards
from minqstar.show import shade
from minqstar.training.checkpoint import Run
from minqstar.training.data import Group, tokenize
from minqstar.world.posts import Post, post_of
from minqstar.world.slots import Edited, edited, slots
from minqstar.world.tldr import World

Edit = tuple[Edited, list[Scored]]  # a summary with none, one and two facts wrong, and what its tokens earn


def compute(lab: Lab) -> dict:
    """The example whose rewards match A* as well as the median edited post's do; and the figures over all of them."""
    edits = scored_edits(lab.main, lab.rows)
    errors = [misfit(line) for _, line in edits]
    middle = int(np.argsort(errors, kind="stable")[(len(edits) - 1) // 2])
    edit, line = edits[middle]
    return {
        "prompt": edit.post.prompt,
        "example_rmse": errors[middle],
        "versions": {name: plain(of, lab.world, edit.post) for name, of in named(edit, line).items()},
        **decisive_figures(lab.main, lab.rows),
        **stitching_figures(lab.world, edits),
    }


def misfit(line: list[Scored]) -> float:
    """The root mean square of reward - A* over all tokens of some responses, reward units."""
    errors = [of.rewards.double() - of.exact.advantage for of in line]
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


def scored_edits(run_: Run, rows: list[dict], progress=None) -> list[Edit]:
    """The preferred summary of each row that states two facts: made right, with its first and with both wrong."""
    tokenizer, world = run_.tokenizer, World(run_.tokenizer)
    found = (edited(world, post_of(row), tokenizer.encode_response(row["chosen"])) for row in rows)
    edits = [edit for edit in found if edit]
    groups = [Group(tokenizer.encode(edit.post.prompt), edit.versions) for edit in edits]
    return list(zip(edits, token_rewards(run_, groups, [edit.post for edit in edits], progress), strict=True))


def named(edit: Edited, line: list[Scored]) -> dict[str, Scored]:
    """The three versions, by which facts are wrong."""
    first, second = edit.facts
    return dict(zip(("right", f"wrong: {first}", f"wrong: {first}, {second}"), line, strict=True))


def example(run_: Run, rows: list[dict]) -> Edit:
    """The paper's example, a job whose salary and then position is wrong, or else the first post with two facts."""
    tokenizer, world = run_.tokenizer, World(run_.tokenizer)
    posts = [(row, post) for row in rows if "chosen" in row and (post := post_of(row))]
    for facts in (("offered", "role"), ()):
        for row, post in posts:
            edit = edited(world, post, tokenizer.encode_response(row["chosen"]), facts)
            if edit:
                return edit, token_rewards(run_, [Group(tokenizer.encode(post.prompt), edit.versions)], [post])[0]
    raise UserError(f"{run_.path} holds no pair of the TL;DR world; give --prompt and --response")


def plain(credit: Scored, world: World | None, post: Post | None) -> dict:
    """A response's figures as JSON: lists of one number a token; its wrong facts as [start, stop, decisive token]."""
    figures = {name: getattr(credit, name).tolist() for name in ("rewards", "logps", "ref_logps")}
    exact = credit.exact and credit.exact.advantage.tolist()
    facts = slots(world, post, credit.ids) if exact else []
    wrong = [[slot.start, slot.stop, slot.decisive] for slot in facts if slot.decisive is not None]
    return {"tokens": credit.tokens, **figures, "exact": exact, "wrong": wrong}


def auroc(low: np.ndarray, others: np.ndarray) -> float | None:
    """The chance that one of `low` is below one of `others`, ties counted half; None where there is none of either."""
    if not len(low) or not len(others):
        return None
    _, inverse, counts = np.unique(np.concatenate((low, others)), return_inverse=True, return_counts=True)
    rank = (counts.cumsum() - (counts - 1) / 2)[inverse]  # mean rank among equals, from 1
    above = rank[len(low) :].sum() - len(others) * (len(others) + 1) / 2
    return float(above / (len(low) * len(others)))


def fact_tokens(world: World, posts: list[Post], groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
    """Of all tokens of the groups' responses: which are decisive for a wrong fact, and which others are in a fact."""
    decisive, others = [], []
    for post, group in zip(posts, groups, strict=True):
        for ids in group.responses:
            found = slots(world, post, ids)
            ends = {slot.decisive for slot in found}
            inside = {i for slot in found for i in range(slot.start, slot.stop)}
            decisive += [i in ends for i in range(len(ids))]
            others += [i in inside - ends for i in range(len(ids))]
    return np.array(decisive), np.array(others)


def decisive_figures(run_: Run, rows: list[dict], progress=None) -> dict:
    """How well rewards tell the decisive tokens of wrong facts from all other fact tokens, on held-out pairs.

    Beside it the reference's log-prob alone: to a reference that writes right values more often than wrong ones, what
    is wrong is unlikely, too. Only the size of a reward says what it costs.
    """
    world, posts = World(run_.tokenizer), [post_of(row) for row in rows]
    groups, _ = tokenize(rows, run_.tokenizer, run_.model.config.block_size, share=False)
    lines = token_rewards(run_, groups, posts, progress)
    flat = lambda of: np.concatenate([of(credit) for line in lines for credit in line])  # noqa: E731
    learned, exact = flat(lambda c: c.rewards.double()), flat(lambda c: c.exact.advantage)
    reference = flat(lambda c: c.ref_logps)
    d, others = fact_tokens(world, posts, groups)
    scores = {"auroc": learned, "auroc_exact": exact, "auroc_reference": reference}
    return {
        **{name: auroc(of[d], of[others]) for name, of in scores.items()},
        "decisive_tokens": int(d.sum()),
        "other_fact_tokens": int(others.sum()),
        **gap_figures(learned, exact),
    }


def stitching_figures(world: World, edits: list[Edit]) -> dict:
    """What one and two edits change, learned and exact, means in reward units.

    `first` and `second`: at the decisive token, the second error's where the first is there already: both are found,
    each in its place. `later`: the size of the change at tokens after the edited slot that decide something (what
    stands before an edit cannot change).
    """
    changes: dict[str, list[float]] = {"first": [], "second": [], "later": []}
    exact: dict[str, list[float]] = {name: [] for name in changes}
    for edit, line in edits:
        places = [slots(world, edit.post, version) for version in edit.versions]
        decides = [[kind != "forced" for kind in credit.exact.kind] for credit in line]
        learned_and_exact = ([c.rewards.tolist() for c in line], [c.exact.advantage.tolist() for c in line])
        for kept, of in zip((changes, exact), learned_and_exact, strict=True):
            for name, fact, before, after in (("first", edit.facts[0], 0, 1), ("second", edit.facts[1], 1, 2)):
                old, new = (next(s for s in places[v] if s.fact == fact) for v in (before, after))
                kept[name].append(of[after][new.decisive] - of[before][old.start + new.decisive - new.start])
                later = zip(of[before][old.stop :], of[after][new.stop :], decides[after][new.stop :], strict=True)
                kept["later"] += [abs(a - b) for a, b, deciding in later if deciding]
    mean = lambda values: float(np.mean(values)) if values else None  # noqa: E731
    return {
        "edited_posts": len(edits),
        **{f"{name}_change": mean(values) for name, values in changes.items()},
        **{f"{name}_change_exact": mean(values) for name, values in exact.items()},
    }


CHARACTER = 0.602 * 8 / 72  # inches: how wide one is in DejaVu Sans Mono at 8 points
LEFT, RIGHT = 9, int(WIDTH / CHARACTER) - 2  # characters: where tokens begin and end


def draw(found: dict):
    """The median example."""
    note = f"Chosen by rule: the median of {found['edited_posts']} held-out posts by how well rewards match A*"
    note += f" (root mean square error {found['example_rmse']:.2f})."
    return picture("DPO charges a wrong fact where it goes wrong", found["prompt"], found["versions"], note)


@styled
def picture(message: str, prompt: str, versions: dict[str, dict], note: str = ""):
    """The prompt; each version's tokens on the shade of what they earn, learned and exact; wrong facts underlined."""
    words = textwrap.wrap(prompt, int(RIGHT * 1.1))
    lines = [(name, kind, of, part) for name, of in versions.items() for kind in ("rewards", "exact") if of[kind]
             for part in split(of["tokens"])]  # fmt: skip
    height = 1.2 * len(words) + 2.3 * len(lines) + 2 * len(versions) + 4.5
    figure, ((axis,),) = panels(message, 1, height=0.155 * height)
    axis.axis("off")
    axis.set(xlim=(0, WIDTH / CHARACTER), ylim=(-height + 1.5, 0.5))
    for i, line in enumerate(words):
        axis.text(0, -1.2 * i, line, color=GREY, fontsize=8, va="center", parse_math=False)
    y, last = -1.2 * len(words) - 0.8, ""
    for name, kind, of, part in lines:
        if name != last:
            y -= 0.4
            axis.text(0, y, name, fontweight="bold", va="center")
            y, last = y - 1.6, name
        axis.text(0, y, {"rewards": "learned", "exact": "exact A*"}[kind] * (part.start == 0), va="center", fontsize=8)
        tokens_line(axis, y, of, kind, part)
        y -= 2.3
    for i, value in enumerate((-2, -1, -0.5, -0.2, 0, 0.2, 0.5, 1, 2)):
        cell(axis, LEFT + 6 * i, y, 6, f"{value:+5g} " if value else "  0", value)
    axis.text(LEFT + 56, y, "reward units: orange is charged, blue is paid", va="center", fontsize=8)
    axis.text(0, y - 1.7, note, fontsize=8, va="center", color=GREY)
    return figure


def split(tokens: list[str]) -> list[range]:
    """The tokens that stand in each line of the picture."""
    starts, x = [0], LEFT
    for i, token in enumerate(tokens):
        if x + len(token) > RIGHT and i > starts[-1]:
            starts, x = [*starts, i], LEFT
        x += len(token)
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]


def tokens_line(axis, y: float, of: dict, kind: str, part: range):
    """Some tokens of a response from the left; below the decisive token of a wrong fact what it earns."""
    x = [LEFT]
    for i in part:
        cell(axis, x[-1], y, len(of["tokens"][i]), of["tokens"][i], of[kind][i])
        x.append(x[-1] + len(of["tokens"][i]))
    for start, stop, decisive in of["wrong"]:
        if start in part:
            axis.plot([x[start - part.start], x[min(stop, part.stop) - part.start]], [y - 0.65] * 2, "k", linewidth=1.5)
        if decisive in part:
            place = x[decisive - part.start]
            axis.text(place, y - 1.25, f"{of[kind][decisive]:+.2f}", fontsize=7, va="center")


def cell(axis, x: float, y: float, width: float, text: str, reward: float):
    """A text on the shade of a reward."""
    axis.barh(y, width, 1.1, left=x, color=shade(reward), linewidth=0)
    mono = {"family": "DejaVu Sans Mono", "fontsize": 8, "parse_math": False}
    axis.text(x, y, visible(text), va="center", ha="left", **mono)
