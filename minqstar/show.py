"""How token values look: colours in the terminal and in a page, and the token table, which is Eq. 10 in one look."""

import math
from collections.abc import Sequence
from html import escape

from rich.table import Table
from rich.text import Text
from torch import Tensor

from minqstar.errors import visible
from minqstar.world.tldr import Exact

PAID, CHARGED = (30, 100, 220), (225, 110, 0)  # blue and orange: colour-blind readers tell them apart, too
SAID = 0.05  # reward units: without colour a smaller reward is not written


def shade(reward: float) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255: white for 0, blue for a reward that is paid, orange for one that is charged."""
    depth = 1 - math.exp(-2 * abs(reward))
    return tuple(round(255 + (c - 255) * depth) for c in (PAID if reward > 0 else CHARGED))


def coloured(tokens: Sequence[str], rewards: Sequence[float], colour: bool = True) -> Text:
    """Each token on the shade of its reward; without colour each reward of SAID or more behind its token."""
    text = Text()
    for token, reward in zip(tokens, rewards, strict=True):
        token = visible(token).replace("␊", "↵\n")
        if colour:
            text.append(token, style=f"#000000 on rgb({','.join(map(str, shade(reward)))})")
        else:
            text.append(token + (f"[{reward:+.2f}]" if abs(reward) >= SAID else ""))
    return text


def legend(colour: bool = True) -> Text:
    words = "blue: paid, orange: charged" if colour else f"[+0.31]: what the token before it is paid, from {SAID} on"
    return Text(f"{words} (reward units)", style="dim")


def html_tokens(tokens: Sequence[str], rewards: Sequence[float], titles: Sequence[str]) -> str:
    """Spans of HTML, each token on the shade of its reward, with a title that a pointer shows."""
    return "".join(
        f'<span style="color:#000;background:rgb({",".join(map(str, shade(reward)))})" '
        f'title="{escape(title, quote=True)}">{escape(token)}</span>'
        for token, reward, title in zip(tokens, rewards, titles, strict=True)
    )


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
    table.add_column("token", footer="sum")
    if exact is not None:
        R, V, A = (float(t) for t in (exact.reward.sum(), exact.value[0], exact.advantage.sum()))
        table.caption = f"sum of r {R:+.2f} = V(s_0) {V:+.2f} + sum of A* {A:+.2f}"
    for name, values in columns.items():
        summed = "" if name.startswith("V(") else f"{sum(values):+.2f}"
        table.add_column(name, footer=summed, justify="right", no_wrap=True)
    for token, *line in zip(tokens, *columns.values(), strict=True):
        ground = f"#000000 on rgb({','.join(map(str, shade(line[-1])))})" if colour else ""
        cells = [Text(f"{0.0 if abs(value) < 0.005 else value:.2f}") for value in line[:-1]]
        table.add_row(Text(visible(token)), *cells, Text(f"{line[-1]:+.2f}", style=ground))
    return table
