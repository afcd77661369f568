"""A search tree as one self-contained HTML page: text runs along the branches, the best response on the top row."""

from html import escape
from typing import NamedTuple

import numpy as np

from minqstar.errors import visible
from minqstar.lm.tokenizer import Tokenizer
from minqstar.search.mcts import Found
from minqstar.search.tree import NONE, Tree

MOST = 2000  # nodes drawn, the most visited ones
CHAR, SMALL, ROW, LEFT, TOP = 7.25, 5.75, 34, 16, 30  # pixels

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>search tree</title><style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 1.5em; color: #1a1a1a; background: #fff; }}
p {{ max-width: 60em; margin: .4em 0; }}
pre {{ white-space: pre-wrap; color: #555; max-width: 100em; }}
svg text {{ font: 12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre; }}
svg text.n {{ font-size: 9.5px; fill: #666; }}
svg text.best {{ font-weight: 700; }}
svg text:hover {{ fill: #b04a00; }}
svg path {{ fill: none; }}
.scroll {{ overflow-x: auto; }}
</style></head><body>
<h2>Search tree</h2>
<p>{outcome}</p>
<p>Text runs from left to right; what branches off hangs below. Under each branch: its visits, its value (whole-path,
reward units) and its prior. The thicker a line, the more visits; the bluer, the higher its value; <b>bold on
orange</b> is the best response; ∎ is EOS. Hold the pointer over a token for its own figures.</p>
<pre>{prompt}</pre>
<div class="scroll"><svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}">
{drawing}
</svg></div></body></html>
"""


class Edge(NamedTuple):
    """One drawn edge of the tree and what hangs on it."""

    text: str
    prior: float
    visits: int
    value: float  # reward units; nan before its first visit
    child: int  # the node behind it, NONE after EOS
    best: bool


def edges_of(tree: Tree, row: int, tokenizer: Tokenizer) -> dict[int, list[Edge]]:
    """The edges drawn below each node: made or visited, the best response's first, then by visits."""
    made = np.flatnonzero(tree.parent[row] != NONE)
    kept = made[np.lexsort((made, -tree.visits[row, made]))][:MOST]  # a parent comes before its children
    on_path = {}
    node, edge = int(tree.best_node[row]), int(tree.best_edge[row])
    while node != NONE:
        on_path[node] = edge
        node, edge = int(tree.parent[row, node]), int(tree.action[row, node])
    drawn = {}
    for node in (0, *kept.tolist()):
        edges = []
        for a in np.flatnonzero((tree.child[row, node] != NONE) | (tree.edge_visits[row, node] > 0)).tolist():
            child, visits = int(tree.child[row, node, a]), int(tree.edge_visits[row, node, a])
            text = tokenizer.text_of(int(tree.token[row, node, a])) if child != NONE else "∎"
            value = float(tree.edge_value[row, node, a]) if visits else float("nan")
            best = on_path.get(node) == a
            edges.append(Edge(text, float(tree.prior[row, node, a]), visits, value, child, best))
        drawn[node] = sorted(edges, key=lambda e: (not e.best, -e.visits))
    return drawn


def draw(drawn: dict[int, list[Edge]]) -> tuple[list[str], float, float]:
    """SVG elements, width and height. Runs of tokens without a branch share a line; each further branch has its own."""
    values = [e.value for edges in drawn.values() for e in edges if e.visits]
    low, high = min(values, default=0.0), max(values, default=0.0)
    most = max((e.visits for edges in drawn.values() for e in edges), default=1) or 1
    out, width, rows = [], 0.0, 1
    stack = [(e, LEFT, TOP, i == 0) for i, e in enumerate(drawn[0])][::-1]
    while stack:
        edge, x, above, straight = stack.pop()
        y = above
        if not straight:
            y, rows = TOP + rows * ROW, rows + 1
        shade = (edge.value - low) / (high - low) if edge.visits and high > low else 0.0
        colour = (
            "#d55e00" if edge.best else "rgb({:.0f},{:.0f},{:.0f})".format(*(200 - shade * np.array((200, 86, 22))))
        )
        thick = 1 + 4 * np.log1p(edge.visits) / np.log1p(most)
        value = f"{edge.value:.2f}" if edge.visits else "–"
        figures = f"{edge.visits} · {value} · {edge.prior:.2g}"
        out.append(f'<text class="n" x="{x + 2:.1f}" y="{y + 15}">{figures}</text>')
        start = x
        while True:
            text = visible(edge.text)
            of_token = f"{text!r}: {edge.visits} visits, value {edge.value:.4f}, prior {edge.prior:.4g}"
            mark = ' class="best"' if edge.best else ""
            out.append(f'<text{mark} x="{x:.1f}" y="{y - 4}">{escape(text)}<title>{escape(of_token)}</title></text>')
            x += CHAR * len(text)
            below = drawn.get(edge.child, [])
            if len(below) != 1:
                break
            edge = below[0]
        x = max(x, start + SMALL * (len(figures) + 2))
        path = f"M{start:.1f},{above}V{y}H{x:.1f}"
        out.append(f'<path d="{path}" stroke="{colour}" stroke-width="{thick:.1f}"/>')
        width = max(width, x)
        stack += [(e, x, y, i == 0) for i, e in enumerate(below)][::-1]
    return out, width + 2 * LEFT, TOP + rows * ROW


def tree_page(tree: Tree, row: int, tokenizer: Tokenizer, prompt: str, found: Found) -> str:
    """The page of one tree of a search, and of what it found."""
    drawing, width, height = draw(edges_of(tree, row, tokenizer))
    verdict = "proved to be the best of all" if found.proved else "not proved to be the best"
    hidden = f", of which the {MOST:,} most visited are drawn" if found.nodes > MOST else ""
    outcome = (
        f"{found.simulations:,} simulations, {found.nodes:,} nodes{hidden}. The best response, {verdict}, has "
        f"log-probability {found.response.score:.3f} nats."
    )
    return PAGE.format(outcome=outcome, prompt=escape(prompt), width=width, height=height, drawing="\n".join(drawing))
