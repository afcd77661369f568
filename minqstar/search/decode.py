"""Decoding one token at a time: greedy, sampling, best-of-n.

What is searched over is an *evaluator*: `start(prompts)` and `step(tokens)` give the log-probs of the next token
of every row. `Network` is a model with its cache.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minqstar.cli import require
from minqstar.model import GPT, KVCache


class Evaluator(Protocol):
    def start(self, prompts: list[list[int]]) -> Tensor:
        """Begin with B prompts of any lengths; log-probs (B, V) of their next token, nats."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (B,), one to each row; log-probs (B, V) of the next."""


class Network:
    """A model and its KV cache as an evaluator: each prompt is read once, each step reads one token a row."""

    def __init__(self, model: GPT, max_new_tokens: int):
        self.model, self.max_new_tokens = model, max_new_tokens
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def start(self, prompts: list[list[int]]) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        require(int(lengths.min()) > 0, "a prompt is empty: there is nothing to continue")
        longest, limit = int(lengths.max()), self.model.config.block_size
        fits = longest + self.max_new_tokens <= limit
        require(fits, f"a prompt of {longest} tokens leaves no room for {self.max_new_tokens} new ones in {limit}")
        dtype = self.model.wte.weight.dtype
        self.cache = KVCache(self.model.config, len(prompts), longest + self.max_new_tokens, self.device, dtype)
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        for row, prompt in enumerate(prompts):  # what stands after a shorter prompt is overwritten before it is seen
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        hidden = self.model(tokens, cache=self.cache)
        self.positions = lengths
        return self._logps(hidden[torch.arange(len(prompts)), lengths - 1])

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        hidden = self.model(tokens[:, None], self.positions[:, None], cache=self.cache)
        self.positions = self.positions + 1
        return self._logps(hidden[:, 0])

    def _logps(self, hidden: Tensor) -> Tensor:
        logits = self.model.logits(hidden)
        return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


class Decoded(NamedTuple):
    """One response: its tokens, with EOS unless it was truncated, and log pi of each, nats."""

    tokens: list[int]
    logps: list[float]
    truncated: bool  # stopped by the length limit: not terminal, no V* = 0

    @property
    def score(self) -> float:
        """log pi(response | prompt), nats: the sum over its tokens, EOS included."""
        return sum(self.logps)


Choose = Callable[[Tensor], Tensor]  # log-probs (B, V) -> tokens (B,)


def greedy(logps: Tensor) -> Tensor:
    """The likeliest token of each row; among equals the lowest id."""
    return logps.argmax(-1)


def sampler(temperature: float, generator: torch.Generator) -> Choose:
    """Draws from pi^(1/temperature), normalised; temperature 1 is the policy itself."""
    require(0 < temperature < float("inf"), f"temperature must be positive and finite, got {temperature}")

    def choose(logps: Tensor) -> Tensor:
        likeliest = logps.amax(-1, keepdim=True)  # taken off first: a tiny temperature would make all of them -inf
        return torch.multinomial(((logps - likeliest) / temperature).softmax(-1), 1, generator=generator)[:, 0]

    return choose


def decode(
    evaluator: Evaluator, prompts: list[list[int]], choose: Choose, eos: int, max_new_tokens: int
) -> list[Decoded]:
    """One response to each prompt, all rows together; a row that has ended is carried along and ignored."""
    logps = evaluator.start(prompts)
    tokens, scores = [], []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=logps.device)
    for _ in range(max_new_tokens):
        token = choose(logps)
        tokens.append(token)
        scores.append(logps.gather(-1, token[:, None])[:, 0])
        done = done | (token == eos)
        if done.all() or len(tokens) == max_new_tokens:
            break
        logps = evaluator.step(token)
    rows = zip(torch.stack(tokens, 1).tolist(), torch.stack(scores, 1).tolist(), strict=True)
    return [_until_eos(row, row_logps, eos) for row, row_logps in rows]


def _until_eos(tokens: list[int], logps: list[float], eos: int) -> Decoded:
    length = tokens.index(eos) + 1 if eos in tokens else len(tokens)
    return Decoded(tokens[:length], logps[:length], eos not in tokens)


def best_of_n(
    evaluator: Evaluator, prompts: list[list[int]], n: int, rank: Callable[[int, Decoded], float],
    choose: Choose, eos: int, max_new_tokens: int,
) -> list[Decoded]:  # fmt: skip
    """For each prompt the best of n draws, by `rank(prompt index, draw)`; finished ones come before truncated ones."""
    require(n > 0, f"n must be positive, got {n}")
    draws = decode(evaluator, [prompt for prompt in prompts for _ in range(n)], choose, eos, max_new_tokens)
    best = []
    for i in range(len(prompts)):
        mine = draws[i * n : (i + 1) * n]
        best.append(max(mine, key=lambda draw: (not draw.truncated, rank(i, draw))))
    return best
