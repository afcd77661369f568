"""Search for reward is search for likelihood (Eq. 12, 13): two trees that are one; and what searches find."""

import numpy as np

from minqstar.evaluate import MAX_NEW_TOKENS
from minqstar.lab.findings.drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, label, numbers, panels, styled
from minqstar.lab.findings.lab import Lab
from minqstar.lab.searches import exact, learned
from minqstar.lab.treeview import Drawing
from minqstar.search.evaluator import Table
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.search.tree import NONE
from minqstar.theory.mdp import solve
from minqstar.world.posts import post_of
from minqstar.world.tldr import BETA, World

TREES = 64  # posts whose two trees are compared
TEXT = 41  # characters of a branch that are drawn
KINDS = {  # of searches, by how their names begin: words, colour, marker
    "greedy": ("greedy", GREY, "D"),
    "best": ("best of 16", GREEN, "P"),
    "beam": ("beams", BLUE, "o"),
    "mcts as": ("tree search, as n beams", RED, "s"),
    "mcts rollout": ("… half the tokens of 5 beams", ORANGE, "^"),
    "mcts value": ("… and no roll-outs", PURPLE, "v"),
}


def compute(lab: Lab) -> dict:
    """What searches find on the learned and on the exact policy; and guided beside likelihood search."""
    rows = lab.rows[: lab.scale.posts]
    return {
        "posts": len(rows),
        "learned": lab.piece("searches_learned", lambda: learned(lab.main, rows, variants=True)),
        "exact": lab.piece("searches_exact", lambda: exact(lab.world, rows)),
        **paired_trees(lab.world, rows[:TREES]),
    }


def paired_trees(world: World, rows: list[dict]) -> dict:
    """How many posts' trees are the same, node for node and visit for visit, in guided and in likelihood search.

    And the two trees of one post, the first with the most branches: by r + beta log pi_ref with V* at the leaves
    (Eq. 12), and by beta log pi* (Eq. 13), the world's exact policy.
    """
    posts, counts, widest = [post_of(row) for row in rows], {"trees": 0, "identical": 0, "nodes": 0}, {"likelihood": []}
    for _, places, mdp in world.tables(posts):
        solution, V = solve(mdp, BETA), world.tokenizer.n_vocab
        what = ([[]] * len(places), world.tokenizer.ends, MAX_NEW_TOKENS, MCTSConfig())
        searched = [mcts(Table(mdp, solution, BETA, V, guided), *what) for guided in (True, False)]
        a, b = (tree for _, tree in searched)
        made = min(a.made, b.made)
        same = [(getattr(a, name)[:, :made] == getattr(b, name)[:, :made]) for name in ("parent", "action", "visits")]
        counts["trees"] += len(places)
        counts["identical"] += int(np.all(same, axis=(0, 2)).sum()) if a.made == b.made else 0
        counts["nodes"] += int((a.parent != NONE).sum()) + len(places)
        for row, place in enumerate(places):
            drawings = (Drawing(tree, row, world.tokenizer, found[row]) for found, tree in searched)
            guided, likelihood = map(branches, drawings)
            if len(likelihood) > len(widest["likelihood"]):
                of_post = {"prompt": posts[place].prompt, "start_value": solution.V[row, 0].item()}
                widest = {**of_post, "guided": guided, "likelihood": likelihood}
    return {"identical_trees": counts, "two_trees": widest}


def branches(drawing: Drawing, node: int = 0, depth: int = 0) -> list[dict]:
    """A tree, depth first, as its stretches without a branch: their text; their first token's visits and value."""
    found, tree, tokenizer = [], drawing.tree, drawing.tokenizer
    for edge in drawing.edges(node):
        steps = [(node, edge)]
        while (child := int(tree.child[steps[-1]])) != NONE and len(below := drawing.edges(child)) == 1:
            steps.append((child, below[0]))
        text = "".join(tokenizer.texts_of([int(tree.token[step]) for step in steps]))
        of_first = {"visits": int(tree.edge_visits[node, edge]), "value": float(tree.edge_value[node, edge])}
        best = drawing.best.get(node) == edge
        found.append({"text": text, "depth": depth, **of_first, "best": best})
        found += branches(drawing, child, depth + 1) if child != NONE else []
    return found


@styled
def draw(found: dict):
    """Above the two trees of one post, below what each search finds for the tokens that it forwards."""
    message = "Search for reward and search for likelihood grow the same tree"
    figure, (above, below) = panels(message, 2, 2, 2.7, gridspec_kw={"height_ratios": [0.8, 1]})
    trees, both = found["identical_trees"], found["two_trees"]
    closed = "A branch that stops is closed: it cannot beat the red one."
    outline(above[0], both["guided"], "By r + β log π_ref, and V* at the leaves (Eq. 12)", closed)
    of_all = f"{trees['identical']} of {trees['trees']} posts' trees agree."
    shift = f"Left: these values + V*(s_0), {both['start_value']:.3f}. {of_all}"
    outline(above[1], both["likelihood"], "By β log π* (Eq. 13)", shift)
    points(below[0], found["learned"], "mean_logp")
    points(below[1], found["exact"], "mean_regret")
    few, many = (found["learned"][name]["tokens_forwarded"] for name in ("mcts as beam 5", "beam 20"))
    title = f"Tree search needs {few:.0f} tokens, 20 beams {many:.0f}"
    label(below[0], title, "tokens a post", "mean log π found, nats")
    label(below[1], "Of the exact π* it finds the optimum", "tokens a post", "nats short of the optimum")
    below[0].legend(loc="lower right")
    return figure


def outline(axis, tree: list[dict], title: str, note: str):
    """A tree as an outline: a stretch without a branch a line, the thicker the more visits; the best one in colour."""
    axis.axis("off")
    axis.set(xlim=(0, 62), ylim=(-len(tree) - 2, 1.4))
    axis.set_title(title, loc="left")
    words = {"fontsize": 8, "va": "center", "family": "DejaVu Sans Mono", "parse_math": False}
    for x, text in ((53, "visits"), (62, "value")):
        axis.text(x, 0.4, text, **words | {"ha": "right", "color": GREY})
    rows: dict[int, int] = {-1: 0}  # the last line of each depth
    for i, branch in enumerate(tree, 1):
        depth = branch["depth"]
        rows[depth], x, above = i, 3 * depth, -rows[depth - 1] - 0.5 * (depth > 0)
        colour = RED if branch["best"] else GREY
        axis.plot([x, x, x + 2], [above, -i, -i], color=colour, linewidth=0.8 + 0.6 * branch["visits"])
        text = branch["text"].replace("\n", "↵")
        text = text if len(text) + x <= TEXT else text[: TEXT - x] + "…"
        axis.text(x + 2.5, -i, text, **words | {"color": colour if branch["best"] else "black"})
        for x, text in ((53, f"{branch['visits']}"), (62, f"{branch['value']:.3f}")):
            axis.text(x, -i, text, **words | {"ha": "right"})
    axis.text(0, -len(tree) - 1.4, note, fontsize=8, va="center")


def points(axis, searches: dict[str, dict], key: str):
    """What each search finds, by the tokens that it forwards."""
    seen = set()
    for name, point in searches.items():
        words, colour, marker = next(of for start, of in KINDS.items() if name.startswith(start))
        place = (point["tokens_forwarded"], point[key])
        what = {"color": colour, "markersize": 7, "linestyle": "none", "label": None if words in seen else words}
        axis.plot(*place, marker, **what)
        seen.add(words)
        if name.startswith("beam"):
            axis.annotate(name.split()[1], place, (5, 4), textcoords="offset points", fontsize=8)
        if name in ("mcts as beam 2", "mcts as beam 5"):
            axis.annotate(f"as {name.split()[-1]}", place, (5, -11), textcoords="offset points", fontsize=8)
    axis.margins(x=0.08, y=0.12)
    numbers(axis, [20, 50, 100, 200, 500])
