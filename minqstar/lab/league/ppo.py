"""PPO on a reward that is given, with the KL to the reference inside of it (the paper's Appendix E).

A round draws responses, scores them, and makes a few steps on what was drawn. The critic is a head on the policy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minqstar.errors import require
from minqstar.evaluate import MAX_NEW_TOKENS
from minqstar.lab.league.objectives import Headed, ends
from minqstar.lm.model import GPT
from minqstar.lm.tokenizer import Tokenizer
from minqstar.search.decode import decode, sampler
from minqstar.search.evaluator import Network
from minqstar.theory.methods import gae, ppo_clip
from minqstar.theory.qfunction import implicit_reward
from minqstar.training.data import Batch, Group, PackedData
from minqstar.training.optim import OptimConfig, Optimizer, schedule
from minqstar.training.scoring import autocast, token_logps
from minqstar.training.trainer import Objective, update
from minqstar.world.posts import read_post
from minqstar.world.tldr import World

OFF = -2.0  # reward units: what a response off the grammar earns, less than nearly all that are on it
Paid = Callable[[Batch], Tensor]  # reward (S,) of each scored token, reward units


@dataclass(frozen=True)
class PPOConfig(OptimConfig):
    lr: float = 0.0018
    adam_lr: float = 0.0035
    rounds: int = 70
    prompts: int = 64  # of a round
    draws: int = 4  # of a prompt
    passes: int = 4  # that a round's rows are split into: a step each
    epochs: int = 2  # over a round's passes
    epsilon: float = 0.2  # of the clip
    lam: float = 1.0  # of GAE: 0.95 learned more slowly, the critic being rough at first
    value_weight: float = 0.1
    beta: float = 0.5  # reward units a nat


class Drawn(NamedTuple):
    """What a round's tokens (N,) were worth when they were drawn, by the rows of its data."""

    logps: Tensor  # log pi, nats
    advantage: Tensor  # reward units
    value: Tensor  # what the critic should have said: its own value and the advantage


class PPO(Objective):
    """The clipped policy gradient, and the squared error of the critic; means over tokens."""

    def __init__(self, data: PackedData, drawn: Drawn, config: PPOConfig):
        self.data, self.drawn, self.config = data, drawn, config

    def read(self, model: Headed, batch: Batch) -> tuple[Tensor, Tensor]:
        return policy_and_value(model, batch)

    def units(self, batch: Batch) -> int:
        return len(batch.target)

    def sums(self, read: tuple[Tensor, Tensor], batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        logps, value = read
        mine = torch.from_numpy(self.data.scored(rows))
        old, advantage, target = (of[mine].to(value.device) for of in self.drawn)
        policy = ppo_clip(logps, old, advantage, self.config.epsilon)
        error = (value - target) ** 2
        return {"loss": (policy + self.config.value_weight * error).sum(), "value_error": error.detach().sum()}


def policy_and_value(model: Headed, batch: Batch) -> tuple[Tensor, Tensor]:
    """log pi and the critic's V of the states (S,) in which the scored tokens are taken."""
    hidden = model(batch.tokens, batch.positions, batch.mask(), keep=batch.source, before=batch.before)
    logits = model.logits(hidden).float()
    logps = logits.gather(1, batch.target[:, None])[:, 0] - logits.logsumexp(-1)
    return logps, model.head(hidden).float()[:, 0]


def ppo(
    model: Headed, reference: GPT, paid: Paid, prompts: list[list[int]], end_ids: tuple[int, ...], pad: int,
    config: PPOConfig, dtype: torch.dtype, seed: int,
) -> Iterator[dict]:  # fmt: skip
    """Train a policy on what it draws; after every round the means of its draws.

    Responses that the length limit cut are left out: they are not terminal, so no reward is known of them.
    """
    optimizer, rng = Optimizer(model, config), np.random.default_rng([seed, 1])
    choose = sampler(torch.Generator().manual_seed(seed))
    step, steps = 0, config.rounds * config.epochs * config.passes
    device = next(model.parameters()).device
    for _ in range(config.rounds):
        some = [prompts[i] for i in rng.choice(len(prompts), min(config.prompts, len(prompts)), replace=False)]
        lines = decode(Network(model), some, end_ids, MAX_NEW_TOKENS, choose, config.draws)
        whole = [[d.tokens for d in line if not d.truncated and len(d.tokens) > 1] for line in lines]
        groups = [Group(p, tuple(of), sizes=(1,) * len(of)) for p, of in zip(some, whole, strict=True) if of]
        require(bool(groups), f"no draw ends within {MAX_NEW_TOKENS} tokens: PPO needs a reference that says answers")
        data = PackedData(groups, pad, 360)
        passes = np.array_split(np.arange(len(data)), config.passes)
        with torch.no_grad(), autocast(device, dtype):
            parts = [look(model, reference, paid, data.batch(rows).to(device), config) for rows in passes]
        drawn, told = Drawn(*map(torch.cat, zip(*(part[0] for part in parts), strict=True))), [p[1] for p in parts]
        objective, tokens = PPO(data, drawn, config), 0
        for _ in range(config.epochs):
            for i in rng.permutation(config.passes):
                batch = data.batch(passes[i])
                scale = schedule(config, step, steps)
                metrics = update(model, optimizer, objective, [(passes[i], batch)], dtype, scale)
                tokens += int((batch.group >= 0).sum())
                step += 1
        count = sum(map(len, whole))
        totals = {name: sum(of[name] for of in told) / count for name in told[0]}
        left_out = len(some) * config.draws - count
        yield {**totals, "value_error": metrics["value_error"], "left_out": left_out, "tokens": tokens}


def look(model: Headed, reference: GPT, paid: Paid, batch: Batch, config: PPOConfig) -> tuple[Drawn, dict]:
    """What a batch of draws is worth; and sums over its responses: the reward, and the price of leaving pi_ref."""
    logps, value = policy_and_value(model, batch)
    reward, ratio = paid(batch), implicit_reward(logps, token_logps(reference, batch), config.beta)
    first, _ = ends(batch)
    start = first.nonzero()[:, 0]
    place = torch.arange(len(first), device=first.device) - start[batch.response]
    shape = (int(place.max()) + 2, len(start))  # token by token, all responses at once
    table = lambda of: of.new_zeros(shape).index_put((place, batch.response), of)  # noqa: E731
    advantage = gae(table(reward - ratio)[:-1], table(value), config.lam)[place, batch.response]
    sums = {"reward": reward.sum().item(), "price": ratio.sum().item()}
    return Drawn(logps.cpu(), advantage.cpu(), (value + advantage).cpu()), sums


def paid_at_the_end(head: Headed) -> Paid:
    """All of what an explicit reward model says of a response, at its last token."""

    def paid(batch: Batch) -> Tensor:
        last = ends(batch)[1]
        reward = torch.zeros(len(last), device=last.device)
        return reward.masked_scatter(last, head.numbers(batch, batch.source[last] + 1))

    return paid


def paid_by(policy: GPT, reference: GPT, beta: float) -> Paid:
    """The implicit reward of another policy at every token, as RTO pays DPO's (arXiv 2404.18922)."""
    return lambda batch: implicit_reward(token_logps(policy, batch), token_logps(reference, batch), beta)


def paid_truly(world: World, tokenizer: Tokenizer) -> Paid:
    """What the world pays for a response, at its last token; off the grammar, where nothing is known, OFF."""

    def paid(batch: Batch) -> Tensor:
        first, last = ends(batch)
        reward = torch.zeros(len(last))
        starts, stops = first.nonzero()[:, 0].tolist(), last.nonzero()[:, 0].tolist()
        for start, stop in zip(starts, stops, strict=True):
            row = int(batch.source[start]) // batch.tokens.shape[1]
            own = (batch.group[row] == batch.group.flatten()[batch.source[start]]) & (batch.branch[row] == 0)
            post = read_post(tokenizer.decode(batch.tokens[row][own].tolist()))
            total = world.judge_tokens(post, batch.target[start : stop + 1].tolist()).total
            reward[stop] = OFF if total != total else total
        return reward

    return paid
