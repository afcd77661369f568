"""Credit assignment: which tokens of a summary DPO pays for, beside the exact A* where the world knows it (Fig. 1).

    python -m minqstar.lab.credit                                # a held-out post; its summary, with one and two errors
    python -m minqstar.lab.credit --prompt "…" --response "…"    # anything else
    python -m minqstar.lab.credit --html credit.html --png credit.png

A token's implicit reward is beta log(pi/pi_ref) (Eq. 10, 11), an advantage: what the token adds to or takes from the
return that its prefix promised. A wrong fact is charged at its *decisive* token, the first at which the right value
is out of reach.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from minqstar.cli import run
from minqstar.errors import UserError, is_text, needs, require
from minqstar.theory.qfunction import gap_figures, implicit_reward
from minqstar.training.checkpoint import Run, load_run, replace_file
from minqstar.training.data import Group, read_jsonl, tokenize
from minqstar.training.scoring import score_groups
from minqstar.world.automaton import Post
from minqstar.world.slots import edited, slots
from minqstar.world.tldr import World, post_of, read_post

PAID, CHARGED = (30, 100, 220), (225, 110, 0)  # blue and orange: told apart by everybody


class Credit(NamedTuple):
    """A response token by token: its texts, rewards (reward units) and log-probs (nats); A* where it is known."""

    tokens: list[str]
    rewards: list[float]
    logps: list[float]
    ref_logps: list[float]
    exact: list[float] | None


def credits(run_: Run, groups: list[Group], posts: Sequence[Post | None]) -> list[list[Credit]]:
    """For each group its responses' credit; A* for those of a post whose responses stay in the grammar."""
    world = World(run_.tokenizer)
    known = [
        (i, j)
        for i, (group, post) in enumerate(zip(groups, posts, strict=True))
        for j, response in enumerate(group.responses)
        if post is not None and len(world.automata[post.scenario].walk(response)[0]) == len(response)
    ]
    oracle = world.exact_rewards([posts[i] for i, _ in known], [groups[i].responses[j] for i, j in known], run_.beta)
    exact = dict(zip(known, (A_star for A_star, _ in oracle), strict=True))
    policy, reference = (score_groups(model, groups, run_.tokenizer.pad) for model in (run_.model, run_.reference))
    answers = []
    for i, (group, *both) in enumerate(zip(groups, policy, reference, strict=True)):
        line = []
        for j, (response, logps, ref_logps) in enumerate(zip(group.responses, *both, strict=True)):
            texts = [run_.tokenizer.text_of(token) for token in response]
            rewards = implicit_reward(logps, ref_logps, run_.beta)
            line.append(Credit(texts, *(t.tolist() for t in (rewards, logps, ref_logps)), exact.get((i, j))))
        answers.append(line)
    return answers


def auroc(low: np.ndarray, others: np.ndarray) -> float | None:
    """The chance that one of `low` is below one of `others`, ties counted half; None where there is none of either."""
    if not len(low) or not len(others):
        return None
    _, inverse, counts = np.unique(np.concatenate((low, others)), return_inverse=True, return_counts=True)
    rank = (counts.cumsum() - (counts - 1) / 2)[inverse]  # mean rank among equals, from 1
    above = rank[len(low) :].sum() - len(others) * (len(others) + 1) / 2
    return float(above / (len(low) * len(others)))


def decisive_figures(run_: Run, rows: list[dict]) -> dict:
    """How well rewards tell the decisive tokens of wrong facts from all other fact tokens, on held-out pairs.

    Beside it the reference's log-prob alone: to a reference that writes right values more often than wrong ones, what
    is wrong is unlikely, too. Only the size of a reward says what it costs.
    """
    world, tokenizer = World(run_.tokenizer), run_.tokenizer
    posts = [post_of(row) for row in rows]
    encode = tokenizer.encode_response
    groups = [Group(tokenizer.encode(row["prompt"]), (encode(row["chosen"]), encode(row["rejected"]))) for row in rows]
    decisive, in_slot, learned, exact, reference = [], [], [], [], []
    for post, group, line in zip(posts, groups, credits(run_, groups, posts), strict=True):
        for response, credit in zip(group.responses, line, strict=True):
            found = slots(world, post, response)
            ends = {slot.decisive for slot in found}
            inside = {i for slot in found for i in range(slot.start, slot.stop)}
            decisive += [i in ends for i in range(len(response))]
            in_slot += [i in inside for i in range(len(response))]
            learned += credit.rewards
            exact += credit.exact
            reference += credit.ref_logps
    d, inside, learned, exact, reference = map(np.array, (decisive, in_slot, learned, exact, reference))
    others = inside & ~d
    scores = {"auroc": learned, "auroc_exact": exact, "auroc_reference": reference}
    return {
        **{name: auroc(of[d], of[others]) for name, of in scores.items()},
        "decisive_tokens": int(d.sum()),
        "other_fact_tokens": int(others.sum()),
        **gap_figures(learned, exact),
    }


def stitching_figures(run_: Run, rows: list[dict]) -> dict:
    """What one and two edits change, learned and exact, means in reward units.

    `first` and `second`: at the decisive token, the second error's where the first is there already: both are found,
    each in its place. `later`: the size of the change at tokens after the edited slot that decide something (what
    stands before an edit cannot change).
    """
    world, tokenizer = World(run_.tokenizer), run_.tokenizer
    found = (edited(world, post_of(row), tokenizer.encode_response(row["chosen"])) for row in rows)
    edits = [edit for edit in found if edit]
    groups = [Group(tokenizer.encode(edit.post.prompt), edit.versions) for edit in edits]
    changes: dict[str, list[float]] = {"first": [], "second": [], "later": []}
    exact: dict[str, list[float]] = {name: [] for name in changes}
    for edit, line in zip(edits, credits(run_, groups, [edit.post for edit in edits]), strict=True):
        automaton = world.automata[edit.post.scenario]
        places = [slots(world, edit.post, version) for version in edit.versions]
        decides = [[automaton.kind[state] != "forced" for state in automaton.walk(v)[0]] for v in edit.versions]
        for kept, of in ((changes, [c.rewards for c in line]), (exact, [c.exact for c in line])):
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


def example(run_: Run, rows: list[dict]) -> tuple[str, dict[str, Credit]]:
    """The paper's example, a job whose salary and then position is wrong, or else any post with two facts.

    Its prompt, and by name the credit of the summary made right, with one and with two errors.
    """
    world = World(run_.tokenizer)
    posts = [(row, post) for row in rows if "chosen" in row and (post := post_of(row))]
    for facts in (("offered", "role"), ()):
        for row, post in posts:
            edit = edited(world, post, run_.tokenizer.encode_response(row["chosen"]), facts)
            if edit:
                group = Group(run_.tokenizer.encode(post.prompt), edit.versions)
                first, second = edit.facts
                names = ("right", f"wrong: {first}", f"wrong: {first}, {second}")
                return post.prompt, dict(zip(names, credits(run_, [group], [post])[0], strict=True))
    raise UserError(f"{run_.path} holds no pair of the TL;DR world; give --prompt and --response")


def shade(reward: float) -> tuple[int, int, int]:
    """White for 0; blue for what is paid and orange for what is charged, as deep as much."""
    depth = 1 - math.exp(-2 * abs(reward))
    return tuple(round(255 + (c - 255) * depth) for c in (PAID if reward > 0 else CHARGED))


def coloured(tokens: list[str], rewards: list[float]) -> Text:
    text = Text()
    for token, reward in zip(tokens, rewards, strict=True):
        text.append(token.replace("\n", "↵\n"), style=f"black on rgb({','.join(map(str, shade(reward)))})")
    return text


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>credit assignment</title><style>
body {{ font: 15px/1.6 system-ui, sans-serif; margin: 2em auto; max-width: 62em; color: #1a1a1a; background: #fff; }}
.post {{ color: #555; }}
.line {{ font: 15px/2.1 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap; }}
.line span {{ padding: .15em 0; border-radius: 3px; cursor: default; }}
.line span:hover {{ outline: 2px solid #1a1a1a; }}
h2 {{ font-size: 1em; margin: 1.4em 0 .2em; }}
.of {{ color: #555; font-size: .9em; margin: 0; }}
</style></head><body>
<h1>Which tokens DPO paid for</h1>
<p class="post">{prompt}</p>
<p>Blue is paid, orange is charged, deeper for more. Hold the pointer over a token for its figures.</p>
{parts}
</body></html>
"""


def page(prompt: str, versions: dict[str, Credit]) -> str:
    """One self-contained HTML page."""

    def line(credit: Credit, rewards: list[float]) -> str:
        out = []
        for i, (token, reward) in enumerate(zip(credit.tokens, rewards, strict=True)):
            figures = [f"reward {credit.rewards[i]:+.3f}", f"log pi {credit.logps[i]:.3f}"]
            figures += [f"log pi_ref {credit.ref_logps[i]:.3f}"]
            figures += [f"exact A* {credit.exact[i]:+.3f}"] if credit.exact else []
            title = escape(f"{token!r}: " + ", ".join(figures), quote=True)
            ground = ",".join(map(str, shade(reward)))
            out.append(f'<span style="background:rgb({ground})" title="{title}">{escape(token)}</span>')
        return f'<div class="line">{"".join(out)}</div>'

    parts = []
    for name, credit in versions.items():
        parts += [f"<h2>{escape(name)}</h2>", '<p class="of">learned: beta log(pi/pi_ref)</p>']
        parts.append(line(credit, credit.rewards))
        if credit.exact:
            parts += ['<p class="of">exact: A*</p>', line(credit, credit.exact)]
    return PAGE.format(prompt=escape(prompt), parts="\n".join(parts))


def show(prompt: str, versions: dict[str, Credit], console: Console):
    console.print(Text(prompt, style="dim"))
    console.print(Text("blue: paid, orange: charged (reward units)\n", style="dim"))
    for name, credit in versions.items():
        console.print(Text(name, style="bold"))
        console.print(coloured(credit.tokens, credit.rewards))
        if credit.exact:
            console.print(Text.assemble(("exact A*: ", "dim"), coloured(credit.tokens, credit.exact)))
        dear = sorted(range(len(credit.tokens)), key=lambda i: -abs(credit.rewards[i]))[:4]
        beside = [f" (A* {credit.exact[i]:+.2f})" if credit.exact else "" for i in dear]
        words = [f"{credit.tokens[i].strip() or repr(credit.tokens[i])} {credit.rewards[i]:+.2f}" for i in dear]
        console.print(Text("  ".join(map("".join, zip(words, beside, strict=True))) + "\n", style="dim"))


@dataclass(frozen=True)
class Options:
    """Show which tokens of a response DPO paid for."""

    run: Path = Path("runs/dpo")
    """A DPO run."""
    prompt: str | None = None
    """With --response: what to show. Default: a held-out post, its summary with no, one and two wrong facts."""
    response: str | None = None
    """The response to the prompt."""
    html: Path | None = None
    """Write a self-contained page, too."""
    png: Path | None = None
    """Write a picture, too; needs matplotlib (the extra `figures`)."""
    json: bool = False
    """Print one JSON object instead: every token's figures, and those over the run's held-out pairs."""

    def __post_init__(self):
        require((self.prompt is None) == (self.response is None), "--prompt and --response go together")
        require(all(is_text(t) for t in (self.prompt, self.response) if t), "the text is not UTF-8")
        require(self.png is None or self.png.suffix == ".png", f"--png writes a .png file, not {self.png}")


def of_the_run(run_: Run) -> tuple[str, dict[str, Credit], dict]:
    """A held-out post's prompt, its summary right and wrong, and the figures over all held-out pairs of the world."""
    file = run_.path / "held_out.jsonl"
    rows = read_jsonl(file) if file.exists() and file.stat().st_size else []
    _, skipped = tokenize(rows, run_.tokenizer, run_.model.config.block_size)
    require(not skipped, f"{file}: {skipped.total()} rows do not fit the run; give --prompt and --response")
    prompt, versions = example(run_, rows)
    world = World(run_.tokenizer).wrote(rows)
    return prompt, versions, decisive_figures(run_, rows) | stitching_figures(run_, rows) if world else {}


def of_one(run_: Run, prompt: str, response: str) -> tuple[str, dict[str, Credit], dict]:
    """The credit of one response to a prompt."""
    group = Group(run_.tokenizer.encode(prompt), (run_.tokenizer.encode_response(response),))
    require(bool(group.prompt), "the prompt is empty")
    length, most = group.length, run_.model.config.block_size
    require(length <= most, f"prompt and response have {length} tokens; the run's context {most}")
    return prompt, {"response": credits(run_, [group], [read_post(prompt)])[0][0]}, {}


def main(options: Options):
    if options.png:
        needs("matplotlib", "figures", "a picture")
    for path in filter(None, (options.html, options.png)):
        require(path.parent.is_dir(), f"cannot write {path}: there is no folder {path.parent}")
    run_ = load_run(options.run, torch.device("cpu"))
    require(run_.reference is not None, f"{options.run} is an SFT run: it has no implicit rewards; give a DPO run")
    own = options.prompt is not None
    prompt, versions, figures = of_one(run_, options.prompt, options.response) if own else of_the_run(run_)
    if options.html:
        replace_file(options.html, lambda aside: aside.write_text(page(prompt, versions), encoding="utf-8"))
    of = {name: credit._asdict() for name, credit in versions.items()}
    if options.png:
        from minqstar.lab.plots import credit_picture

        credit_picture(of, options.png)
    if options.json:
        print(json.dumps({"prompt": prompt, "versions": of, "held_out": figures}, allow_nan=False))
        return
    console = Console(highlight=False, markup=False)
    show(prompt, versions, console)
    if figures:
        number = {name: "none" if value is None else f"{value:.3f}" for name, value in figures.items()}
        console.print(
            f"{figures['edited_posts']} held-out summaries edited: an error changes its own token's reward by "
            f"{number['first_change']} (A* {number['first_change_exact']}), a second one's by "
            f"{number['second_change']} ({number['second_change_exact']}), later choices by "
            f"{number['later_change']} ({number['later_change_exact']})\n"
            f"all held-out tokens: correlation to A* {number['correlation']}, r2 {number['r2']}; AUROC of decisive "
            f"tokens {number['auroc']} (A* {number['auroc_exact']}, log pi_ref alone {number['auroc_reference']})"
        )


if __name__ == "__main__":
    run(main, Options, prog="python -m minqstar.lab.credit")
