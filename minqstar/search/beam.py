"""Beam search for the likeliest response: by Eq. 12 and 13 also the search for the most reward, V* included.

A prompt is read once, and its keys and values are shared by its beams; a beam is a node of the prompt's tree, so
reordering beams moves no cache. B prompts, K beams, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minqstar.errors import require
from minqstar.search.decode import Decoded, check
from minqstar.search.evaluator import Evaluator


@dataclass(frozen=True)
class BeamConfig:
    """How wide to look, and how to compare responses of unequal length."""

    width: int = 5
    """Beams of each prompt."""
    alpha: float = 0.0
    """A response's score is its log-probability over length^alpha, its end counted; only 0 is Bellman-consistent."""
    n: int = 1
    """How many of the best finished responses to return."""
    compete: bool = False
    """Count a finished response only if it is among the width best candidates of its step, as transformers does.
    Without it every end of a live prefix counts, which costs nothing and can only find more."""

    def __post_init__(self):
        require(0 < self.width <= 10_000, f"width must be between 1 and 10,000, got {self.width}")
        require(0 < self.n <= self.width, f"n must be between 1 and the width ({self.width}), got {self.n}")
        require(0 <= self.alpha <= 10, f"alpha must be between 0 and 10, got {self.alpha}")


def beam_search(
    evaluator: Evaluator, prompts: list[list[int]], ends: tuple[int, ...], max_new_tokens: int, config: BeamConfig
) -> list[list[Decoded]]:
    """For each prompt its best finished responses, at most `config.n`, best first; if none finished, the best prefix.

    At every step the K best prefixes live on, and each of the E tokens `ends` after one of them makes a finished
    response. A prompt is done when no live prefix can beat the worst of n kept responses: prefixes only get less
    likely, so that with alpha 0 a prefix's score is its own bound, and with a larger one its score at full length is.
    A beam as wide as there are prefixes is exact.
    """
    check(prompts, max_new_tokens)
    require(evaluator.by_likelihood, "a beam searches for likelihood; another reward is for mcts")
    K, n, alpha = config.width, config.n, config.alpha
    logps = evaluator.start(prompts, nodes=K * (max_new_tokens - 1), depth=max_new_tokens).logps
    B, _, V = logps.shape
    scores = torch.zeros(B, 1, dtype=torch.float64, device=logps.device)  # (B, M) nats, of the live prefixes
    nodes = torch.zeros_like(scores, dtype=torch.long)  # (B, M) where they stand in the tree
    none = scores.expand(B, n)
    kept = Ends(none - torch.inf, none.long(), none.long(), none.to(logps.dtype))
    end_ids = torch.tensor(ends, device=logps.device)
    grown: list[tuple[Tensor, Tensor, Tensor]] = []  # parent, token and log-prob of every node but the prompt
    open_ = torch.ones(B, 1, dtype=torch.bool, device=logps.device)
    made = 1
    for step in range(max_new_tokens):
        total = scores[..., None] + logps  # (B, M, V)
        ended = total[..., end_ids] / (step + 1) ** alpha  # (B, M, E)
        if config.compete:
            least = total.flatten(1).topk(min(K, total[0].numel())).values[:, -1:, None]
            ended = ended.masked_fill(total[..., end_ids] < least, -torch.inf)
        # of a prompt that is done too: by its bound nothing changes there any more
        if (ended > kept.scores[:, -1:, None]).any():
            before, token = nodes[..., None].expand_as(ended), end_ids.expand_as(ended)
            kept = kept.best(Ends(ended, before, token, logps[..., end_ids]), n)

        total.index_fill_(-1, end_ids, -torch.inf)
        scores, index = total.flatten(1).topk(min(K, total[0].numel()))
        parents, tokens = nodes.gather(1, index // V), index % V
        grown.append((parents, tokens, logps.flatten(1).gather(1, index)))
        nodes = torch.arange(made, made + tokens.shape[1], device=tokens.device).expand_as(tokens)
        made += tokens.shape[1]
        open_ = open_ & (scores[:, :1] / max_new_tokens**alpha > kept.scores[:, -1:])
        if step == max_new_tokens - 1 or not open_.any():
            break
        asked = open_ & (scores > -torch.inf)
        logps = evaluator.extend(parents.masked_fill(~asked, -1), tokens).logps
    return _responses(kept, nodes[:, 0], grown)


class Ends(NamedTuple):
    """End tokens after some prefixes of each prompt: n of them, or (M, E) in place of n."""

    scores: Tensor  # (B, n) float64, nats over length^alpha; -inf where there is none
    nodes: Tensor  # (B, n) the prefixes
    tokens: Tensor  # (B, n) the end tokens
    logps: Tensor  # (B, n) log pi(end token | prefix), nats

    def best(self, other: "Ends", n: int) -> "Ends":
        """The n best of both, best first."""
        scores, *others = (torch.cat((a, b.flatten(1)), dim=1) for a, b in zip(self, other, strict=True))
        scores, index = scores.topk(n)
        return Ends(scores, *(field.gather(1, index) for field in others))


def _responses(kept: Ends, live: Tensor, grown: list[tuple[Tensor, ...]]) -> list[list[Decoded]]:
    """Finished responses where there are some, else the best live prefix (B,)."""
    parents, tokens, logps = (torch.cat(field, dim=1).tolist() for field in zip(*grown, strict=True))

    def walk(row: int, node: int) -> tuple[list[int], list[float]]:
        path = []
        while node:  # 0 is the prompt
            path.append(node - 1)
            node = parents[row][node - 1]
        return [tokens[row][i] for i in reversed(path)], [logps[row][i] for i in reversed(path)]

    answers = []
    for row, ends in enumerate(zip(*(field.tolist() for field in kept), strict=True)):
        finished = []
        for score, node, token, logp in zip(*ends, strict=True):
            if score > -math.inf:
                before, their_logps = walk(row, node)
                finished.append(Decoded([*before, token], [*their_logps, logp], truncated=False))
        answers.append(finished or [Decoded(*walk(row, live[row].item()), truncated=True)])
    return answers
