"""Where each method of the league goes with all data: exact population losses on small tables, no sampling.

Pairs are drawn from pi_ref and labelled by Bradley-Terry on the true returns. A policy is a table of logits (S, A).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minqstar.theory import methods
from minqstar.theory.cases import without_reference
from minqstar.theory.losses import plackett_luce
from minqstar.theory.mdp import TokenMDP, solve, tree, visits
from minqstar.theory.paths import responses
from minqstar.theory.tabular import fit, rankings

BETA = 0.5  # reward units a nat
SFT_WEIGHT, TDPO_ALPHA, SIMPO_BETA, SIMPO_GAMMA = 0.2, 0.5, 2.0, 0.5


def small_table(horizon: int, seed: int) -> TokenMDP:
    """Strings of two tokens and EOS, with normal rewards and reference logits."""
    (token, next), generator = tree(2, horizon), torch.Generator().manual_seed(seed)
    logits, reward = (torch.randn(token.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return TokenMDP(token, next, logits.masked_fill(token < 0, -torch.inf).log_softmax(-1), reward)


def descend(loss: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> Tensor:
    """Where L-BFGS gets from `start`."""
    found = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [found], max_iter=20, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def step() -> Tensor:
        search.zero_grad()
        value = loss(found)
        value.backward()
        return value

    for _ in range(iterations):
        search.step(step)
    return found.detach()


@dataclass
class Table:
    """An MDP with its N responses."""

    mdp: TokenMDP

    def __post_init__(self):
        self.paths = responses(self.mdp)
        self.log_ref, self.returns = (self.paths.along(t).sum(-1) for t in (self.mdp.log_ref, self.mdp.reward))
        self.length = self.paths.scored.sum(-1)
        self.drawn = self.log_ref.exp()
        self.better = torch.sigmoid(self.returns[:, None] - self.returns)  # (N, N): the first beats the second
        self.start = torch.where(self.mdp.support, self.mdp.log_ref, 0.0)

    def log_pi(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(~self.mdp.support, -torch.inf).log_softmax(-1)

    def sums(self, logits: Tensor) -> Tensor:
        """log pi(y) (N,)."""
        return self.paths.along(torch.where(self.mdp.support, self.log_pi(logits), 0.0)).sum(-1)

    def settle(self, loss: Callable[[Tensor, Tensor], Tensor], held: Callable[[Tensor], Tensor]) -> Tensor:
        """log pi where a loss that sees `held` of the policy without its gradient moves no more."""
        logits = self.start
        for _ in range(30):
            still = held(logits)
            logits = descend(lambda moving, still=still: loss(moving, still), logits, 3)
        return self.log_pi(logits)

    def fit(self, *population, mdp: TokenMDP | None = None, beta: float = BETA, **options) -> Tensor:
        return fit(mdp or self.mdp, beta, 50, *population, **options).log_pi


def rpo(t: Table) -> Tensor:
    def score(rewards: Tensor) -> Tensor:  # (N, 2): the implicit return, and log pi a token
        returns = t.paths.along(rewards).sum(-1)
        return torch.stack((returns, (returns / BETA + t.log_ref) / t.length), dim=-1)

    weigh = lambda s: plackett_luce(s[..., 0]) + SFT_WEIGHT * s[..., 0, 1]  # noqa: E731
    return t.fit(rankings(t.mdp)._replace(score=score), likelihood=weigh)


def ipo(t: Table) -> Tensor:
    return t.fit(likelihood=lambda s: -methods.ipo(s.flatten() / BETA, torch.zeros(s.numel()), BETA))


def tdpo(t: Table) -> Tensor:
    first, second = torch.cartesian_prod(*[torch.arange(len(t.length))] * 2).T
    weight = (t.drawn[:, None] * t.drawn * t.better).flatten()
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
    desirable = (t.better * t.drawn).sum(-1)
    both = torch.tensor([[True], [False]])

    def loss(logits: Tensor, still: Tensor) -> Tensor:
        good, bad = methods.kto(t.sums(logits), t.log_ref, both, BETA, still)
        return (t.drawn * (desirable * good + (1 - desirable) * bad)).sum()

    return t.settle(loss, lambda logits: BETA * (t.sums(logits).exp() * (t.sums(logits) - t.log_ref)).sum())


def simpo(t: Table) -> Tensor:
    def score(rewards: Tensor) -> Tensor:
        return torch.stack((t.paths.along(rewards).sum(-1) / SIMPO_BETA, t.length), dim=-1)

    loss = lambda s: -methods.simpo(*s.flatten(0, 1).unbind(-1), SIMPO_BETA, SIMPO_GAMMA)  # noqa: E731
    return t.fit(rankings(t.mdp)._replace(score=score), mdp=without_reference(t.mdp), beta=SIMPO_BETA, likelihood=loss)


def tbrm(t: Table) -> Tensor:
    def loss(logits: Tensor) -> Tensor:
        value = BETA * logits[0].logsumexp(-1)
        noisy = torch.stack((t.returns - 1, t.returns + 1))  # each as often
        return (t.drawn * methods.whole_path_residual(t.sums(logits), t.log_ref, value, noisy, BETA)).sum() / 2

    return t.log_pi(descend(loss, t.start, 50))


def step(t: Table) -> Tensor:
    on = t.mdp.support

    def loss(logits: Tensor) -> Tensor:
        V = F.pad(BETA * logits.masked_fill(~on, -torch.inf).logsumexp(-1), (0, 1))
        value, after = V[:-1, None].expand_as(on)[on], V[t.mdp.next][on]
        known = t.mdp.log_ref[on], value, after, t.mdp.reward[on]
        return (visits(t.mdp, t.mdp.log_ref)[on] * methods.step_residual(t.log_pi(logits)[on], *known, BETA)).sum()

    return t.log_pi(descend(loss, t.start, 50))


def with_reward_model(t: Table) -> TokenMDP:
    """Bradley-Terry's reward of whole responses, fitted to all pairs, paid at EOS."""
    weight = t.drawn[:, None] * t.drawn * t.better
    found = descend(lambda R: -(weight * F.logsigmoid(R[:, None] - R)).sum(), torch.zeros_like(t.returns), 50)
    responses, last = torch.arange(len(t.length)), t.length - 1
    at = t.paths.states[responses, last], t.paths.actions[responses, last]
    return replace(t.mdp, reward=torch.zeros_like(t.mdp.reward).index_put(at, found))


def ppo(t: Table) -> Tensor:
    R = t.paths.along(with_reward_model(t).reward).sum(-1)

    def loss(logits: Tensor) -> Tensor:
        log_pi = t.sums(logits)
        return -(log_pi.exp() * (R - BETA * (log_pi - t.log_ref))).sum()

    return t.log_pi(descend(loss, t.start, 50))


METHODS: dict[str, tuple[Callable[[Table], Tensor], str]] = {
    "dpo": (lambda t: t.fit(), "pi*"),
    "plackett_luce": (lambda t: t.fit(rankings(t.mdp, 4)), "pi*"),
    "rpo": (rpo, "between pi* and the law of the chosen: no closed form"),
    "ipo": (ipo, "pi_ref exp(P/beta)/Z, P(y) the probability that y beats a draw from pi_ref"),
    "tdpo": (tdpo, "from pi* towards pi_ref, by the KL that has a gradient: no closed form"),
    "kto": (kto, "no minimum: what wins less than half of the time goes to probability 0"),
    "simpo": (simpo, "past exp(|y| (R(y) + c)/beta), to which it goes without its margin gamma"),
    "cpl": (
        lambda t: t.fit(rankings(t.mdp), mdp=without_reference(t.mdp)),
        "exp(R/beta)/Z: the optimum without pi_ref",
    ),
    "tbrm": (tbrm, "pi*, whatever noise of mean 0 its returns have"),
    "step": (step, "pi*"),
    "reward_head": (
        lambda t: solve(with_reward_model(t), BETA).log_pi,
        "R up to a constant, whose soft optimum is pi*",
    ),
    "ppo": (ppo, "pi*, the optimum of the KL-penalised return of the fitted reward"),
    "rto": (lambda t: solve(replace(t.mdp, reward=fit(t.mdp, BETA, 50).rewards), BETA).log_pi, "DPO's policy, so pi*"),
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
        for name, (found, words) in METHODS.items()
    }
