"""The league's numbers: every method trained and measured, and what is asked of the trained ones afterwards."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor

from minqstar.lab.findings.lab import Lab
from minqstar.lab.league.measure import Rewards, Truth, implicit, policy_figures
from minqstar.lab.league.methods import METHODS, SIMPO_BETA, Material, train
from minqstar.lab.league.objectives import Headed, prefix_numbers, token_credit
from minqstar.lab.league.ppo import Paid, paid_at_the_end, paid_by, paid_truly
from minqstar.lm.model import GPT
from minqstar.training.checkpoint import Run, save_tensors
from minqstar.training.data import Group, PackedData
from minqstar.training.scoring import by_group, score_groups

GOAL = 0.85  # r² that ends "time to credit"


@dataclass(frozen=True)
class Size:
    """How much of the league is run."""

    seeds: int
    rounds: int  # of PPO
    looks: int  # at the credit during training
    watched: int  # held-out pairs that these look at


SIZES = {False: Size(3, 70, 10, 96), True: Size(1, 18, 5, 32)}  # by --quick


class League:
    """The methods, trained where they are not there yet, in the lab's folder."""

    def __init__(self, lab: Lab, quick: bool):
        self.lab, self.size = lab, SIZES[quick]
        self.world, self.beta, self.reference = lab.world, lab.main.beta, lab.main.reference
        kept = 2 * lab.scale.posts
        self.rows, self.posts, self.groups = lab.rows[:kept], lab.posts[:kept], lab.groups[:kept]
        self.truth = Truth(self.world, self.posts, self.groups, self.beta)
        some = self.size.watched
        self.watched = Truth(self.world, self.posts[:some], self.groups[:some], self.beta)
        self.material = cache(lambda seed: Material(lab, lab.scale.study_pairs, seed))

    # training

    def model(self, name: str, seed: int) -> GPT:
        """A trained method's model."""
        self.entry(name, seed)
        weights = load_file(self.lab.folder / f"league_{name}_{seed}.safetensors")
        headed = "head.weight" in weights
        model = Headed(self.reference.config) if headed else GPT(self.reference.config)
        model.load_state_dict(weights)
        return model.eval()

    def entry(self, name: str, seed: int) -> dict:
        """All figures of a method, trained and measured once."""
        return self.lab.piece(f"league_{name}_{seed}", lambda: self.make(name, seed))

    def make(self, name: str, seed: int) -> dict:
        method, material = METHODS[name], self.material(seed)
        look = lambda model: self.watched.figures(self.credit(name, model))["r2"]  # noqa: E731
        trained = train(name, material, self.size.rounds, lambda: self.paid(name, seed), look, self.size.looks)
        save_tensors(trained.model.state_dict(), self.lab.folder / f"league_{name}_{seed}.safetensors")
        before = self.entry(method.on, seed)["seconds"] if method.on else 0.0
        figures = self.measure(name, trained.model)
        reached = [seconds for seconds, r2 in trained.course if r2 is not None and r2 >= GOAL]
        times = {"seconds": trained.seconds + before, "to_credit": reached[0] + before if reached else None}
        return {**figures, **times, "course": trained.course}

    def paid(self, name: str, seed: int) -> Paid:
        """What pays a method that draws."""
        if name == "ppo":
            return paid_at_the_end(self.model("reward_head", seed))
        if name == "rto":
            return paid_by(self.model("dpo", seed), self.reference, self.beta)
        return paid_truly(self.world, self.lab.main.tokenizer)

    # measuring

    def run(self, model: GPT) -> Run:
        return replace(self.lab.main, model=model)

    def credit(self, name: str, model: GPT) -> Rewards:
        """A method's own token rewards, reward units."""
        match METHODS[name].credit:
            case "head":
                return lambda groups: head_credit(model, groups, self.lab.main.tokenizer.pad)
            case "ratio":
                return implicit(self.run(model))
        mean = METHODS[name].credit == "mean"  # SimPO's

        def rewards(groups: list[Group]) -> list[list[Tensor]]:
            scored = score_groups(model, groups, self.lab.main.tokenizer.pad)
            return [[(SIMPO_BETA / len(of) if mean else self.beta) * of for of in line] for line in scored]

        return rewards

    def measure(self, name: str, model: GPT) -> dict:
        figures = {"credit": self.truth.figures(self.credit(name, model))}
        if METHODS[name].credit == "head":
            return figures
        if METHODS[name].credit != "ratio":  # its policy against the reference, beside its own reward
            figures["ratio"] = self.truth.figures(implicit(self.run(model)))
        policy = policy_figures(self.run(model), self.rows, self.world, self.posts, self.groups)
        return figures | {"policy": policy}


def head_credit(head: Headed, groups: list[Group], pad: int) -> list[list[Tensor]]:
    """The differences of a head's numbers along the prefixes of every response."""
    data, found = PackedData(groups, pad, 256), []
    with torch.no_grad():
        for batch in data.batches(range(len(data)), 16):
            found.append(token_credit(*prefix_numbers(head, batch), batch))
    return by_group(torch.cat(found), data, groups)
