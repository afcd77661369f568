"""A search tree as one self-contained HTML page: each line of text, and below it the lines that branch off.

What is compared is one number for the path from the prompt: its log-probability in nats or, where the search is for
reward, the sum of its token rewards. A line's tokens are coloured by what each of them adds to that number.
"""

from types import SimpleNamespace

import numpy as np

from minqstar.lm.tokenizer import Tokenizer
from minqstar.page import html_page
from minqstar.search.mcts import TIE, Found
from minqstar.search.tree import NONE, Tree
from minqstar.show import SCALE, html_tokens

MOST = 2000  # nodes drawn, the most visited ones
NATS = (0.0, -0.1, -0.2, -0.5, -1.0, -2.0)  # of the legend


class Drawing:
    """One tree of a search as nested lists.

    A line follows from each node the edge of the best response, or else the most visited one, so that what branches
    off has at most half of the visits: lists are nested no deeper than the logarithm of these.
    """

    def __init__(self, tree: Tree, row: int, tokenizer: Tokenizer, found: Found):
        self.tokenizer, self.by_likelihood = tokenizer, found.by_likelihood
        self.tree = t = SimpleNamespace(**{name: of[row] for name, of in vars(tree).items() if np.ndim(of)})
        made = np.flatnonzero(t.parent != NONE)
        kept = made[np.lexsort((made, -t.visits[made]))][:MOST]  # a parent comes before its children
        self.drawn = {NONE, 0, *kept.tolist()}
        path, self.step = (t.score, t.logp) if found.by_likelihood else (t.reward, t.step)
        self.total = path[:, None] + self.step  # (N, A) of the path from the prompt over an edge
        self.taken = (t.child != NONE) | (t.edge_visits > 0)  # of EOS edges these are the finished ones
        self.untried = ~self.taken & ~t.closed & np.isfinite(t.logp)
        self.best, node, edge = {}, int(t.best_node), int(t.best_edge)  # node -> edge along the best response
        while node != NONE:
            self.best[node] = edge
            node, edge = int(t.parent[node]), int(t.action[node])

    def edges(self, node: int) -> list[int]:
        """A node's edges that are drawn: the best response's first, then by visits."""
        if node == NONE:
            return []
        taken = [a for a in np.flatnonzero(self.taken[node]).tolist() if self.tree.child[node, a] in self.drawn]
        return sorted(taken, key=lambda a: (self.best.get(node) != a, -self.tree.edge_visits[node, a]))

    def line(self, node: int, edge: int) -> str:
        """The line that begins with an edge, and those that branch off from it."""
        t, steps, branches = self.tree, [(node, edge)], []
        marks = [""]  # before each token: the numbers of the lines that branch off there
        while below := self.edges(child := int(t.child[steps[-1]])):
            steps.append((child, below[0]))
            more = range(len(branches) + 1, len(branches) + len(below))
            marks.append(f"<sup>{' '.join(map(str, more))}</sup>" if more else "")
            branches += [(child, a) for a in below[1:]]
        spans = self.tokenizer.spans([int(t.token[step]) for step in steps])
        titles = [f"{span.text!r}: {self.figures(steps[span.stop - 1])}" for span in spans]
        tokens = html_tokens(spans, [self.step[step] for step in steps], titles)
        text = "".join("".join(marks[s.start : s.stop]) + token for s, token in zip(spans, tokens, strict=True))
        kind = "best" if self.best.get(node) == edge else ""
        untried = sum(int(self.untried[node].sum()) for node, _ in steps[1:])
        said = f"<b>{self.total[steps[-1]]:.3f}</b> {self.ending(*steps[-1])} · visits: {t.edge_visits[node, edge]}"
        said += f" · untried branches: {untried}" * bool(untried)
        nested = "".join(self.line(*branch) for branch in branches)
        nested = f"<ol>{nested}</ol>" if nested else ""
        return f'<li class="{kind}"><p class="line" dir="auto">{text}</p> <p class="of">{said}</p>{nested}</li>\n'

    def figures(self, step: tuple[int, int]) -> str:
        """What a pointer or a tap says of an edge."""
        t, unit = self.tree, "nats" if self.by_likelihood else "reward units"
        value = f", value {t.edge_value[step]:.3f} reward units" if t.edge_visits[step] else ""
        so_far = f"log pi {t.logp[step]:.3f}, so far {self.total[step]:.3f} {unit}"
        return f"{so_far}, visits {t.edge_visits[step]}{value}"

    def ending(self, node: int, edge: int) -> str:
        """Why a line ends with an edge."""
        child, best = int(self.tree.child[node, edge]), self.tree.best_goal + TIE
        if child == NONE:
            return "● finished, the best" if self.best.get(node) == edge else "● finished"
        if self.taken[child].any():
            return "… goes on, not drawn"
        if not self.tree.closed[node, edge]:
            return "○ open"
        most = self.total[child].max()  # over the kept tokens, which are the likeliest
        if not self.by_likelihood or most > best:
            return "✕ closed: cannot end within the length limit"
        return f"✕ closed: {most:.3f} at most with one more token" if self.total[node, edge] > best else "✕ closed"


def tree_page(tree: Tree, row: int, tokenizer: Tokenizer, prompt: str, found: Found) -> str:
    """The page of one tree of a search, and of what it found."""
    drawing, left = Drawing(tree, row, tokenizer, found), ""
    lines = "".join(drawing.line(0, edge) for edge in drawing.edges(0))
    hidden = f", of which the {MOST:,} most visited are drawn" if found.nodes > MOST else ""
    if found.by_likelihood:
        kind, number, unit = "likeliest", "log-probability, in nats,", "nats: log pi of a token"
        closed = "with any further token it is at or below the best response"
        bound = max(drawing.total[drawing.untried].max(initial=-np.inf), tree.dropped[row])
        left = "" if found.proved else f" What is open, or was not kept, could still lead to a response of {bound:.3f}."
    else:
        kind, number, unit = "best paid", "sum of token rewards", "reward units: blue is paid, orange is charged"
        closed = "all responses that begin with it are known"
    words = (
        f"<p>Simulations: {found.simulations:,}; nodes: {found.nodes:,}{hidden}. "
        f"A raised number is the place where the branch of that number leaves its line.</p>\n"
        f"<p>The number after a line is the {number} of the whole text from the prompt to the end of the line.</p>\n"
        f"<p>● finished: a whole response. ✕ closed: {closed}. ○ open: not explored further.{left}</p>\n"
    )
    title = f"The response in bold is {'' if found.proved else 'not '}proved to be the {kind}"
    title = title if drawing.best else "No response ended within the length limit"
    return html_page(title, prompt, NATS if found.by_likelihood else SCALE, unit, f"{words}<ol>{lines}</ol>")
