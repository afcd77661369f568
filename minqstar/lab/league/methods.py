"""The methods of the league: from one SFT run, on the same posts, each with its loss and its token reward."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from minqstar.lab.findings.lab import PAIRS, Lab
from minqstar.lab.findings.likelihoods import CPL
from minqstar.lab.league.objectives import KTO, TDPO, Headed, OfSums, Residual, RewardHead, noisy_returns
from minqstar.lab.league.ppo import Paid, PPOConfig, ppo
from minqstar.lm.model import GPT
from minqstar.theory.methods import ipo, simpo
from minqstar.training.data import PackedData, tokenize
from minqstar.training.scoring import ReferenceCache
from minqstar.training.trainer import DPO, DPOConfig, Objective, Trainer, plan
from minqstar.world.posts import read_post
from minqstar.world.tldr import draw_rows

IPO_BETA = 0.125  # nats: a preference P has the slope 1/4 in R at 1/2, so R moves log pi as much as with beta 0.5
SIMPO_BETA, SIMPO_GAMMA = 14.0, 0.5  # 28 tokens a response: a token weighs as much as with beta 0.5
SFT_WEIGHT, TDPO_ALPHA = 1.0, 0.5
HEAD = {"lr": 0.005, "adam_lr": 0.02}  # the best of six pairs of rates, by held-out pairs in the right order


CREDITS = {  # what a method's token reward is, and what the method leaves open
    "ratio": ("beta log(pi/pi_ref)", "nothing: the gauge V = 0, as A* has it"),
    "log_pi": ("beta log pi", "a shaping: a reward of the same class in another gauge"),
    "mean": ("beta log pi / |y|", "no sum of rewards: each token's depends on how long the response becomes"),
    "head": ("v(s') - v(s), v the head's number", "v of unfinished prefixes, which no label touches"),
}


class Material:
    """What all methods of one seed learn from: its preferences, and the reference's log-probs on them."""

    def __init__(self, lab: Lab, pairs: int, seed: int):
        self.lab, self.pairs_drawn, self.seed = lab, pairs, seed
        self.beta, self.reference = lab.main.beta, lab.main.reference
        self.caches: dict[str, tuple[ReferenceCache, float]] = {}

    def packed(self, ranked: int) -> PackedData:
        rows = draw_rows(self.lab.world, replace(PAIRS, pairs=self.pairs_drawn, seed=self.seed, ranked=ranked), "train")
        groups, _ = tokenize(rows, self.lab.main.tokenizer, self.reference.config.block_size)
        return PackedData(groups, self.lab.main.tokenizer.pad, DPOConfig().row_length)

    @cached_property
    def pairs(self) -> PackedData:
        return self.packed(2)

    @cached_property
    def rankings(self) -> PackedData:
        return self.packed(4)

    def cache(self, kind: str) -> ReferenceCache:
        """The reference's log-probs of the pairs or of the rankings, in the passes of training; and the seconds."""
        if kind not in self.caches:
            data, session = getattr(self, kind), self.lab.session
            passes = plan(data, DPOConfig(), self.seed).visited()
            with session.progress("reference", sum(map(len, passes))) as advance:
                started = time.perf_counter()
                cache = ReferenceCache(self.reference, data, session.dtype, passes, advance)
                self.caches[kind] = cache, time.perf_counter() - started
        return self.caches[kind][0]

    def residual(self, steps: bool) -> Residual:
        """A regression on true rewards with noise, of whole responses or of steps."""
        data, world, tokenizer = self.pairs, self.lab.world, self.lab.main.tokenizer
        groups = [data.groups[int(g)] for g in data.order]
        posts = [read_post(tokenizer.decode(group.prompt)) for group in groups for _ in group.responses]
        exact = world.exact_all(posts, [response for group in groups for response in group.responses], self.beta)
        true = torch.cat([one.reward for one in exact]).float()
        rewards, returns = noisy_returns(true, data, np.random.default_rng([self.seed, 7]))
        return Residual(self.reference, self.beta, data, rewards, None if steps else returns)

    def prompts(self) -> list[list[int]]:
        return [group.prompt for group in self.pairs.groups]


class Method(NamedTuple):
    loss: str  # in words, with its paper
    credit: str  # a key of CREDITS
    objective: Callable[[Material], Objective] | None  # None for those that draw
    kind: str = "pairs"  # what it learns from: a name of `Material`
    config: dict | None = None  # where its training differs from DPO's
    on: str = ""  # the method whose result it is paid by
    cached: bool = False  # whether it reads the reference's log-probs from their cache, which takes its time

    def said(self) -> dict:
        reward, leaves_open = CREDITS[self.credit]
        return {"loss": self.loss, "token_reward": reward, "leaves_open": leaves_open}


METHODS = {
    "dpo": Method("DPO on pairs (2404.12358, Eq. 8)", "ratio", lambda m: DPO(m.cache("pairs"), m.beta), cached=True),
    "plackett_luce": Method(
        "DPO on rankings of four (Plackett-Luce)", "ratio", lambda m: DPO(m.cache("rankings"), m.beta), "rankings",
        cached=True,
    ),
    "rpo": Method(
        f"DPO + {SFT_WEIGHT:g} NLL of the chosen a token (RPO, 2404.19733)", "ratio",
        lambda m: DPO(m.cache("pairs"), m.beta, SFT_WEIGHT), cached=True,
    ),
    "ipo": Method(
        f"IPO, beta {IPO_BETA:g} (2310.12036)", "ratio",
        lambda m: OfSums(m.cache("pairs"), lambda pi, ref, _: ipo(pi, ref, IPO_BETA)), cached=True,
    ),
    "tdpo": Method(
        f"TDPO2, alpha {TDPO_ALPHA:g} (2404.11999)", "ratio", lambda m: TDPO(m.reference, m.beta, TDPO_ALPHA)
    ),
    "kto": Method("KTO, labels of single responses (2402.01306)", "ratio", lambda m: KTO(m.reference, m.beta)),
    "simpo": Method(
        f"SimPO, beta {SIMPO_BETA:g}, gamma {SIMPO_GAMMA:g}: a mean, no reference (2405.14734)", "mean",
        lambda m: OfSums(None, lambda pi, _, length: simpo(pi, length, SIMPO_BETA, SIMPO_GAMMA)),
    ),
    "cpl": Method("CPL: DPO without a reference (2310.13639)", "log_pi", lambda m: CPL(m.beta)),
    "tbrm": Method("TBRM: noisy true returns, whole paths (2505.15311)", "ratio", lambda m: m.residual(steps=False)),
    "step": Method("Eq. 10 on noisy true rewards of single steps", "ratio", lambda m: m.residual(steps=True)),
    "reward_head": Method("Bradley-Terry on a head's numbers (Eq. 1)", "head", lambda m: RewardHead(), config=HEAD),
    "ppo": Method("PPO on that head's returns (1707.06347)", "ratio", None, on="reward_head"),
    "rto": Method("RTO: PPO on DPO's token rewards (2404.18922)", "ratio", None, on="dpo"),
    "ppo_true": Method("PPO on the true returns", "ratio", None),
}  # fmt: skip


@dataclass
class Trained:
    """A trained model, the seconds it took (of the reference's pass too), and its course: [seconds, figure]."""

    model: GPT
    seconds: float
    course: list[list[float]]


def steps_of(name: str, m: Material, rounds: int, paid: Callable[[], Paid]) -> tuple[GPT, int, Iterator[dict]]:
    """The model that a method trains, how many steps it makes, and these."""
    method, session = METHODS[name], m.lab.session
    headed = method.credit == "head" or method.objective is None
    model = Headed.like(m.reference) if headed else copy.deepcopy(m.reference)
    if method.objective:
        config = DPOConfig(beta=m.beta, **(method.config or {}))
        trainer = Trainer(model, getattr(m, method.kind), config, method.objective(m), session.dtype, m.seed)
        return model, trainer.steps, trainer.run()
    config = PPOConfig(rounds=rounds, beta=m.beta)
    tokenizer = m.lab.main.tokenizer
    what = (model, m.reference, paid(), m.prompts(), tokenizer.ends, tokenizer.pad, config, session.dtype, m.seed)
    return model, rounds, ppo(*what)


def train(
    name: str, m: Material, rounds: int, paid: Callable[[], Paid], look: Callable[[GPT], float], looks: int
) -> Trained:
    """Train, and `look` at the model so many times; the clock stands still while it does."""
    model, steps, run = steps_of(name, m, rounds, paid)
    seconds, course = m.caches[METHODS[name].kind][1] if METHODS[name].cached else 0.0, []
    with m.lab.session.progress(name, steps) as advance:
        for step in range(1, steps + 1):
            started = time.perf_counter()
            metrics = next(run)
            seconds += time.perf_counter() - started
            if step == steps or step % max(1, steps // looks) == 0:
                model.eval()
                course.append([seconds, look(model)])
                model.train()
            advance(note=f"loss {metrics['loss']:.3f}" if "loss" in metrics else f"reward {metrics['reward']:.2f}")
    return Trained(model.eval(), seconds, course)
