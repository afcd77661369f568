"""Decoding one token at a time: greedy, sampling, best-of-n. Any evaluator will do (see `evaluator`).

Each of the tokens `ends` ends a response, in every search. Chat models have several; the tokenizer's EOS is the first.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minqstar.errors import require
from minqstar.search.evaluator import Evaluator

BRANCHES = 32  # draws that share one reading of their prompt; each sees the others' slots through a mask


class Decoded(NamedTuple):
    """One response: its tokens, with its end token unless it was truncated, and log pi of each, nats."""

    tokens: list[int]
    logps: list[float]
    truncated: bool  # stopped by the length limit: not terminal, no V* = 0

    @property
    def score(self) -> float:
        """log pi(response | prompt), nats: the sum over its tokens, the end token included."""
        return sum(self.logps)


def until_end(tokens: list[int], logps: list[float], ends: tuple[int, ...]) -> Decoded:
    """A response cut after its first end token; without one it is truncated."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
    return Decoded(tokens[:length], logps[:length], length is None)


def check(prompts: list[list[int]], max_new_tokens: int):
    """UserError unless there is something to search for."""
    require(len(prompts) > 0, "there is no prompt to continue")
    require(max_new_tokens > 0, f"max_new_tokens must be positive, got {max_new_tokens}")


def by_room(prompts: list[list[int]], block_size: int, most: int) -> dict[int, list[int]]:
    """Which prompts (their indices) have room for how many new tokens, `most` at most; those with most room first.

    A search has one length limit for all of its prompts: the longest would set it for the others.
    """
    rooms = [min(most, block_size - len(prompt)) for prompt in prompts]
    return {room: [i for i, of in enumerate(rooms) if of == room] for room in sorted(set(rooms), reverse=True)}


Choose = Callable[[Tensor], Tensor]  # log-probs (B, M, V) -> tokens (B, M)


def greedy(logps: Tensor) -> Tensor:
    """The likeliest token; among equals the lowest id."""
    return logps.argmax(-1)


def sampler(generator: torch.Generator, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Choose:
    """Draws from pi^(1/temperature), normalised; temperature 1 is the policy itself, 0 is greedy.

    Of that distribution `top_k` keeps the k likeliest tokens (0: all), and then `top_p` the fewest that together have
    at least that probability (nucleus sampling, arXiv 1904.09751); what is kept is renormalised.
    """
    require(0 <= temperature < math.inf, f"temperature must be finite and not negative, got {temperature}")
    require(top_k >= 0, f"top_k must not be negative, got {top_k}")
    require(0 < top_p <= 1, f"top_p must be above 0 and at most 1, got {top_p}")

    if temperature == 0:
        return greedy

    def choose(logps: Tensor) -> Tensor:
        V = logps.shape[-1]
        require(top_k <= V, f"top_k is {top_k}; the vocabulary has {V} tokens")
        likeliest = logps.amax(-1, keepdim=True)  # taken off first: a tiny temperature would make all of them -inf
        probs = ((logps - likeliest).double() / temperature).softmax(-1)
        if top_k or top_p < 1:
            sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
            sorted_probs[..., top_k or V :] = 0
            total = sorted_probs.sum(-1, keepdim=True)
            before = sorted_probs.cumsum(-1) - sorted_probs
            probs = torch.zeros_like(probs).scatter(-1, order, sorted_probs.where(before < top_p * total, 0))
        return torch.multinomial(probs.float().flatten(0, -2), 1, generator=generator).view(logps.shape[:-1])

    return choose


def decode(
    evaluator: Evaluator, prompts: list[list[int]], ends: tuple[int, ...], max_new_tokens: int, choose: Choose,
    n: int = 1,
) -> list[list[Decoded]]:  # fmt: skip
    """n responses to each prompt, all together; one that has ended is carried along and ignored."""
    check(prompts, max_new_tokens)
    require(n > 0, f"n must be positive, got {n}")
    logps = evaluator.start(prompts, nodes=n * (max_new_tokens - 1), depth=max_new_tokens).logps.expand(-1, n, -1)
    parents = torch.zeros(logps.shape[:2], dtype=torch.long, device=logps.device)
    end_ids = torch.tensor(ends, device=logps.device)
    done = torch.zeros_like(parents, dtype=torch.bool)
    tokens, scores = [], []
    for step in range(max_new_tokens):
        token = choose(logps)
        tokens.append(token)
        scores.append(logps.gather(-1, token[..., None])[..., 0])
        done = done | torch.isin(token, end_ids)
        if done.all() or step == max_new_tokens - 1:
            break
        logps = evaluator.extend(parents.masked_fill(done, -1), token).logps
        parents = torch.arange(1 + step * n, 1 + (step + 1) * n, device=parents.device).expand_as(parents)
    rows = zip(torch.stack(tokens, -1).tolist(), torch.stack(scores, -1).tolist(), strict=True)
    return [[until_end(*branch, ends) for branch in zip(*row, strict=True)] for row in rows]


def best_of_n(
    evaluator: Evaluator, prompts: list[list[int]], ends: tuple[int, ...], max_new_tokens: int, choose: Choose, n: int,
    rank: Callable[[int, Decoded], float],
) -> list[Decoded]:  # fmt: skip
    """For each prompt the best of n draws, by `rank(prompt index, draw)`; finished ones come before truncated ones."""
    require(n > 0, f"n must be positive, got {n}")
    rows = math.ceil(n / BRANCHES)  # of each prompt
    repeated = [prompt for prompt in prompts for _ in range(rows)]
    drawn = decode(evaluator, repeated, ends, max_new_tokens, choose, math.ceil(n / rows))
    best = []
    for i in range(len(prompts)):
        mine = [draw for row in drawn[i * rows : (i + 1) * rows] for draw in row][:n]
        best.append(max(mine, key=lambda draw, i=i: (not draw.truncated, rank(i, draw))))
    return best
