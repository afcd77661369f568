"""Monte Carlo tree search over a Q-function: PUCT with exact closing, for the likeliest or the best-paid response.

Tree values are *whole-path* values: rewards from the root plus the value to go. With the network's own step reward,
beta log pi (Eq. 13), that is beta times a prefix's log-probability; with r + beta log pi_ref and V* (Eq. 12) the same
plus V*(s_0): min-max normalised, the two searches are one.

A node that cannot lead to anything better is *closed* and never entered again: its responses are all known, or it is
no likelier than the best response found. When the root closes, that response is proved to be the best.

The trees of B prompts grow together, one model call for all. They live in NumPy arrays on the host, where walking
them costs least; the model sees only which nodes to add.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minqstar.errors import require
from minqstar.lm.memory import require_memory
from minqstar.search.decode import Decoded, check
from minqstar.search.evaluator import Evaluation, Evaluator
from minqstar.search.tree import EDGE_BYTES, NONE, Tree

TIE = 1e-9  # nats, or of selection scores: what differs by less is equal
ALIKE = 1e-8  # nats: a tree whose values all lie within it knows no difference yet
ROOM = 512  # nodes of a tree at first; it doubles when they are made
Backup = Literal["mean", "max", "soft"]
Leaf = Literal["rollout", "value"]


@dataclass(frozen=True)
class MCTSConfig:
    """How to grow a tree.

    The defaults reach the highest likelihood for a given number of tokens when these are few (`python -m
    minqstar.lab.searches --variants`): a roll-out ends in a response, and a response is a bound that
    closes much of what a value of 0 leaves open. The backups tie there; the mean is the field's usual one.
    """

    budget: int = 256
    """Nodes to add to a prompt's tree, each of one forwarded token; with advance anew for every token of the
    response. Where no response has ended by then, up to one response's length more completes one."""
    actions: int = 16
    """Tokens kept at a node, the likeliest."""
    c_puct: float = 2.0
    """Weight of the prior against the value, which is normalised to [0, 1]."""
    backup: Backup = "mean"
    """What a node makes of its children's values: mean over visits, max, or beta logsumexp."""
    leaf: Leaf = "rollout"
    """What a new leaf is worth: the end of a greedy roll-out, whose nodes stay, or the value to go (0; V* if known).
    The first simulation is a greedy roll-out in any case: no answer is worse than greedy's."""
    leaves: int = 1
    """Leaves to grow in each tree at once, by virtual loss, after the first roll-out; 1 is the sequential search."""
    advance: bool = False
    """Commit one token at a time, keeping its subtree, in place of one search for the whole response."""

    def __post_init__(self):
        for name, most in (("budget", 10**5), ("actions", 10**5), ("leaves", 10**4)):
            value = getattr(self, name)
            require(0 < value <= most, f"{name} must be between 1 and {most:,}, got {value}")
        require(1e-3 <= self.c_puct <= 1e6, f"c_puct must be between 0.001 and a million, got {self.c_puct}")


class Found(NamedTuple):
    """What a search of one prompt came to."""

    response: Decoded
    value: float  # the response's whole-path value, reward units
    by_likelihood: bool  # whether the best response is the likeliest one, or else the best paid
    proved: bool  # no other response within the length limit is better
    completed: bool  # no response had ended when the search did: the greedy one was carried on to its end
    simulations: int  # that came back to the root
    nodes: int  # in its tree


def first_best(scores: np.ndarray) -> np.ndarray:
    """The index (R,) of the best of (R, A) scores; among equals the first, which has the lowest token id."""
    return (scores >= scores.max(-1, keepdims=True) - TIE).argmax(-1)


class Search:
    """One search of B prompts' trees; `mcts` runs it. Rows (R,) are indices of trees; lanes grow one leaf each.

    With several lanes `flying` counts those under way through an edge: `_walk` adds, and either `_back_up` or `_recall`
    takes off again.
    """

    def __init__(
        self, evaluator: Evaluator, prompts: list[list[int]], ends: tuple[int, ...], max_new_tokens: int,
        config: MCTSConfig, watch: Callable[[Tree], None] | None = None,
    ):  # fmt: skip
        self.evaluator, self.max_new_tokens, self.config, self.watch = evaluator, max_new_tokens, config, watch
        B, N = len(prompts), 1 + min(config.budget, ROOM)
        at_root = evaluator.start(prompts, N - 1, max_new_tokens)
        self.device = at_root.logps.device
        V = at_root.logps.shape[-1]
        self.is_end = np.isin(np.arange(V), ends)  # (V,) which tokens end a response
        A = min(config.actions, V)
        what = f"{B} trees of {config.budget:,} nodes with {A:,} actions"
        require_memory(B * config.budget * A * EDGE_BYTES, what, "the budget or the actions", torch.device("cpu"))
        self.tree = Tree(B, N, A)
        self.root = np.zeros(B, np.int64)  # where simulations begin
        self.cursor = np.full((B, config.leaves), NONE)  # where a roll-out stands; NONE: begin at the root
        self._write(np.arange(B), np.zeros(B, np.int64), at_root, np.zeros(B, np.int64))

    # growing

    def grow(self, live: np.ndarray):
        """Spend a budget on each of the live trees (B,), or as much of it as it takes to close them."""
        left = np.where(live, self.config.budget, 0)
        while (made := self._call(left)).any():
            left -= made

    def complete(self) -> np.ndarray:
        """Go on until every tree that can has a finished response; which had none before (B,)."""
        unfinished = self.tree.best_node == NONE
        for _ in range(self.max_new_tokens):
            self._call((unfinished & (self.tree.best_node == NONE)).astype(int))
        return unfinished

    def _call(self, left: np.ndarray) -> np.ndarray:
        """One model call: at most `left` (B,) new nodes in each tree, one a lane; how many were made (B,).

        The first simulation, greedy, has its tree for itself: others would find worse responses sooner.
        """
        lanes = np.minimum(left, np.where(self.tree.simulations > 0, self.config.leaves, 1))
        node, edge = np.full((2, *self.cursor.shape), NONE)
        for lane in range(lanes.max()):
            self._select(np.flatnonzero(lanes > lane), lane, node, edge)
        made = (node != NONE).sum(-1)
        if made.any():  # idle lanes last, and as many as are idle in all trees left out
            lane_of = np.argsort(node == NONE, axis=-1, kind="stable")[:, : made.max()]
            self._expand(*(np.take_along_axis(array, lane_of, -1) for array in (node, edge)), lane_of)
            if self.watch:
                self.watch(self.tree)
        return made

    def _expand(self, node: np.ndarray, edge: np.ndarray, lane_of: np.ndarray):
        """Make the nodes behind the edges (B, M) of nodes (B, M), none where these are NONE, for the lanes (B, M)."""
        tree = self.tree
        B, M = node.shape
        while tree.made + M > tree.parent.shape[1]:
            tree.double()
        tokens = tree.token[np.arange(B)[:, None], node, edge]
        parents, tokens = (torch.from_numpy(ids).to(self.device) for ids in (node, tokens))
        evaluation = self.evaluator.extend(parents, tokens)
        rows, column = np.nonzero(node != NONE)
        node, edge, new = node[rows, column], edge[rows, column], tree.made + column
        tree.made += M
        tree.parent[rows, new], tree.action[rows, new], tree.child[rows, node, edge] = node, edge, new
        tree.depth[rows, new] = tree.depth[rows, node] + 1
        tree.score[rows, new] = tree.score[rows, node] + tree.logp[rows, node, edge]
        tree.reward[rows, new] = tree.reward[rows, node] + tree.step[rows, node, edge]
        self._write(rows, new, evaluation, column)
        for i in range(M):  # one of a tree after the other: their paths share nodes
            mine = column == i
            self._arrive(rows[mine], new[mine], lane_of[rows[mine], i])

    def _write(self, rows: np.ndarray, nodes: np.ndarray, evaluation: Evaluation, column: np.ndarray):
        """Give new nodes their actions and values, and close the edges that lead to nothing better."""
        tree = self.tree
        A, V = tree.token.shape[-1], evaluation.logps.shape[-1]
        logps, tokens = self._that_fit(rows, nodes, evaluation.logps, column).topk(min(A + 1, V))
        kept, order = tokens[..., :A].sort()
        rewards = evaluation.rewards.gather(-1, kept)
        rest = logps[..., A:].sum(-1) if V > A else torch.full_like(logps[..., 0], -torch.inf)
        logps = logps[..., :A].gather(-1, order)
        token, logp, step, value, rest = (
            t.cpu().numpy()[rows, column] for t in (kept, logps.double(), rewards.double(), evaluation.values, rest)
        )
        tree.token[rows, nodes], tree.logp[rows, nodes], tree.step[rows, nodes] = token, logp, step
        tree.prior[rows, nodes] = np.exp(logp)
        tree.value[rows, nodes] = tree.reward[rows, nodes] + value
        last = (tree.depth[rows, nodes] == self.max_new_tokens - 1)[:, None]
        tree.closed[rows, nodes] = self._beaten(rows, nodes) | (logp == -np.inf) | (last & ~self.is_end[token])
        most = (
            tree.score[rows, nodes] + rest if self.evaluator.by_likelihood else np.where(rest > -np.inf, np.inf, rest)
        )
        np.maximum.at(tree.dropped, rows, most)

    def _that_fit(self, rows: np.ndarray, nodes: np.ndarray, logps: Tensor, column: np.ndarray) -> Tensor:
        """Log-probs (B, M, V) of actions that leave a finished response possible: at the length limit only `ends`."""
        last = self.tree.depth[rows, nodes] == self.max_new_tokens - 1
        if not last.any():
            return logps
        at_limit = torch.zeros(logps.shape[:2], dtype=torch.bool)
        at_limit[rows[last], column[last]] = True
        is_end = torch.from_numpy(self.is_end).to(self.device)
        can_end = at_limit.to(self.device) & (logps[..., is_end] > -torch.inf).any(-1)
        return logps.masked_fill(can_end[..., None] & ~is_end, -torch.inf)

    def _beaten(self, rows: np.ndarray, nodes: np.ndarray | slice) -> np.ndarray:
        """Which edges of nodes are no likelier than the best response: nothing behind them can be either."""
        score, logp = self.tree.score[rows, nodes], self.tree.logp[rows, nodes]
        best = self.tree.best_goal[rows].reshape(-1, *[1] * score.ndim)
        return (score[..., None] + logp <= best + TIE) & self.evaluator.by_likelihood

    def _arrive(self, rows: np.ndarray, new: np.ndarray, lane: np.ndarray):
        """Simulations have made a node: they end with it, or roll on from it."""
        tree = self.tree
        rolls = (self.config.leaf == "rollout") | (tree.simulations[rows] == 0)
        over = tree.shut(rows, new) | ~rolls
        self.cursor[rows, lane] = np.where(over, NONE, new)
        rows, new = rows[over], new[over]
        tree.visits[rows, new] += 1
        self._back_up(rows, tree.parent[rows, new], tree.action[rows, new], tree.value[rows, new], tree.shut(rows, new))

    # walking

    def _select(self, rows: np.ndarray, lane: int, node: np.ndarray, edge: np.ndarray):
        """Walk to an edge without a node, in each tree. A walk to an end token needs no model, and another begins."""
        tree = self.tree
        while len(rows := rows[~tree.shut(rows, self.root[rows])]):
            start = self.cursor[rows, lane]
            dead = (start != NONE) & tree.shut(rows, start)  # another lane has closed what this one was rolling through
            self._recall(rows[dead], start[dead])
            start = np.where((start == NONE) | dead, self.root[rows], start)
            self.cursor[rows, lane] = NONE
            rows, nodes, edges = self._walk(rows, start)
            ends = self.is_end[tree.token[rows, nodes, edges]]
            node[rows[~ends], lane], edge[rows[~ends], lane] = nodes[~ends], edges[~ends]
            rows = rows[ends]
            self._finish(rows, nodes[ends], edges[ends])

    def _walk(self, rows: np.ndarray, node: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """From nodes (R,) down to edges without a node: trees that have one, those edges' nodes, the edges."""
        tree, ends = self.tree, []
        while len(rows):
            edge, there = self._puct(rows, node)
            if not there.all():  # other lanes are about to take every edge that is left
                self._recall(rows[~there], node[~there])
                rows, node, edge = rows[there], node[there], edge[there]
            if self.config.leaves > 1:
                tree.flying[rows, node, edge] += 1
            child = tree.child[rows, node, edge]
            end = child == NONE
            ends.append((rows[end], node[end], edge[end]))
            rows, node = rows[~end], child[~end]
        return tuple(np.concatenate(part) for part in zip(*ends, strict=True))

    def _puct(self, rows: np.ndarray, node: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """PUCT: the open edge with the largest value + c_puct prior sqrt(N) / (1 + n), and whether there is one.

        N and n count visits of node and edge. An edge not yet visited has its node's value. Values are normalised by
        the range of all simulations' values.
        """
        tree = self.tree
        visits, closed, count = tree.edge_visits[rows, node], tree.closed[rows, node], tree.visits[rows, node]
        value = np.where(visits > 0, tree.edge_value[rows, node], tree.value[rows, node][:, None])
        least = ALIKE * self.evaluator.beta
        spread = (tree.high[rows] - tree.low[rows])[:, None]
        value = np.where(spread > least, (value - tree.low[rows][:, None]) / np.maximum(spread, least), 0.0).clip(0, 1)
        if self.config.leaves > 1:  # virtual loss: as if those under way had come back with the lowest value
            flying = tree.flying[rows, node]
            closed = closed | ((flying > 0) & (tree.child[rows, node] == NONE))
            value = np.where(flying > 0, value * visits / np.maximum(visits + flying, 1), value)
            visits, count = visits + flying, count + flying.sum(-1)
        explore = np.sqrt(np.maximum(count, 1))[:, None] * tree.prior[rows, node] / (1 + visits)
        score = np.where(closed, -np.inf, value + self.config.c_puct * explore)
        return first_best(score), ~closed.all(-1)

    def _recall(self, rows: np.ndarray, node: np.ndarray):
        """A walk is given up at a node: nobody is under way on its path any longer."""
        tree = self.tree
        while len(rows := rows[up := node != self.root[rows]]):
            node = node[up]
            parent, action = tree.parent[rows, node], tree.action[rows, node]
            tree.flying[rows, parent, action] -= 1
            node = parent

    # what a simulation brings home

    def _finish(self, rows: np.ndarray, node: np.ndarray, edge: np.ndarray):
        """Finished responses: the edges (R,) are end tokens."""
        tree = self.tree
        value = tree.reward[rows, node] + tree.step[rows, node, edge]
        goal = tree.score[rows, node] + tree.logp[rows, node, edge] if self.evaluator.by_likelihood else value
        better = goal > tree.best_goal[rows]
        won = rows[better]
        tree.best_goal[won], tree.best_node[won], tree.best_edge[won] = goal[better], node[better], edge[better]
        if self.evaluator.by_likelihood and len(won):
            self._close_beaten(won)
        self._back_up(rows, node, edge, value, np.ones(len(rows), bool))

    def _close_beaten(self, rows: np.ndarray):
        """Close what the trees' new best responses beat, and then each node whose edges are all closed."""
        tree, made = self.tree, slice(self.tree.made)
        closed = tree.closed[rows, made] | self._beaten(rows, made)
        child = tree.child[rows, made]
        has_child, lines = child != NONE, np.arange(len(rows))[:, None, None]
        while True:
            more = closed | (has_child & closed.all(-1)[lines, child])
            if (more == closed).all():
                break
            closed = more
        tree.closed[rows, made] = closed

    def _back_up(self, rows: np.ndarray, node: np.ndarray, edge: np.ndarray, result: np.ndarray, shut: np.ndarray):
        """Carry simulations' results, and closed nodes, from edges (R,) up to the roots."""
        tree = self.tree
        tree.simulations[rows] += 1
        tree.low[rows], tree.high[rows] = np.minimum(tree.low[rows], result), np.maximum(tree.high[rows], result)
        value = result
        while len(rows):
            tree.edge_visits[rows, node, edge] += 1
            tree.edge_value[rows, node, edge] = value
            tree.closed[rows, node, edge] |= shut
            if self.config.leaves > 1:
                tree.flying[rows, node, edge] -= 1
            value = self._backed_up(rows, node, result)
            tree.value[rows, node] = value
            tree.visits[rows, node] += 1
            up = node != self.root[rows]
            rows, node, value, result = rows[up], node[up], value[up], result[up]
            shut = tree.shut(rows, node)
            node, edge = tree.parent[rows, node], tree.action[rows, node]

    def _backed_up(self, rows: np.ndarray, node: np.ndarray, result: np.ndarray) -> np.ndarray:
        """What nodes are worth after one more simulation with that result."""
        tree, how = self.tree, self.config.backup
        if how == "mean":
            count = tree.visits[rows, node]
            return (tree.value[rows, node] * count + result) / (count + 1)
        children = np.where(tree.edge_visits[rows, node] > 0, tree.edge_value[rows, node], -np.inf)
        top = children.max(-1)
        if how == "max":
            return top
        beta = self.evaluator.beta
        return top + beta * np.log(np.exp((children - top[:, None]) / beta).sum(-1))

    # answering

    def commit(self, live: np.ndarray) -> np.ndarray:
        """Move the roots of live trees (B,) one token on; which of them have come to their end (B,)."""
        tree, rows = self.tree, np.flatnonzero(live)
        root = self.root[rows]
        child = tree.child[rows, root, self._next_edge(rows, root)]
        self.root[rows] = np.where(child != NONE, child, root)
        self.cursor[rows], tree.flying[rows] = NONE, 0
        over = live.copy()
        over[rows] = child == NONE
        return over

    def _next_edge(self, rows: np.ndarray, root: np.ndarray) -> np.ndarray:
        """The root's edge towards the best finished response; before there is one, towards the first roll-out."""
        tree = self.tree
        node, edge = tree.best_node[rows], tree.best_edge[rows]
        while (below := (node != NONE) & (node != root)).any():
            edge = np.where(below, tree.action[rows, node], edge)
            node = np.where(below, tree.parent[rows, node], node)
        return np.where(node == NONE, (tree.child[rows, root] != NONE).argmax(-1), edge)

    def found(self, row: int, completed: bool) -> Found:
        """A tree's answer: its best finished response, or else the greedy one, which the length limit cut."""
        tree = self.tree
        node, edge = int(tree.best_node[row]), int(tree.best_edge[row])
        ended, searched = node != NONE, tree.closed[row, 0].all()
        if not ended:
            edge = int(tree.logp[row, 0].argmax())
            node = 0
            while (child := tree.child[row, node, edge]) != NONE:
                node, edge = int(child), int(tree.logp[row, child].argmax())
        tokens, logps = tree.path(row, node, edge)
        return Found(
            response=Decoded(tokens, logps, not self.is_end[tokens[-1]]),
            value=float(tree.reward[row, node] + tree.step[row, node, edge]),
            by_likelihood=self.evaluator.by_likelihood,
            proved=bool(ended and searched and tree.dropped[row] <= tree.best_goal[row] + TIE),
            completed=completed and ended,
            simulations=int(tree.simulations[row]),
            nodes=1 + int((tree.parent[row] != NONE).sum()),
        )


def mcts(
    evaluator: Evaluator, prompts: list[list[int]], ends: tuple[int, ...], max_new_tokens: int, config: MCTSConfig,
    watch: Callable[[Tree], None] | None = None,
) -> tuple[list[Found], Tree]:  # fmt: skip
    """Search a response to each prompt; the trees are returned as they stand at the end.

    One search for the whole response (the default) spends the budget where it pays and answers with the best finished
    response, often proved to be the best of all. `advance` commits a token after each budget: for an answer that
    is to appear token by token, or whose tree would not fit; what was committed is never reconsidered, but the
    subtree below it, its visits, and its keys and values are all kept. `watch` sees the trees after every model call.
    """
    check(prompts, max_new_tokens)
    search = Search(evaluator, prompts, ends, max_new_tokens, config, watch)
    live = np.ones(len(prompts), bool)
    search.grow(live)
    while config.advance and (live := live & ~search.commit(live)).any():
        search.grow(live)
    unfinished = search.complete()
    return [search.found(row, bool(unfinished[row])) for row in range(len(prompts))], search.tree
