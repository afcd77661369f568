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

from minqstar.automaton import FactValue, Post
from minqstar.bellman import gap_figures
from minqstar.checkpoint import Run, load_run
from minqstar.cli import is_text, needs, require, run
from minqstar.data import Group, read_jsonl
from minqstar.qfunction import implicit_reward
from minqstar.scoring import score_groups
from minqstar.tldr import World, post_of, read_post

PAID, CHARGED = (30, 100, 220), (225, 110, 0)  # blue and orange: told apart by everybody


class Slot(NamedTuple):
    """A fact's place in a summary: tokens start..stop, and the first token there that rules out the right value."""

    fact: str
    start: int
    stop: int
    decisive: int | None  # None where the value is right


class Credit(NamedTuple):
    """A response token by token: its texts, rewards (reward units) and log-probs (nats); A* where it is known."""

    tokens: list[str]
    rewards: list[float]
    logps: list[float]
    ref_logps: list[float]
    exact: list[float] | None


def slots(world: World, post: Post, tokens: list[int]) -> list[Slot]:
    """The facts of a summary of the grammar, in their order."""
    automaton, found = world.automata[post.scenario], []
    for i, (state, action) in enumerate(zip(*automaton.walk(tokens), strict=True)):
        option = automaton.options[automaton.pays[state, action]]
        if isinstance(option, FactValue):
            spelled = world.tokenizer.encode(option.value)
            spaced = world.tokenizer.encode(" " + option.value)
            space = " " * (tokens[i + 1 - len(spaced) : i + 1] == spaced)
            start = i + 1 - len(spaced if space else spelled)
            right = world.tokenizer.encode(space + post.facts[option.fact])
            pairs = enumerate(zip(tokens[start : i + 1], right, strict=False))
            wrong = option.value != post.facts[option.fact]
            found.append(
                Slot(option.fact, start, i + 1, next(start + j for j, (a, b) in pairs if a != b) if wrong else None)
            )
    return found


def with_facts(world: World, post: Post, tokens: list[int], facts: dict[str, str]) -> list[int]:
    """The same summary with other values in the slots of some facts."""
    out = list(tokens)
    for slot in reversed(slots(world, post, tokens)):
        if slot.fact in facts:
            space = " " * world.tokenizer.decode(tokens[slot.start : slot.stop]).startswith(" ")
            out[slot.start : slot.stop] = world.tokenizer.encode(space + facts[slot.fact])
    return out


def wrong_value(post: Post, world: World, fact: str) -> str:
    """A value of the fact's kind that the post nowhere states."""
    values = world.automata[post.scenario].scenario.facts[fact]
    far = values.index(post.facts[fact]) + len(values) // 2
    others = [values[(far + i) % len(values)] for i in range(len(values))]
    return next(value for value in others if value not in post.facts.values())


def credits(run_: Run, groups: list[Group], posts: Sequence[Post | None]) -> list[list[Credit]]:
    """For each group its responses' credit; A* for those of a post whose responses stay in the grammar."""
    world = World(run_.tokenizer)
    policy, reference = (score_groups(model, groups, run_.tokenizer.pad) for model in (run_.model, run_.reference))
    answers = []
    for group, post, *both in zip(groups, posts, policy, reference, strict=True):
        line = []
        for response, logps, ref_logps in zip(group.responses, *both, strict=True):
            known = post is not None and len(world.automata[post.scenario].walk(response)[0]) == len(response)
            exact = world.exact_rewards([post], [response], run_.beta)[0][0] if known else None
            texts = [run_.tokenizer.text_of(token) for token in response]
            rewards = implicit_reward(logps, ref_logps, run_.beta)
            line.append(Credit(texts, *(t.tolist() for t in (rewards, logps, ref_logps)), exact))
        answers.append(line)
    return answers


def auroc(low: np.ndarray, others: np.ndarray) -> float:
    """The chance that one of `low` is below one of `others`, ties counted half."""
    _, inverse, counts = np.unique(np.concatenate((low, others)), return_inverse=True, return_counts=True)
    rank = (counts.cumsum() - (counts - 1) / 2)[inverse]  # mean rank among equals, from 1
    above = rank[len(low) :].sum() - len(others) * (len(others) + 1) / 2
    return float(above / (len(low) * len(others)))


def decisive_figures(run_: Run, rows: list[dict]) -> dict:
    """How well rewards tell the decisive tokens of wrong facts from all other fact tokens, on held-out pairs."""
    world, tokenizer = World(run_.tokenizer), run_.tokenizer
    posts = [post_of(row) for row in rows]
    encode = tokenizer.encode_response
    groups = [Group(tokenizer.encode(row["prompt"]), (encode(row["chosen"]), encode(row["rejected"]))) for row in rows]
    decisive, learned, exact, in_slot = [], [], [], []
    for post, group, line in zip(posts, groups, credits(run_, groups, posts), strict=True):
        for response, credit in zip(group.responses, line, strict=True):
            found = slots(world, post, response)
            ends = {slot.decisive for slot in found}
            inside = {i for slot in found for i in range(slot.start, slot.stop)}
            decisive += [i in ends for i in range(len(response))]
            in_slot += [i in inside for i in range(len(response))]
            learned += credit.rewards
            exact += credit.exact
    d, inside, learned, exact = (np.array(values) for values in (decisive, in_slot, learned, exact))
    others = inside & ~d
    return {
        "auroc": auroc(learned[d], learned[others]),
        "auroc_exact": auroc(exact[d], exact[others]),
        "decisive_tokens": int(d.sum()),
        "other_fact_tokens": int(others.sum()),
        **gap_figures(learned, exact),
    }


class Edited(NamedTuple):
    """A post's summary with all facts right, and with the first one and two of `facts` wrong."""

    post: Post
    facts: tuple[str, str]
    versions: tuple[list[int], list[int], list[int]]


def edited(world: World, post: Post, summary: list[int], facts: Sequence[str] = ()) -> Edited | None:
    """The summary made right, then wrong in two facts (the first two that it states, or those given).

    None if it does not state them.
    """
    stated = list(dict.fromkeys(slot.fact for slot in slots(world, post, summary)))
    chosen = tuple(facts or stated[:2])
    if len(chosen) < 2 or not set(chosen) <= set(stated):
        return None
    right = with_facts(world, post, summary, post.facts)
    wrong = {fact: wrong_value(post, world, fact) for fact in chosen}
    one = with_facts(world, post, right, {chosen[0]: wrong[chosen[0]]})
    return Edited(post, chosen, (right, one, with_facts(world, post, right, wrong)))


def stitching_figures(run_: Run, rows: list[dict]) -> dict:
    """What one and two edits change, learned and exact: at the decisive token, and the mean elsewhere, reward units.

    `second` is the second error's change where the first is there already: both are found, each in its place.
    """
    world, tokenizer = World(run_.tokenizer), run_.tokenizer
    found = (edited(world, post_of(row), tokenizer.encode_response(row["chosen"])) for row in rows)
    edits = [edit for edit in found if edit]
    groups = [Group(tokenizer.encode(edit.post.prompt), edit.versions) for edit in edits]
    changes: dict[str, list[float]] = {"first": [], "second": [], "elsewhere": []}
    exact: dict[str, list[float]] = {name: [] for name in changes}
    for edit, line in zip(edits, credits(run_, groups, [edit.post for edit in edits]), strict=True):
        places = [slots(world, edit.post, version) for version in edit.versions]
        for kept, of in ((changes, [c.rewards for c in line]), (exact, [c.exact for c in line])):
            for name, fact, before, after in (("first", edit.facts[0], 0, 1), ("second", edit.facts[1], 1, 2)):
                old, new = (next(s for s in places[v] if s.fact == fact) for v in (before, after))
                at = new.decisive - new.start
                kept[name].append(of[after][new.start + at] - of[before][min(old.start + at, old.stop - 1)])
                rest = [
                    [reward for i, reward in enumerate(of[v]) if not slot.start <= i < slot.stop]
                    for v, slot in ((before, old), (after, new))
                ]
                kept["elsewhere"].append(float(np.abs(np.subtract(*rest)).mean()))
    return {
        "edited_posts": len(edits),
        **{f"{name}_change": float(np.mean(values)) for name, values in changes.items()},
        **{f"{name}_change_exact": float(np.mean(values)) for name, values in exact.items()},
    }


def example(run_: Run, rows: list[dict]) -> Edited:
    """The paper's example, a job whose salary and then position is wrong, or else any post with two facts."""
    world = World(run_.tokenizer)
    for facts in (("offered", "role"), ()):
        for row in rows:
            post = post_of(row)
            if (
                post
                and "chosen" in row
                and (found := edited(world, post, run_.tokenizer.encode_response(row["chosen"]), facts))
            ):
                return found
    require(False, f"{run_.path} holds no pair of the TL;DR world; give --prompt and --response")


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
.line span {{ display: inline-block; padding: 0; line-height: 1.5; border-radius: 3px; cursor: default; }}
.line span:hover {{ outline: 2px solid #1a1a1a; }}
h2 {{ font-size: 1em; margin: 1.4em 0 .2em; }}
.of {{ color: #555; font-size: .9em; margin: 0; }}
</style></head><body>
<h1>Which tokens DPO paid for</h1>
<p class="post">{prompt}</p>
<p>Blue is paid, orange is charged, as deep as the reward. Hold the pointer over a token for its figures.</p>
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


def main(options: Options):
    if options.png:
        needs("matplotlib", "figures", "a picture")
    run_ = load_run(options.run, torch.device("cpu"))
    require(run_.reference is not None, f"{options.run} is an SFT run: it has no implicit rewards; give a DPO run")
    tokenizer, held_out = run_.tokenizer, options.run / "held_out.jsonl"
    rows = read_jsonl(held_out) if held_out.exists() and held_out.stat().st_size else []
    figures = {}
    if options.prompt is None:
        edit = example(run_, rows)
        prompt, post = edit.post.prompt, edit.post
        first, second = edit.facts
        names = ("right", f"wrong: {first}", f"wrong: {first}, {second}")
        responses = edit.versions
        if World(tokenizer).wrote(rows):
            figures = decisive_figures(run_, rows) | stitching_figures(run_, rows)
    else:
        prompt, post = options.prompt, read_post(options.prompt)
        names, responses = ("response",), (tokenizer.encode_response(options.response),)
    ids = tokenizer.encode(prompt)
    require(bool(ids), "the prompt is empty")
    longest = max(map(len, responses))
    fits = len(ids) + longest <= run_.model.config.block_size
    require(
        fits, f"prompt and response have {len(ids) + longest} tokens; the run's context {run_.model.config.block_size}"
    )
    (line,) = credits(run_, [Group(ids, tuple(responses))], [post])
    versions = dict(zip(names, line, strict=True))
    if options.html:
        options.html.write_text(page(prompt, versions), encoding="utf-8")
    if options.png:
        from minqstar.lab.plots import credit_picture

        credit_picture({name: credit._asdict() for name, credit in versions.items()}, options.png)
    if options.json:
        of = {name: credit._asdict() for name, credit in versions.items()}
        print(json.dumps({"prompt": prompt, "versions": of, "held_out": figures}, allow_nan=False))
        return
    console = Console(highlight=False, markup=False)
    show(prompt, versions, console)
    if figures:
        console.print(
            f"on {len(rows)} held-out pairs: AUROC of decisive tokens {figures['auroc']:.4f} "
            f"(exact A* {figures['auroc_exact']:.4f}), correlation to A* {figures['correlation']:.3f}\n"
            f"an error changes its own token's reward by {figures['first_change']:+.2f}, a second one's by "
            f"{figures['second_change']:+.2f}, all others by {figures['elsewhere_change']:.3f} on average"
        )


if __name__ == "__main__":
    run(main, Options, prog="python -m minqstar.lab.credit")
