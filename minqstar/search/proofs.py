"""Searches that end with a proof: depth-first, best-first, and A*.

A prefix is worth its rewards so far; values to go are not read. Where no step pays more than 0, what follows a prefix
can only take from that: its rewards *bound* those of every response that begins with it. So a prefix whose bound is no
better than the best finished response is cut, and when no other prefix is left, that response is proved to be the
best. With a step reward of beta log pi (Eq. 13) the best response is the likeliest one, the mode of the policy.

All searches here cut by this one rule and differ only in which prefix they evaluate next:

- `depth_first`: the likeliest continuation of the longest prefix (arXiv 1908.10090). Its first descent is greedy
  decoding, so greedy's response is the first bound.
- `best_first`: the prefix with the best bound (best-first beam search of unlimited width, arXiv 2007.03909). Over
  likelihood this is uniform-cost search: it evaluates the prefixes that are likelier than the mode, which every proof
  must, and, ties aside, no others.
- A* is `best_first` over steps that are shaped by a heuristic (Definition 1, `Table.shaped`). With the most that can
  still follow as the heuristic, `Table.best_to_go`, the bound is exact and the first descent is the proof. The soft V*
  is no such help: it shapes the guided steps into beta log pi* (Eq. 10), which is uniform-cost search again.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from minqstar.errors import require
from minqstar.search.decode import Decoded, check
from minqstar.search.evaluator import Evaluator
from minqstar.search.mcts import TIE

Order = Callable[[float, int], tuple]  # a prefix's bound and its length -> its rank in the queue; the least comes first


class Proof(NamedTuple):
    """What a search of one prompt came to."""

    response: Decoded  # the best finished one; where none was found, the longest prefix
    proved: bool  # no other response within the length limit is better, by more than 1e-9 nats
    evaluated: list[float]  # log pi of every prefix that was evaluated, nats, in their order; the prompt's is 0

    @property
    def needed(self) -> int:
        """How many prefixes every proof must evaluate that knows nothing but likelihoods.

        These are the prefixes likelier than the response, for each of them may go on to a likelier one, and those
        that the response itself begins with. Among equally likely responses it depends on which one was found.
        Read it off a search by likelihood: with a heuristic, fewer may have been evaluated.
        """
        mode = self.response.score
        begins = accumulate(self.response.logps[:-1], initial=0.0)
        return sum(logp > mode + TIE for logp in self.evaluated) + sum(logp <= mode + TIE for logp in begins)


class Prefix(NamedTuple):
    """An evaluated prefix, and the C tokens after it that may lead to something better, the best one first."""

    before: int  # the prefix before it, and which of that one's tokens is its last
    rank: int
    length: int  # in tokens after the prompt
    logp: float  # log pi of all of it, nats
    tokens: np.ndarray  # (C,)
    bounds: np.ndarray  # (C,) rewards up to each token and with it, reward units
    logps: np.ndarray  # (C,) log pi of each token, nats


class Frontier:
    """One prompt's search: the prefixes evaluated so far, and a queue of those that are not."""

    def __init__(self, ends: tuple[int, ...], max_new_tokens: int, most: int, order: Order, tie: float):
        self.ends, self.max_new_tokens, self.most, self.order, self.tie = list(ends), max_new_tokens, most, order, tie
        self.prefixes: list[Prefix] = []  # numbered as the evaluator's nodes are; 0 is the prompt
        self.queue: list[tuple[tuple, int, int]] = []  # rank in the queue, a prefix, the place of a token after it
        self.best = -np.inf  # rewards of the best finished response
        self.last: tuple[int, int, float] | None = None  # the prefix before its end token, that token, its log-prob
        self.taken = (-1, 0, 0.0)  # the prefix that the evaluator has been asked about, as `queue` has it, its bound

    def add(self, logps: np.ndarray, rewards: np.ndarray):
        """Take in what the evaluator says (V,) of the prefix that was taken last."""
        before, rank, reward = self.taken
        node, parent = len(self.prefixes), self.prefixes[before] if self.prefixes else None
        length, logp = (parent.length + 1, parent.logp + float(parent.logps[rank])) if parent else (0, 0.0)
        bounds = reward + rewards
        end = max(self.ends, key=lambda token: bounds[token])
        if bounds[end] > self.best:
            self.best, self.last = float(bounds[end]), (node, end, float(logps[end]))
        tokens = np.flatnonzero(bounds > self.best + self.tie)  # no end token is: none is better than the best
        tokens = tokens[np.argsort(-bounds[tokens], kind="stable")]  # among equals the lowest id first
        self.prefixes.append(Prefix(before, rank, length, logp, tokens, bounds[tokens], logps[tokens]))
        if length + 1 < self.max_new_tokens:
            self._queue(node, 0)

    def _queue(self, node: int, rank: int):
        """Queue a token after a prefix, if there is one: those after it are no better, and wait for their turn."""
        prefix = self.prefixes[node]
        if rank < len(prefix.bounds):
            heappush(self.queue, (self.order(float(prefix.bounds[rank]), prefix.length + 1), node, rank))

    def open(self, node: int, rank: int) -> bool:
        """Whether a queued prefix may still lead to something better."""
        return self.prefixes[node].bounds[rank] > self.best + self.tie

    def take(self) -> tuple[int, int] | None:
        """What to evaluate next, a prefix and a token after it; None at the end of the search."""
        while self.queue and len(self.prefixes) < self.most:
            _, node, rank = heappop(self.queue)
            if self.open(node, rank):
                self._queue(node, rank + 1)
                prefix = self.prefixes[node]
                self.taken = node, rank, float(prefix.bounds[rank])
                return node, int(prefix.tokens[rank])
        return None

    def _longest(self) -> tuple[int, int, float]:
        """Like `last`, where no response has ended: the first of the longest prefixes, and its best token."""
        node = max((i for i, of in enumerate(self.prefixes) if len(of.tokens)), key=lambda i: self.prefixes[i].length)
        return node, int(self.prefixes[node].tokens[0]), float(self.prefixes[node].logps[0])

    def proof(self) -> Proof:
        """The answer, once there is nothing to take."""
        node, *step = self.last or self._longest()
        path = [step]
        while node:  # 0 is the prompt
            rank, node = self.prefixes[node].rank, self.prefixes[node].before
            path.append([int(self.prefixes[node].tokens[rank]), float(self.prefixes[node].logps[rank])])
        tokens, logps = (list(of) for of in zip(*reversed(path), strict=True))
        searched = not any(self.open(node, rank) for _, node, rank in self.queue)
        response = Decoded(tokens, logps, truncated=self.last is None)
        return Proof(response, self.last is not None and searched, [prefix.logp for prefix in self.prefixes])


def _prove(
    evaluator: Evaluator, prompts: list[list[int]], ends: tuple[int, ...], max_new_tokens: int, most: int, order: Order
) -> list[Proof]:
    """One search a prompt, all of them together: each model call evaluates one prefix of each that is not over."""
    check(prompts, max_new_tokens)
    require(most > 0, f"most must be positive, got {most}")
    tie = TIE * evaluator.beta
    frontiers = [Frontier(ends, max_new_tokens, most, order, tie) for _ in prompts]
    evaluation = evaluator.start(prompts, nodes=max_new_tokens, depth=max_new_tokens)
    asked: list[tuple[int, int] | None] = [(-1, 0)] * len(prompts)
    while any(asked):
        logps, rewards = (t[:, 0].double().cpu().numpy() for t in (evaluation.logps, evaluation.rewards))
        for row, frontier in enumerate(frontiers):
            if asked[row]:
                require((rewards[row] <= tie).all(), "a step pays more than 0: rewards so far bound nothing")
                frontier.add(logps[row], rewards[row])
        asked = [frontier.take() for frontier in frontiers]
        if any(asked):
            nodes, tokens = torch.tensor([of or (-1, 0) for of in asked], device=evaluation.logps.device).T[..., None]
            evaluation = evaluator.extend(nodes, tokens)
    return [frontier.proof() for frontier in frontiers]


def depth_first(
    evaluator: Evaluator, prompts: list[list[int]], ends: tuple[int, ...], max_new_tokens: int, most: int = 10_000
) -> list[Proof]:
    """The best response to each prompt with its proof, unless that takes more than `most` prefixes: depth first."""
    return _prove(evaluator, prompts, ends, max_new_tokens, most, lambda bound, length: (-length,))


def best_first(
    evaluator: Evaluator, prompts: list[list[int]], ends: tuple[int, ...], max_new_tokens: int, most: int = 10_000
) -> list[Proof]:
    """The same, the best bound first; among equals the longest. With steps shaped by a heuristic this is A*."""
    return _prove(evaluator, prompts, ends, max_new_tokens, most, lambda bound, length: (-bound, -length))
