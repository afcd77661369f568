"""Where each method of the league goes with all data: exact population losses on small tables, no sampling.

Pairs are drawn from pi_ref and labelled by Bradley-Terry on the true returns. A policy is a table of logits (S, A).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minqstar.lab.league.methods import IPO_BETA, SFT_WEIGHT, SIMPO_GAMMA, TDPO_ALPHA
from minqstar.theory import methods
from minqstar.theory.cases import without_reference
from minqstar.theory.losses import plackett_luce
from minqstar.theory.mdp import TokenMDP, solve, tree, visits
from minqstar.theory.paths import responses
from minqstar.theory.tabular import Population, fit, minimise, rankings

BETA = 0.5  # reward units a nat
SIMPO_BETA = 2.0  # responses are short here


def small_table(horizon: int, seed: int) -> TokenMDP:
    """Strings of two tokens and EOS, with normal rewards and reference logits."""
    (token, next), generator = tree(2, horizon), torch.Generator().manual_seed(seed)
    logits, reward = (torch.randn(token.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return TokenMDP(token, next, logits.masked_fill(token < 0, -torch.inf).log_softmax(-1), reward)


def descend(loss: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 50) -> Tensor:
    found = start.clone().requires_grad_()
    list(minimise(lambda: loss(found), found, iterations))
    return found.detach()


class Table:
    """An MDP with its N responses."""

    def __init__(self, mdp: TokenMDP):
        self.mdp, self.paths = mdp, responses(mdp)
        self.log_ref, self.returns = (self.paths.along(values).sum(-1) for values in (mdp.log_ref, mdp.reward))
        self.length, self.drawn = self.paths.scored.sum(-1), self.log_ref.exp()
        self.wins = torch.sigmoid(self.returns[:, None] - self.returns) * self.drawn  # (N, N): over a draw of pi_ref
        self.start = torch.where(mdp.support, mdp.log_ref, 0.0)

    def log_pi(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(~self.mdp.support, -torch.inf).log_softmax(-1)

    def sums(self, logits: Tensor) -> Tensor:
        """log pi(y) (N,)."""
        return self.paths.along(torch.where(self.mdp.support, self.log_pi(logits), 0.0)).sum(-1)

    def scored_by(self, second: Callable[[Tensor], Tensor]) -> Population:
        """Pairs with two scores (N, 2) a response: the implicit return, and a function of it."""
        both = lambda returns: torch.stack((returns, second(returns)), dim=-1)  # noqa: E731
        return rankings(self.mdp)._replace(score=lambda rewards: both(self.paths.along(rewards).sum(-1)))

    def settle(self, loss: Callable[[Tensor, Tensor], Tensor], held: Callable[[Tensor], Tensor]) -> Tensor:
        """Where a loss that sees `held` of the policy without a gradient moves no more: each descent holds it still."""
        logits = self.start
        for _ in range(30):
            still = held(logits)
            logits = descend(lambda moving, still=still: loss(moving, still), logits, 3)
        return self.log_pi(logits)


def ipo(t: Table) -> Tensor:
    loss = lambda s: methods.ipo(s.flatten() / BETA, torch.zeros(s.numel()), IPO_BETA)  # noqa: E731
    return fit(t.mdp, BETA, 50, likelihood=lambda s: -loss(s)).log_pi


def rpo(t: Table) -> Tensor:
    pairs = t.scored_by(lambda returns: (returns / BETA + t.log_ref) / t.length)  # log pi, nats a token
    return fit(t.mdp, BETA, 50, pairs, lambda s: plackett_luce(s[..., 0]) + SFT_WEIGHT * s[..., 0, 1]).log_pi


def simpo(t: Table, gamma: float = SIMPO_GAMMA) -> Tensor:
    pairs = t.scored_by(lambda returns: t.length)
    loss = lambda s: methods.simpo(s[..., 0].flatten() / SIMPO_BETA, s[..., 1].flatten(), SIMPO_BETA, gamma)  # noqa: E731
    return fit(without_reference(t.mdp), SIMPO_BETA, 50, pairs, lambda s: -loss(s)).log_pi


def tdpo(t: Table) -> Tensor:
    first, second = torch.cartesian_prod(*[torch.arange(len(t.length))] * 2).T
    weight = (t.drawn[:, None] * t.wins).flatten()
    mix = lambda chosen, rejected: torch.stack((chosen[first], rejected[second]), dim=-1).flatten()  # noqa: E731

    def kl(logits: Tensor) -> Tensor:
        moved = torch.where(t.mdp.support, t.mdp.log_ref - t.log_pi(logits), 0.0)
        of_state = (t.mdp.log_ref.exp() * moved).sum(-1, keepdim=True)
        return t.paths.along(of_state.expand_as(moved)).sum(-1)

    def loss(logits: Tensor, still: Tensor) -> Tensor:
        log_pi, ref = t.sums(logits), mix(t.log_ref, t.log_ref)
        return (weight * methods.tdpo(mix(log_pi, log_pi), ref, mix(still, kl(logits)), BETA, TDPO_ALPHA)).sum()

    return t.settle(loss, kl)


def kto(t: Table) -> Tensor:
    desirable, both = t.wins.sum(-1), torch.tensor([[True], [False]])

    def loss(logits: Tensor, still: Tensor) -> Tensor:
        good, bad = methods.kto(t.sums(logits), t.log_ref, both, BETA, still)
        return (t.drawn * (desirable * good + (1 - desirable) * bad)).sum()

    return t.settle(loss, lambda logits: BETA * (t.sums(logits).exp() * (t.sums(logits) - t.log_ref)).sum())


def tbrm(t: Table) -> Tensor:
    noisy = torch.stack((t.returns - 1, t.returns + 1))  # each half of the time

    def loss(logits: Tensor) -> Tensor:
        value = BETA * logits[0].logsumexp(-1)
        return (t.drawn / 2 * methods.whole_path_residual(t.sums(logits), t.log_ref, value, noisy, BETA)).sum()

    return t.log_pi(descend(loss, t.start))


def step(t: Table) -> Tensor:
    on = t.mdp.support

    def loss(logits: Tensor) -> Tensor:
        V = F.pad(BETA * logits.masked_fill(~on, -torch.inf).logsumexp(-1), (0, 1))
        known = t.mdp.log_ref[on], V[:-1, None].expand_as(on)[on], V[t.mdp.next][on], t.mdp.reward[on]
        return (visits(t.mdp, t.mdp.log_ref)[on] * methods.step_residual(t.log_pi(logits)[on], *known, BETA)).sum()

    return t.log_pi(descend(loss, t.start))


def with_reward_model(t: Table) -> TokenMDP:
    """Bradley-Terry's reward of whole responses, fitted to all pairs, paid at EOS."""
    weight, last = t.drawn[:, None] * t.wins, (torch.arange(len(t.length)), t.length - 1)
    R = descend(lambda R: -(weight * F.logsigmoid(R[:, None] - R)).sum(), torch.zeros_like(t.returns))
    at = t.paths.states[last], t.paths.actions[last]
    return replace(t.mdp, reward=torch.zeros_like(t.mdp.reward).index_put(at, R))


def ppo(t: Table) -> Tensor:
    R = t.paths.along(with_reward_model(t).reward).sum(-1)
    penalised = lambda log_pi: (log_pi.exp() * (R - BETA * (log_pi - t.log_ref))).sum()  # noqa: E731
    return t.log_pi(descend(lambda logits: -penalised(t.sums(logits)), t.start))


LIMITS: dict[str, tuple[Callable[[Table], Tensor], str]] = {
    "dpo": (lambda t: fit(t.mdp, BETA, 50).log_pi, "pi*"),
    "plackett_luce": (lambda t: fit(t.mdp, BETA, 50, rankings(t.mdp, 4)).log_pi, "pi*"),
    "rpo": (rpo, "off pi*, towards the law of the chosen, each weighed by 1/|y|: no closed form"),
    "ipo": (ipo, "pi_ref exp(P/beta)/Z, P(y) the probability that y beats a draw from pi_ref"),
    "tdpo": (tdpo, "off pi*, towards pi_ref: no closed form"),
    "kto": (kto, "no minimum: what wins less than half of the time goes to probability 0"),
    "simpo": (simpo, "exp(|y| (R + c)/beta) if gamma is 0; gamma stretches the margins further: no closed form"),
    "cpl": (
        lambda t: fit(without_reference(t.mdp), BETA, 50, rankings(t.mdp)).log_pi,
        "exp(R/beta)/Z: pi* if pi_ref were uniform over whole responses",
    ),
    "tbrm": (tbrm, "pi*, whatever noise of mean 0 the returns have"),
    "step": (step, "pi*"),
    "reward_head": (lambda t: solve(with_reward_model(t), BETA).log_pi, "R + c, whose soft optimum is pi*"),
    "ppo": (ppo, "pi*: the optimum of the fitted reward R + c"),
    "rto": (lambda t: solve(replace(t.mdp, reward=fit(t.mdp, BETA, 50).rewards), BETA).log_pi, "DPO's policy: pi*"),
}


def limits(tables: list[TokenMDP] | None = None) -> dict[str, dict]:
    """For each method `gap`, the largest |pi - pi*| in any state of any table, and `goes_to`, in words."""
    tables = [Table(mdp) for mdp in tables or [small_table(1, 0), small_table(2, 0), small_table(2, 1)]]
    exact = [solve(t.mdp, BETA).log_pi.exp() for t in tables]
    return {
        name: {
            "gap": max((found(t).exp() - pi).abs().max().item() for t, pi in zip(tables, exact, strict=True)),
            "goes_to": words,
        }
        for name, (found, words) in LIMITS.items()
    }
