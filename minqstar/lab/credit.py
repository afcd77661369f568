"""Credit assignment: which tokens of a summary DPO pays for, beside the exact A* where the world knows it (Fig. 1).

    python -m minqstar.lab.credit                                # a held-out post; its summary, with one and two errors
    python -m minqstar.lab.credit --prompt "…" --response "…"    # anything else
    python -m minqstar.lab.credit --html credit.html --png credit.png

A token's implicit reward is beta log(pi/pi_ref) (Eq. 10, 11), an advantage: what the token adds to or takes from the
return that its prefix promised. A wrong fact is charged at its *decisive* token, the first at which the right value
is out of reach.
"""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from rich.text import Text
from torch import Tensor

from minqstar.cli import run
from minqstar.console import Console
from minqstar.errors import UserError, is_text, needs, require
from minqstar.evaluate import oracle
from minqstar.score import QFunction, Scored
from minqstar.show import coloured, html_tokens, legend, token_table
from minqstar.theory.qfunction import gap_figures
from minqstar.training.checkpoint import Run, load_run, replace_file
from minqstar.training.data import Group, read_jsonl, tokenize
from minqstar.world.posts import post_of
from minqstar.world.slots import edited, slots
from minqstar.world.tldr import World


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
    for post, group, line in zip(posts, groups, QFunction(run_).score_groups(groups, posts), strict=True):
        for response, credit in zip(group.responses, line, strict=True):
            found = slots(world, post, response)
            ends = {slot.decisive for slot in found}
            inside = {i for slot in found for i in range(slot.start, slot.stop)}
            decisive += [i in ends for i in range(len(response))]
            in_slot += [i in inside for i in range(len(response))]
            learned += credit.rewards.tolist()
            exact += credit.exact.advantage.tolist()
            reference += credit.ref_logps.tolist()
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
    for edit, line in zip(edits, QFunction(run_).score_groups(groups, [edit.post for edit in edits]), strict=True):
        automaton = world.automata[edit.post.scenario]
        places = [slots(world, edit.post, version) for version in edit.versions]
        decides = [[automaton.kind[state] != "forced" for state in automaton.walk(v)[0]] for v in edit.versions]
        for kept, of in (
            (changes, [c.rewards.tolist() for c in line]),
            (exact, [c.exact.advantage.tolist() for c in line]),
        ):
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


def example(run_: Run, rows: list[dict]) -> tuple[str, dict[str, Scored]]:
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
                return post.prompt, dict(zip(names, QFunction(run_).score_groups([group], [post])[0], strict=True))
    raise UserError(f"{run_.path} holds no pair of the TL;DR world; give --prompt and --response")


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


def page(prompt: str, versions: dict[str, Scored]) -> str:
    """One self-contained HTML page."""

    def line(credit: Scored, rewards: Tensor) -> str:
        return f'<div class="line">{html_tokens(credit.tokens, rewards.tolist(), credit.titles)}</div>'

    parts = []
    for name, credit in versions.items():
        parts += [f"<h2>{escape(name)}</h2>", '<p class="of">learned: beta log(pi/pi_ref)</p>']
        parts.append(line(credit, credit.rewards))
        if credit.exact:
            parts += ['<p class="of">exact: A*</p>', line(credit, credit.exact.advantage)]
    return PAGE.format(prompt=escape(prompt), parts="\n".join(parts))


def show(prompt: str, versions: dict[str, Scored], console: Console, table: bool):
    colour = console.color_system is not None
    console.print(Text(prompt, style="dim"))
    console.print(legend(colour))
    for name, credit in versions.items():
        console.print(Text(f"\n{name}", style="bold"))
        console.print(coloured(credit.tokens, credit.rewards.tolist(), colour))
        if credit.exact:
            exact = coloured(credit.tokens, credit.exact.advantage.tolist(), colour)
            console.print(Text.assemble(("exact A*: ", "dim"), exact))
        if table:
            console.print(token_table(credit.tokens, credit.rewards, credit.exact, colour))


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
    table: bool = False
    """Print each response token by token, too; on a post of the TL;DR world with r, V* and A*."""
    json: bool = False
    """Print one JSON object instead: every token's figures, and those over the run's held-out pairs."""

    def __post_init__(self):
        require((self.prompt is None) == (self.response is None), "--prompt and --response go together")
        require(all(is_text(t) for t in (self.prompt, self.response) if t), "the text is not UTF-8")
        require(self.png is None or self.png.suffix == ".png", f"--png writes a .png file, not {self.png}")


def of_the_run(run_: Run) -> tuple[str, dict[str, Scored], dict]:
    """A held-out post's prompt, its summary right and wrong, and the figures over all held-out pairs of the world."""
    file = run_.path / "held_out.jsonl"
    rows = read_jsonl(file) if file.exists() and file.stat().st_size else []
    _, skipped = tokenize(rows, run_.tokenizer, run_.model.config.block_size)
    require(not skipped, f"{file}: {skipped.total()} rows do not fit the run; give --prompt and --response")
    prompt, versions = example(run_, rows)
    world = oracle(run_, [post_of(row) for row in rows])
    ours = world is not None and world.wrote(rows)
    return prompt, versions, decisive_figures(run_, rows) | stitching_figures(run_, rows) if ours else {}


def plain(credit: Scored) -> dict:
    """A response's figures as JSON: lists of one number a token."""
    figures = {name: getattr(credit, name).tolist() for name in ("rewards", "logps", "ref_logps")}
    return {"tokens": credit.tokens, **figures, "exact": credit.exact and credit.exact.advantage.tolist()}


NEEDS = (("table", "no --json"),)


def main(options: Options):
    if options.png:
        needs("matplotlib", "figures", "a picture")
    for path in filter(None, (options.html, options.png)):
        require(path.parent.is_dir(), f"cannot write {path}: there is no folder {path.parent}")
    run_ = load_run(options.run, torch.device("cpu"))
    require(run_.reference is not None, f"{options.run} is an SFT run: it has no implicit rewards; give a DPO run")
    own = options.prompt is not None
    if own:
        prompt, figures = options.prompt, {}
        versions = {"response": QFunction(run_).score(prompt, options.response)[0]}
    else:
        prompt, versions, figures = of_the_run(run_)
    if options.html:
        replace_file(options.html, lambda aside: aside.write_text(page(prompt, versions), encoding="utf-8"))
    of = {name: plain(credit) for name, credit in versions.items()}
    if options.png:
        from minqstar.lab.plots import credit_picture

        credit_picture(of, options.png)
    if options.json:
        print(json.dumps({"prompt": prompt, "versions": of, "held_out": figures}, allow_nan=False))
        return
    console = Console()
    show(prompt, versions, console, options.table)
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
    run(main, Options, "python -m minqstar.lab.credit", NEEDS)
