"""The paper's identities on exact MDPs, each a function from a claim to its residual.

They hold of every kind of MDP that `minqstar.theory.cases` draws: with one temperature or one for each state, with
states in which the environment draws, without a reference, of two parts, of denoising steps.
"""

from dataclasses import replace
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from minqstar.theory.claims import Claim, Identities, gap
from minqstar.theory.losses import dpo_loss, plackett_luce
from minqstar.theory.mdp import implicit_rewards, rewards_of, shape, solve, visits
from minqstar.theory.paths import Responses, bandit
from minqstar.theory.qfunction import expected_implicit_reward, per_action, soft_value


def bradley_terry(c: Claim) -> float:
    """Eq. 1: the odds of a preference are the difference of two sums of rewards, in which every token counts once."""
    return gap(c.sums(c.mdp.reward), c.returns())


def kl_objective(c: Claim) -> float:
    """Eq. 2, 3: E_pi*[sum of r + beta log pi_ref - beta log pi*] = V*(s_0), and no other policy gets more."""

    def objective(log_pi: Tensor) -> Tensor:
        ratio = torch.where(c.support, c.log_ref - log_pi, 0.0)
        return (visits(c.mdp, log_pi) * c.stepwise(ratio)).sum()

    best, other, V0 = objective(c.solution.log_pi), objective(c.base), c.solution.V[0]
    return max(gap(best, V0, other), gap(torch.maximum(other, V0), V0, other))


def policy_of_q(c: Claim) -> float:
    """Eq. 5: log pi* = (Q* - V*) / beta, and it sums to one; in a chance state it is the law."""
    V, Q, log_pi = c.solution
    on, total = c.support, torch.logsumexp(log_pi, -1)
    right = torch.where(c.chosen, (Q - V[:-1, None]) / per_action(c.beta), c.mdp.log_ref)
    return max(gap(log_pi[on], right[on], (Q / per_action(c.beta))[on]), gap(total, 0 * total))


def value_of_q(c: Claim) -> float:
    """Eq. 6: V* = beta logsumexp(Q* / beta); in a chance state E Q*."""
    expected = torch.where(c.support, c.mdp.log_ref.exp() * c.solution.Q, 0.0).sum(-1)
    right = torch.where(c.mdp.own, soft_value(c.solution.Q, c.beta), expected)
    return gap(c.solution.V[:-1], right, c.solution.Q[c.support])


def bellman(c: Claim) -> float:
    """Eq. 7: Q* = r + beta log pi_ref + V*(s'), without its middle in a chance state, and V*(terminal) = 0."""
    V, Q, _ = c.solution
    right = c.stepwise(c.log_ref) + V[c.mdp.next]
    return max(gap(Q[c.support], right[c.support], c.scaled(c.log_ref)[c.support]), gap(V[-1], 0 * V[-1]))


def bijection(c: Claim) -> float:
    """Lemma 1, and of a denoising chain Lemma 2: the reward of Q* is r, and its Q* is Q* again."""
    Q, on = c.solution.Q, c.support
    again = replace(c.mdp, reward=rewards_of(c.mdp, Q, c.beta))
    prior = c.scaled(c.mdp.log_ref)[on]
    return max(gap(again.reward[on], c.mdp.reward[on], Q[on], prior), gap(solve(again, c.beta).Q[on], Q[on], prior))


def pair_losses(c: Claim, paths: Responses, counts: Tensor, rejected_weight: float = 1.0) -> Tensor:
    """The DPO losses of pi* on pairs of neighbours, the first chosen, their tokens counting as `counts` (R, L) says."""
    two = 2 * (len(paths.states) // 2)
    scored = paths.scored[:two]
    response = torch.arange(two)[:, None].expand_as(scored)[scored]
    pi, ref = (
        (paths.along(torch.where(c.support, t, 0.0)) * counts)[:two][scored] for t in (c.solution.log_pi, c.log_ref)
    )
    beta = paths.along(c.scaled(torch.ones_like(c.log_ref)))[:two][scored]
    return dpo_loss(pi, ref, response, [2] * (two // 2), beta, rejected_weight).loss


def bradley_terry_losses(values: Tensor) -> Tensor:
    """-log P of pairs of neighbours, the first preferred, of what they are worth (R,), reward units."""
    two = 2 * (len(values) // 2)
    return -F.logsigmoid(values[:two:2] - values[1:two:2])


def dpo(c: Claim) -> float:
    """Eq. 8, 9: the DPO loss of pi* on two responses is -log of their Bradley-Terry probability."""
    if len(c.returns()) < 2:
        return 0.0
    right = bradley_terry_losses(c.earned())
    return gap(pair_losses(c, c.paths, c.weights), right, c.returns(), c.implicit)


def rankings(c: Claim) -> float:
    """Theorem 1, Plackett-Luce: the implicit returns rank K responses as the true ones do, for V*(s_0) cancels.

    The K! probabilities sum to one, and K = 2 is Bradley-Terry.
    """
    earned, implicit = (values[:4] for values in (c.earned(), c.sums(c.implicit)))
    if len(earned) < 2:
        return 0.0
    orders = torch.tensor(list(permutations(range(len(earned)))))
    left, right = plackett_luce(implicit[orders]), plackett_luce(earned[orders])
    total, pair = left.logsumexp(0), plackett_luce(implicit[:2])
    scale = (c.returns(), c.implicit, c.solution.V)
    two = gap(-pair, bradley_terry_losses(earned[:2]).sum(), *scale)
    return max(gap(left, right, *scale), gap(total, 0 * total), two)


def segments(c: Claim) -> float:
    """CPL (arXiv 2310.13639): sum r + V*(its end) - V*(its start) = sum beta log(pi*/pi_ref) over any piece.

    That is minus its regret. The loss of pi* on pairs so labelled is -log of their probability, for lambda = 1.
    """
    implicit = c.pieces.along(c.implicit).sum(-1)
    scale = (c.solution.V, c.mdp.reward, c.implicit)
    if len(implicit) < 2:
        return gap(c.labels, implicit, *scale)
    losses = pair_losses(c, c.pieces, c.pieces.scored, c.rejected_weight)
    return max(gap(c.labels, implicit, *scale), gap(losses, bradley_terry_losses(c.labels), *scale))


def shaping(c: Claim) -> float:
    """Definition 1: r + Phi(s') - Phi(s) has the policy of r, and moves all returns by -Phi(s_0)."""
    shaped = shape(c.mdp, c.phi)
    other, on = solve(shaped, c.beta), c.support
    scale = torch.cat([(t.Q / per_action(c.beta))[on] for t in (other, c.solution)])
    return max(
        gap(other.log_pi[on], c.solution.log_pi[on], scale),
        gap(other.V, c.solution.V - c.phi, c.phi),
        gap(c.sums(shaped.reward) + c.phi[0], c.returns(), shaped.reward),
    )


def advantage(c: Claim) -> float:
    """Eq. 10, 11: beta log(pi*/pi_ref) = r + V*(s') - V*(s), less the luck of a chance state."""
    log_pi = c.scaled(c.solution.log_pi)[c.support]
    return gap(c.implicit, c.advantage, c.solution.V, log_pi, c.mdp.reward)


def representative(c: Claim) -> float:
    """Theorem 1: r' = beta log(pi*/pi_ref) has the same policy and V* = 0, and is the same for all of r's class."""
    other = solve(replace(c.mdp, reward=c.implicit), c.beta)
    shaped = shape(c.mdp, c.phi)
    same = implicit_rewards(shaped, solve(shaped, c.beta), c.beta)
    scale = (c.solution.V, c.scaled(c.mdp.log_ref)[c.support], c.phi)
    in_nats = (c.solution.Q / per_action(c.beta))[c.support]
    log_pi = gap(other.log_pi[c.support], c.solution.log_pi[c.support], in_nats)
    return max(log_pi, gap(other.V, 0 * other.V, *scale), gap(same, c.implicit, *scale))


def telescoping(c: Claim) -> float:
    """sum r = V*(s_0) + sum beta log(pi*/pi_ref) + sum luck, for a response that ends in EOS."""
    return gap(c.returns(), c.solution.V[0] + c.sums(c.implicit) + c.sums(c.luck), c.solution.V, c.mdp.reward)


def whole_responses(c: Claim) -> float:
    """The bandit view: pi*(y) = pi_ref(y) exp(R(y)/beta) / Z, V*(s_0) = beta log Z, R without the luck.

    With several temperatures V*(s_0) lies between those of the smallest and of the largest.
    """
    choice = replace(c.mdp, reward=c.mdp.reward - c.luck, chance=None)
    most, least = c.beta.max().item(), c.beta.min().item()
    (log_pi, low), (_, high) = (bandit(choice, c.paths, beta) for beta in (most, least))
    V0, low, high = c.solution.V[0], most * low, least * high
    scale = (c.returns(), c.solution.V, low, high)
    between = gap(V0, torch.minimum(torch.maximum(V0, low), high), *scale)
    if least < most:
        return between
    return max(between, gap(c.sums(c.solution.log_pi), log_pi, *(t / most for t in scale)))


def prefixes(c: Claim) -> float:
    """Eq. 12 = 13, at every prefix: sum (r + beta log pi_ref) + V*(s_K+1) = V*(s_0) + sum beta log pi* (+ luck)."""
    scored = c.paths.scored
    right = torch.where(c.chosen, c.scaled(c.solution.log_pi), c.luck)
    left, right = ((c.paths.along(t) * c.weights).cumsum(-1)[scored] for t in (c.stepwise(c.log_ref), right))
    after = c.paths.along(c.solution.V[c.mdp.next])[scored]
    return gap(left + after, c.solution.V[0] + right, left, right, after)


def proxy(c: Claim) -> float:
    """Eq. 14, 15: pi_base (pi*/pi_ref)^alpha = pi_base exp(alpha A / beta), normalised, A = r + V*(s') - V*(s)."""
    on, beta = c.support, per_action(c.beta)
    ratio = torch.where(on, c.solution.log_pi - c.log_ref, 0.0)
    by_ratio, by_value = ((c.base + c.alpha * t).log_softmax(-1)[on] for t in (ratio, c.advantage / beta))
    return gap(by_ratio, by_value, c.alpha * ratio, c.alpha * c.solution.V[:-1] / c.beta)


def falling(c: Claim) -> float:
    """Eq. 16: E_pi_ref[r + V*(s') - V*(s)] = E_pi_ref[beta log(pi*/pi_ref)] = -beta KL(pi_ref || pi*).

    In a chance state both sides are 0, with the luck too: its mean is.
    """
    log_ref, log_pi = (torch.where(c.support, t, 0.0) for t in (c.log_ref, c.solution.log_pi))
    law = torch.where(c.support, c.mdp.log_ref.exp(), 0.0)
    value = (law * (c.advantage + c.luck)).sum(-1)
    kl = F.kl_div(log_pi, log_ref, log_target=True, reduction="none")
    kl = torch.where(c.support, kl, 0.0).sum(-1)
    expected = expected_implicit_reward(c.solution.log_pi, c.log_ref, c.beta)
    scale = (c.solution.V, c.implicit, c.mdp.reward)
    return max(gap(value, expected, *scale), gap(value, -c.beta * kl, *scale))


IDENTITIES: Identities = {
    "Bradley-Terry": ("1", bradley_terry),
    "KL objective": ("2, 3", kl_objective),
    "policy of Q*": ("5", policy_of_q),
    "value of Q*": ("6", value_of_q),
    "Bellman": ("7", bellman),
    "bijection r, Q*": ("Lemma 1", bijection),
    "DPO loss": ("8, 9", dpo),
    "Plackett-Luce": ("Thm. 1", rankings),
    "segments": ("CPL", segments),
    "shaping": ("Def. 1", shaping),
    "implicit reward": ("10, 11", advantage),
    "representative": ("Thm. 1", representative),
    "telescoping": ("sum of 10", telescoping),
    "bandit view": ("section 3", whole_responses),
    "search values": ("12 = 13", prefixes),
    "proxy tuning": ("14, 15", proxy),
    "falling likelihood": ("16", falling),
}
