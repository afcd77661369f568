"""Beam search for the likeliest response: by Eq. 12 and 13 also the search for the most reward, V* included.

A prompt is read once, and its keys and values are shared by its beams; a beam is a node of the prompt's tree, so
reordering beams moves no cache. B prompts, K beams, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minqstar.cli import require
from minqstar.search.decode import Decoded, check, until_eos
from minqstar.search.evaluator import Evaluator


@dataclass(frozen=True)
class BeamConfig:
    """How wide to look, and how to compare responses of unequal length."""

    width: int = 5
    """Beams of each prompt."""
    alpha: float = 0.0
    """A response's score is its log-probability over length^alpha, EOS counted; only 0 is Bellman-consistent."""
    n: int = 1
    """How many of the best finished responses to return."""
    compete: bool = False
    """Count a finished response only if it is among the width best candidates of its step, as transformers does.
    Without it every end of a live prefix counts, which costs nothing and can only find more."""

    def __post_init__(self):
        require(0 < self.width <= 10_000, f"width must be between 1 and 10,000, got {self.width}")
        require(0 < self.n <= self.width, f"n must be between 1 and the width ({self.width}), got {self.n}")
        require(0 <= self.alpha <= 10, f"alpha must be between 0 and 10, got {self.alpha}")


@dataclass
class Beams:
    """K prefixes or responses of each prompt, best first."""

    scores: Tensor  # (B, K) float64, nats; -inf where there is none
    tokens: Tensor  # (B, K, T)
    logps: Tensor  # (B, K, T) nats

    def pick(self, index: Tensor, scores: Tensor) -> "Beams":
        """Those at `index` (B, k), with new scores."""
        along = index[..., None].expand(*index.shape, self.tokens.shape[-1])
        return Beams(scores, self.tokens.gather(1, along), self.logps.gather(1, along))

    def put(self, step: int, tokens: Tensor, logps: Tensor) -> "Beams":
        """Each with its token and log-prob of a step (B, K)."""
        self.tokens[..., step], self.logps[..., step] = tokens, logps
        return self

    def best(self, other: "Beams", n: int) -> "Beams":
        """The n best of both."""
        both = (torch.cat(pair, dim=1) for pair in zip(vars(self).values(), vars(other).values(), strict=True))
        union = Beams(*both)
        scores, index = union.scores.topk(n)
        return union.pick(index, scores)


def beam_search(
    evaluator: Evaluator, prompts: list[list[int]], eos: int, max_new_tokens: int, config: BeamConfig
) -> list[list[Decoded]]:
    """For each prompt its best finished responses, at most `config.n`, best first; if none finished, the best prefix.

    At every step the K best prefixes live on, and each way to end one of them is a finished response. A prompt is done
    when no live prefix can beat the worst of n kept responses: prefixes only get less likely, so that with alpha 0 a
    prefix's score is its own bound, and with a larger one its score at full length is. A beam as wide as there are
    prefixes is exact.
    """
    check(prompts, max_new_tokens)
    require(evaluator.by_likelihood, "a beam searches for likelihood; another reward is for mcts")
    K, n, alpha = config.width, config.n, config.alpha
    logps = evaluator.start(prompts, nodes=K * (max_new_tokens - 1), depth=max_new_tokens).logps
    B, _, V = logps.shape
    live = _no_beams(B, 1, max_new_tokens, logps.device)
    live.scores[:] = 0.0
    kept = _no_beams(B, n, max_new_tokens, logps.device)
    nodes = torch.zeros(B, 1, dtype=torch.long, device=logps.device)
    open_ = torch.ones(B, 1, dtype=torch.bool, device=logps.device)
    made = 1
    for step in range(max_new_tokens):
        total = live.scores[..., None] + logps  # (B, M, V) float64
        ended = total[..., eos] / (step + 1) ** alpha
        if config.compete:
            least = total.flatten(1).topk(min(K, total[0].numel())).values[:, -1:]
            ended = ended.masked_fill(total[..., eos] < least, -torch.inf)
        everywhere = torch.arange(ended.shape[1], device=ended.device).expand_as(ended)
        finished = live.pick(everywhere, ended).put(step, torch.full_like(everywhere, eos), logps[..., eos])
        kept = kept.best(finished, n)  # of a prompt that is done too: by its bound nothing changes there any more

        total[..., eos] = -torch.inf
        scores, index = total.flatten(1).topk(min(K, total[0].numel()))
        parent, token = index // V, index % V
        live = live.pick(parent, scores).put(step, token, logps.flatten(1).gather(1, index))
        bound = live.scores[:, :1] / max_new_tokens**alpha
        open_ = open_ & (bound > kept.scores[:, -1:])
        if step == max_new_tokens - 1 or not open_.any():
            break
        asked = open_ & (scores > -torch.inf)
        logps = evaluator.extend(nodes.gather(1, parent).masked_fill(~asked, -1), token).logps
        nodes = torch.arange(made, made + token.shape[1], device=token.device).expand_as(token)
        made += token.shape[1]
    return [_responses(*row, eos) for row in zip(_listed(kept), _listed(live), strict=True)]


def _no_beams(B: int, K: int, length: int, device: torch.device) -> Beams:
    scores = torch.full((B, K), -torch.inf, dtype=torch.float64, device=device)
    tokens = torch.zeros(B, K, length, dtype=torch.long, device=device)
    return Beams(scores, tokens, torch.zeros_like(tokens, dtype=torch.float64))


def _listed(beams: Beams) -> list[tuple[list, ...]]:
    return list(zip(*(field.tolist() for field in vars(beams).values()), strict=True))


def _responses(kept: tuple[list, ...], live: tuple[list, ...], eos: int) -> list[Decoded]:
    """Finished responses where there are some, else the best live prefix."""
    finished = [until_eos(tokens, logps, eos) for score, tokens, logps in zip(*kept, strict=True) if score > -math.inf]
    return finished or [until_eos(live[1][0], live[2][0], eos)]
