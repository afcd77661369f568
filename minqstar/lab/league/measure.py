"""What a method's token rewards, and its policy, are worth beside the exact optimum; held-out posts throughout."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from minqstar.evaluate import MAX_NEW_TOKENS, evaluate, gap_figures
from minqstar.lab.findings.credit import auroc, fact_tokens
from minqstar.lab.findings.lab import ROWS, chunks
from minqstar.search.decode import decode, sampler
from minqstar.search.evaluator import Network
from minqstar.theory.qfunction import implicit_reward
from minqstar.training.checkpoint import Run
from minqstar.training.data import Group
from minqstar.training.scoring import score_groups
from minqstar.world.automaton import CLASSES
from minqstar.world.posts import Post
from minqstar.world.tldr import World

Rewards = Callable[[Sequence[Group]], list[list[Tensor]]]  # of each group's responses the token rewards, reward units
DRAWS = 4  # of a post, for the spread


def implicit(run_: Run) -> Rewards:
    """beta log(pi/pi_ref) of a run's policy and reference."""

    def rewards(groups: Sequence[Group]) -> list[list[Tensor]]:
        both = (score_groups(model, groups, run_.tokenizer.pad) for model in (run_.model, run_.reference))
        return [[implicit_reward(p, r, run_.beta) for p, r in zip(*of, strict=True)] for of in zip(*both, strict=True)]

    return rewards


class Truth:
    """The exact A* of pairs' tokens, reward units, with what each token decides; in the order of the pairs."""

    def __init__(self, world: World, posts: list[Post], groups: Sequence[Group], beta: float):
        self.groups = groups
        sides = [world.exact_all(posts, [group.responses[side] for group in groups], beta) for side in (0, 1)]
        exact = [one for pair in zip(*sides, strict=True) for one in pair]
        self.A = np.concatenate([one.advantage for one in exact])
        self.kinds = np.concatenate([one.kind for one in exact])
        self.returns = np.array([one.reward.sum() for one in exact]).reshape(-1, 2)
        self.decisive, self.others = fact_tokens(world, posts, groups)

    def figures(self, rewards: Rewards) -> dict:
        """How near token rewards come to A*, by class too, before and after the best single scale is taken out.

        `return_correlation` compares whole responses, chosen less rejected: no shaping changes that. `spread` is the
        standard deviation of penalised returns, R less the learned return, of one prompt's draws of pi_ref. At pi*
        each is V*(s_0) (Eq. 10, summed), and nowhere else: a certificate that needs the rewards, and no oracle.
        """
        found = [tensor.double().numpy() for group in rewards(self.groups) for tensor in group]
        learned, returns = np.concatenate(found), np.array([of.sum() for of in found]).reshape(-1, 2)
        scale = float(learned @ self.A / (learned @ learned)) if learned.any() else 0.0
        of_class = {name: gap_figures(learned[of], self.A[of]) for name in CLASSES if (of := self.kinds == name).any()}
        margin, true_margin = (of[:, 0] - of[:, 1] for of in (returns, self.returns))
        return {
            **gap_figures(learned, self.A),
            "scale": scale,
            "r2_scaled": gap_figures(scale * learned, self.A)["r2"],
            "by_class": {name: {key: of[key] for key in ("r2", "correlation")} for name, of in of_class.items()},
            "auroc": auroc(learned[self.decisive], learned[self.others]),
            "pair_accuracy": float(((margin > 0) + 0.5 * (margin == 0)).mean()),
            "spread": float(np.sqrt(np.mean((true_margin - margin) ** 2) / 2)),
            "return_correlation": float(np.corrcoef(margin, true_margin)[0, 1]) if margin.any() else None,
        }


def policy_figures(run_: Run, rows: list[dict], world: World, posts: list[Post], groups: Sequence[Group]) -> dict:
    """What `evaluate` says of a policy, and the spread of its penalised returns."""
    figures = evaluate(run_, rows)
    return figures | own_spread(run_, world, posts, [group.prompt for group in groups])


def own_spread(run_: Run, world: World, posts: list[Post], prompts: list[list[int]], seed: int = 0) -> dict:
    """The standard deviation within a prompt of penalised returns R - beta log(pi/pi_ref), over draws of pi itself.

    It is 0 at pi*, but also of a policy that always says the same: PPO sees no other draws. Draws off the grammar have
    no return and are left out.
    """
    choose, ends = sampler(torch.Generator().manual_seed(seed)), run_.tokenizer.ends
    drawn = [
        [draw.tokens for draw in line]
        for some in chunks(prompts, ROWS)
        for line in decode(Network(run_.model), some, ends, MAX_NEW_TOKENS, choose, DRAWS)
    ]
    groups = [Group(prompt, tuple(of), sizes=(1,) * len(of)) for prompt, of in zip(prompts, drawn, strict=True)]
    variances, left = [], 0
    for post, group, rewards in zip(posts, groups, implicit(run_)(groups), strict=True):
        both = zip(group.responses, rewards, strict=True)
        returns = [world.judge_tokens(post, ids).total - of.sum().item() for ids, of in both]
        kept = [value for value in returns if value == value]
        left += len(returns) - len(kept)
        if len(kept) > 1:
            variances.append(np.var(kept, ddof=1))
    own = float(np.sqrt(np.mean(variances))) if variances else None
    return {"own_spread": own, "left_out": left / (DRAWS * len(prompts))}
