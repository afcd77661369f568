"""Where it goes: which tokens gain the probability that answers lose during training.

Along the held-out answers policy and reference differ in every state (a prefix of an answer). Where the taken token is
less likely under the policy, the mass that it lost is divided among the tokens that gained there, in proportion to
their gains. Training on pairs may move mass to what was likely already, right or wrong (the squeezing effect,
arXiv 2407.10490), and lower the chosen answers too (likelihood displacement, arXiv 2410.08847). Here every token's
exact A* is known. Token a is *better* than the taken token b if A*(s,a) > A*(s,b); the exact pi* gains nowhere else.
The exact pi* gains most where pi_ref was likeliest, too: the squeeze to blame is that to a likeliest token which is
not better.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from minqstar.errors import require
from minqstar.lab.findings.drawing import BLUE, GREEN, GREY, ORANGE, RED, label, panels, styled
from minqstar.lab.findings.lab import ROWS, chunks, log_policies
from minqstar.lm.model import GPT
from minqstar.theory.mdp import implicit_rewards, solve
from minqstar.training.groups import Group
from minqstar.world.posts import Post
from minqstar.world.tldr import World

PLACES = {  # where mass may go: to the token that pi_ref held likeliest, or to others; better, not better, or neither
    "likeliest, better": GREEN,
    "others, better": BLUE,
    "likeliest, not better": RED,
    "others, not better": ORANGE,
    "off the grammar": GREY,
}
EQUAL = 1e-9  # reward units: exact values that differ by less are equal
TINY = torch.finfo(torch.float64).tiny


def figures(
    policy: GPT, reference: GPT, world: World, posts: list[Post], groups: Sequence[Group], beta: float
) -> dict[str, dict]:
    """Of the chosen and of the rejected answers of pairs, which the grammar can say, means over answers.

    `log_change`: of log pi of the answer, nats. `lost`: the sum over its tokens of max(0, pi_ref - pi). `shares`: of
    all that was lost, the part that went to each of PLACES; they sum to 1, and are 0 if nothing was lost.
    """

    def logs(prompts: list[list[int]], responses: list[list[int]], _: Tensor, __: Tensor) -> tuple[Tensor, Tensor]:
        both = (log_policies(model, prompts, responses).double() for model in (policy, reference))
        return tuple(of.log_softmax(-1) for of in both)  # sums to 1 in float64

    return measured(logs, world, posts, groups, beta)


def optimum(world: World, posts: list[Post], groups: Sequence[Group], beta: float) -> dict[str, dict]:
    """The same figures of the exact pi* beside the grammar's own pi_ref: what a perfect learner does."""
    return measured(lambda _, __, A_star, log_ref: (log_ref + A_star / beta, log_ref), world, posts, groups, beta)


def measured(logs: Callable, world: World, posts: list[Post], groups: Sequence[Group], beta: float) -> dict[str, dict]:
    """`figures` of two policies; `logs` says their log pi and log pi_ref (N, V) along some answers."""
    found = {}
    for place, side in enumerate(("chosen", "rejected")):
        change, lost, went = 0.0, 0.0, torch.zeros(len(PLACES), dtype=torch.float64)
        for some in chunks(list(zip(posts, groups, strict=True)), ROWS):
            prompts, responses = [g.prompt for _, g in some], [g.responses[place] for _, g in some]
            A_star, log_ref = exact(world, [post for post, _ in some], responses, beta)
            taken = torch.tensor([token for response in responses for token in response])
            log_ratio, mass, to = moved(*logs(prompts, responses, A_star, log_ref), taken, A_star)
            change, lost, went = change + log_ratio.sum().item(), lost + mass.sum().item(), went + to.sum(0)
        shares = (went / went.sum().clamp(min=TINY)).tolist()
        found[side] = {
            "log_change": change / len(groups),
            "lost": lost / len(groups),
            "shares": dict(zip(PLACES, shares, strict=True)),
        }
    return found


def moved(log_pi: Tensor, log_ref: Tensor, taken: Tensor, A_star: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of N states the change of log pi of the taken token (N,), nats, the mass it lost (N,), and where that went.

    log_pi, log_ref and A_star (-inf off the grammar) are (N, V), float64; `taken` (N,) are tokens. The last
    answer is (N, PLACES); it sums to the mass lost.
    """
    state = torch.arange(len(taken))
    gain = log_pi.exp() - log_ref.exp()
    lost = (-gain[state, taken]).clamp(min=0)
    gain = gain.clamp(min=0)
    received = gain * (lost / gain.sum(-1).clamp(min=TINY))[:, None]
    likeliest = torch.zeros_like(gain, dtype=torch.bool)
    likeliest[state, log_ref.argmax(-1)] = True
    better = A_star > A_star[state, taken][:, None] + EQUAL
    said = A_star > -torch.inf
    where = (likeliest & better, ~likeliest & better, likeliest & said & ~better, ~likeliest & said & ~better, ~said)
    log_ratio = log_pi[state, taken] - log_ref[state, taken]
    return log_ratio, lost, torch.stack([(received * of).sum(-1) for of in where], -1)


def exact(world: World, posts: list[Post], responses: list[list[int]], beta: float) -> tuple[Tensor, Tensor]:
    """A*, reward units, and log pi_ref, nats, of all tokens in each state along some responses; -inf off the grammar.

    Both are (N, V). UserError if a response, one to each post, leaves the grammar.
    """
    starts = np.cumsum([0, *map(len, responses)])
    of_A, of_ref = torch.full((2, starts[-1], world.tokenizer.n_vocab), -torch.inf, dtype=torch.float64)
    for automaton, places, mdp in world.tables(posts):
        A_star = implicit_rewards(mdp, solve(mdp, beta), beta)
        for row, place in enumerate(places):
            states, _ = automaton.walk(responses[place])
            require(len(states) == len(responses[place]), f"response {place} leaves the grammar: it has no exact A*")
            at, action = (mdp.token[states] >= 0).nonzero(as_tuple=True)
            cells = starts[place] + at, mdp.token[states][at, action]
            of_A[cells], of_ref[cells] = (table[row, states][at, action] for table in (A_star, mdp.log_ref))
    return of_A, of_ref


@styled
def draw(results: dict[str, dict]):
    """Of each method a bar for chosen and one for rejected answers: where the lost mass went; `results` by method."""
    message = "Lost probability goes to the likeliest token, which is better; without a reference to worse ones"
    figure, (line,) = panels(message, 2, height=1.3 + 0.3 * len(results), sharex=True)
    for axis, side in zip(line, ("chosen", "rejected"), strict=True):
        left = np.zeros(len(results))
        for name, colour in PLACES.items():
            share = np.array([of[side]["shares"][name] for of in results.values()])
            axis.barh(range(len(results)), share, left=left, color=colour, label=name)
            left += share
        words = [f"{name} ({of[side]['log_change']:+.2f})" for name, of in results.items()]
        axis.set_yticks(range(len(results)), words)
        axis.invert_yaxis()
        label(axis, f"{side} answers (change of log π, nats)", "share of the mass lost", "")
    figure.legend(*line[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PLACES))
    return figure
