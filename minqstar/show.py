"""How token values look, in the terminal and in a page: colours, and the token table, which is Eq. 10 in one look.

Text is shown character by character. Where several tokens make one character (Chinese, emoji), coloured text shows
them together with the sum of their values, for a return is a sum; the token table has a line for each.
"""

import itertools
import math
import shlex
import sys
from collections.abc import Container, Sequence
from html import escape
from pathlib import Path

from rich.table import Table
from rich.text import Text
from torch import Tensor

from minqstar.console import Console
from minqstar.errors import visible
from minqstar.lm.tokenizer import Span, Tokens
from minqstar.training.groups import Group
from minqstar.world.tldr import Exact

# Blue and orange: colour-blind readers tell them apart, and black and white text are both readable on them.
PAID, CHARGED = (40, 112, 230), (200, 82, 0)
Values = Sequence[float] | Tensor  # one a token
SAID = 0.05  # reward units: without colour a smaller reward is not written
SCALE = (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0)  # the values of a legend


def depth(value: float) -> float:
    """How deep the colour of a value is: 0 for 0, towards 1 for large ones."""
    return 1 - math.exp(-2 * abs(value))


def shade(value: float) -> str:
    """A colour #rrggbb: white for 0, blue for a reward that is paid, orange for one that is charged."""
    hue = PAID if value > 0 else CHARGED
    return "#{:02x}{:02x}{:02x}".format(*(round(255 + (c - 255) * depth(value)) for c in hue))


def ground(value: float) -> str:
    """The same colour in CSS, laid over a page of any colour."""
    return "rgb({} {} {} / {:.2f})".format(*(PAID if value > 0 else CHARGED), depth(value))


def summed(spans: Sequence[Span], values: Values) -> list[float]:
    """The sum of token values over each span."""
    return [float(sum(values[span.start : span.stop])) for span in spans]


def coloured(spans: Sequence[Span], rewards: Values, colour: bool = True, marked: Container[int] = ()) -> Text:
    """Text on the shades of its rewards, marked tokens underlined.

    Without colour each reward of SAID or more stands behind its text.
    """
    text = Text()
    for span, reward in zip(spans, summed(spans, rewards), strict=True):
        shown = several_lines(span.text)
        if colour:
            text.append(shown, style=f"#000000 on {shade(reward)}" + " underline" * (span.start in marked))
        else:
            text.append(shown + (f"[{reward:+.2f}]" if abs(reward) >= SAID else ""))
    return text


def prompt_text(tokenizer: Tokens, row: dict) -> str:
    """A row's prompt as text; a conversation as its model sees it, special tokens too. Plain text has none."""
    prompt = row.get("prompt", "")
    return prompt if isinstance(prompt, str) else "".join(tokenizer.texts_of(tokenizer.encode_prompt(prompt)))


def several_lines(text: str) -> str:
    """A text that shows its line ends, and ends its lines there."""
    return visible(text.replace("\n", "↵\n"), keep="\n")


def numbers(values: Sequence[float]) -> list[Span]:
    """Values as text, to be coloured by themselves."""
    return [Span(i, i + 1, f" {value:+g} " if value else " 0 ") for i, value in enumerate(values)]


def show_mask(console: Console, tokenizer: Tokens, group: Group):
    """A group's prompt and its first ranking, pair or response as they are trained.

    What is coloured is scored, all else is only seen. Without colour what is scored stands in ⟦ ⟧.
    """
    colour = console.color_system is not None
    console.print(
        Text("the prompt, which is seen: ", style="bold") + Text(clipped(tokenizer, group.prompt), style="dim")
    )
    size = group.rankings[0]
    names = {1: ["response"], 2: ["chosen", "rejected"]}
    for place, name in enumerate(names.get(size, [f"ranked {i}" for i in range(1, size + 1)])):
        line, ids = Text(f"{name}, scored: ", style="bold"), group.responses[place]
        others = set(group.given[place]) if group.given else set()
        for given, of in itertools.groupby(range(len(ids)), others.__contains__):
            part = clipped(tokenizer, [ids[i] for i in of])
            line.append(part if given or colour else f"⟦{part}⟧", style="dim" if given else f"#000000 on {shade(1)}")
        console.print(line)


def clipped(tokenizer: Tokens, ids: Sequence[int], most: int = 300) -> str:
    """The text of some tokens, special ones too; of a long one its beginning and its end."""
    text = several_lines("".join(tokenizer.texts_of(ids)))
    return text if len(text) <= most else f"{text[: most // 2]} […] {text[-most // 2 :]}"


def legend(colour: bool = True) -> Text:
    if not colour:
        return Text(f"[+0.31]: what the text before it is paid, from {SAID} on (reward units)", style="dim")
    return Text.assemble(coloured(numbers(SCALE), SCALE), (" reward units, blue paid, orange charged", "dim"))


def html_tokens(
    spans: Sequence[Span],
    values: Values,
    titles: Sequence[str],
    exact: Values | None = None,
    marked: Container[int] = (),
) -> list[str]:
    """For each span one element of HTML: its text on the shade of its value, above a strip in that of the exact one.

    The titles, one a span, appear at a pointer; in a page of the lab at a tap and with the tab key, too.
    """
    strips = [""] * len(spans)
    if exact is not None:
        strips = [f";border-bottom:.4em solid {ground(value)}" for value in summed(spans, exact)]
    elements = []
    for span, value, title, strip in zip(spans, summed(spans, values), titles, strips, strict=True):
        text = escape(several_lines(span.text))
        text = f"{' ' * text.startswith(' ')}<u>{text.lstrip(' ')}</u>" if span.start in marked else text
        style = f'style="background-color:{ground(value)}{strip}"'
        elements.append(f'<span tabindex="0" {style} title="{escape(title)}">{text}</span>')
    return elements


def token_table(tokens: Sequence[str], rewards: Tensor, exact: Exact | None, colour: bool = True) -> Table:
    """A response token by token; all values in reward units.

    Where the world knows the optimum: r(s,a), V*(s), V*(s'), their sum r + V*(s') - V*(s), A* = beta log(pi*/pi_ref),
    which equals it (Eq. 10), and the learned reward (L,). Below it the telescoping sum: sum r = V*(s_0) + sum A*.
    Elsewhere the learned reward alone.
    """
    columns = {"learned": rewards.tolist()}
    if exact is not None:
        before, after = exact.value[:-1], exact.value[1:]
        eq_10 = exact.reward + after - before
        named = {"r": exact.reward, "V(s)": before, "V(s')": after, "r+V(s')-V(s)": eq_10, "A*": exact.advantage}
        columns = {name: values.tolist() for name, values in named.items()} | columns
    table = Table(box=None, pad_edge=False, show_footer=True, caption_justify="left")
    table.add_column("token", footer="sum", overflow="fold")
    if exact is not None:
        R, V, A = (float(t) for t in (exact.reward.sum(), exact.value[0], exact.advantage.sum()))
        table.caption = f"sum of r {R:+.2f} = V*(s_0) {V:+.2f} + sum of A* {A:+.2f}"
    for name, values in columns.items():
        summed = "" if name.startswith("V(") else f"{sum(values):+.2f}"
        table.add_column(name, footer=summed, justify="right", no_wrap=True)
    for token, *line in zip(tokens, *columns.values(), strict=True):
        cells = [f"{0.0 if abs(value) < 0.005 else value:.2f}" for value in line[:-1]]
        style = f"#000000 on {shade(line[-1])}" if colour else ""
        table.add_row(Text(visible(token)), *cells, Text(f"{line[-1]:+.2f}", style=style))
    return table


def next_commands(stage: str, out: Path) -> str:
    """What to type after training, as it was typed for training."""
    sample = "python sample.py" if Path(sys.argv[0]).name == "train.py" else "minqstar-sample"
    run = shlex.quote(str(out))
    there = "" if out == Path("runs/dpo") else f" --run {run}"
    after = {"dpo": f"python -m minqstar.bellman {run}", "sft": "train again with --stage dpo in place of --stage sft"}
    return f"{sample}{there}\n      {after[stage]}"


def figures_in_words(figures: dict) -> str:
    """What one asks first of a DPO run: why the likelihood of chosen answers moved, and how long answers are."""
    moved, expected = figures["chosen_reward"], figures["chosen_expected_reward"]
    eos = "{chosen_eos_reward:+.3f} in chosen answers, {rejected_eos_reward:+.3f} in rejected ones".format(**figures)
    went = f"{'fell' if moved < 0 else 'rose'} by {abs(moved):.3f}"
    return (
        f"returns of chosen answers {went}; of draws of the reference they would\n"
        f"be {expected:+.3f}, -beta KL(pi_ref||pi) along them (Eq. 16)\n"
        f"EOS earns {eos}\n"
        f"draws have {figures['mean_length']:.0f} tokens"
    )


def figures_table(figures: dict) -> Table:
    """The closing figures; where the oracle speaks, the reference's and the optimum's beside the policy's."""
    beside = {"reference": "ref_", "policy": "", "optimum": "optimal_"}
    shown = {title: start for title, start in beside.items() if any(name.startswith(start) for name in figures)}
    table = Table("held-out figure", *shown)
    for name, value in figures.items():
        if (value is None or isinstance(value, float)) and not name.startswith(("ref_", "optimal_")):
            cells = [figures.get(start + name, "") for start in shown.values()]
            table.add_row(
                name,
                *(f"{cell:.4f}" if isinstance(cell, float) else "none" if cell is None else cell for cell in cells),
            )
    return table
