"""Other methods' losses against hand-computed cases, and in tables, where what they lead to is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minqstar.theory import methods, tabular
from minqstar.theory.cases import random_mdp
from minqstar.theory.mdp import TokenMDP, implicit_rewards, solve, tree
from minqstar.theory.paths import responses


def small(seed: int) -> TokenMDP:
    generator = torch.Generator().manual_seed(seed)
    token, next = tree(2, 2)
    draw = lambda: torch.randn(token.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return TokenMDP(token, next, draw().masked_fill(token < 0, -torch.inf).log_softmax(-1), draw())


@pytest.mark.parametrize("seed", [0, 1])
def test_ipo_leads_to_the_optimum_of_the_preference_itself(seed):
    """Not to pi*, but to pi_ref exp(P / beta) / Z with P(y) = E_{y' ~ pi_ref} p(y > y')."""
    mdp, beta = small(seed), 0.5
    fit = tabular.fit(mdp, beta, 60, likelihood=lambda S: -(((S[..., 0] - S[..., 1]) / beta - 1 / (2 * beta)) ** 2))
    paths = responses(mdp)
    R, log_ref = paths.along(mdp.reward).sum(-1), paths.along(mdp.log_ref).sum(-1)
    wins = (torch.sigmoid(R[:, None] - R) * log_ref.exp()).sum(-1)
    expected = (log_ref + wins / beta).softmax(-1)
    found = paths.along(torch.where(mdp.support, fit.log_pi, 0.0)).sum(-1).exp()
    assert torch.allclose(found, expected, atol=1e-9) and fit.policy_gap[-1] > 0.01


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_the_expected_gae_of_exact_values_is_the_advantage(seed, lam):
    """For every lambda: with V of a policy (rewards less the KL's price) the later deltas have the mean 0."""
    generator = torch.Generator().manual_seed(seed)
    mdp, beta = random_mdp(generator), 0.7
    logits = torch.randn(mdp.log_ref.shape, generator=generator, dtype=torch.float64)
    log_pi = logits.masked_fill(~mdp.support, -torch.inf).log_softmax(-1)
    paid = torch.where(mdp.support, mdp.reward - beta * (log_pi - mdp.log_ref), 0.0)
    V, pi = torch.zeros(mdp.num_states + 1, dtype=torch.float64), log_pi.exp()
    for s in reversed(range(mdp.num_states)):
        V[s] = (pi[s] * (paid[s] + V[mdp.next[s]])).sum()
    total, weight = torch.zeros(2, *mdp.log_ref.shape, dtype=torch.float64)
    paths = responses(mdp)
    for states, actions, scored in zip(*paths, strict=True):
        s, a = states[scored], actions[scored]
        chance = log_pi[s, a].sum().exp()
        if chance > 0:
            found = methods.gae(paid[s, a], torch.cat((V[s], V[-1:])), lam)
            total[s, a] += chance * found
            weight[s, a] += chance
    met = weight > 1e-12
    advantage = paid + V[mdp.next] - V[:-1, None]
    assert torch.allclose((total / weight)[met], advantage[met], atol=1e-6 * max(1.0, advantage.abs().max().item()))


@given(st.integers(0, 10**6))
def test_at_the_optimum_every_response_has_one_penalised_return(seed):
    """V*(s_0): no variance and no gradient. GRPO divides by the group's deviation, 0/0 here."""
    generator = torch.Generator().manual_seed(seed)
    mdp, beta = random_mdp(generator), 0.7
    solution = solve(mdp, beta)
    paths = responses(mdp)
    kept = paths.along(mdp.log_ref).sum(-1) > -torch.inf
    penalised = paths.along(mdp.reward - implicit_rewards(mdp, solution, beta)).sum(-1)[kept]
    scale = max(1.0, mdp.reward.abs().max().item(), solution.V.abs().max().item())
    assert torch.allclose(penalised, solution.V[0].expand_as(penalised), atol=1e-9 * scale * 10)
    assert methods.leave_one_out(penalised[None, :2].repeat(1, 2)).abs().max() < 1e-8 * scale


def test_losses_by_hand():
    pi, ref = torch.tensor([-1.0, -3.0]).double(), torch.tensor([-2.0, -2.5]).double()
    assert methods.ipo(pi, ref, 0.5).item() == pytest.approx((1.5 - 1.0) ** 2)
    assert methods.simpo(pi, torch.tensor([2.0, 3.0]).double(), 2.0, 0.5).item() == pytest.approx(
        math.log1p(math.exp(-(2.0 * (-0.5 + 1.0) - 0.5)))
    )
    found = methods.kto(pi, ref, torch.tensor([True, False]), 0.5, torch.tensor(0.1).double())
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert found.tolist() == pytest.approx([1 - sigmoid(0.5 - 0.1), 1 - sigmoid(0.1 + 0.25)])
    kl = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    loss = methods.tdpo(pi, ref, kl, 0.5, 0.7)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-(0.75 - 0.7 * 0.25))))
    assert torch.autograd.grad(loss.sum(), kl)[0].tolist()[0] == 0.0
    value, R = torch.tensor([0.2, 0.2]).double(), torch.tensor([1.0, -1.0]).double()
    assert methods.whole_path_residual(pi, ref, value, R, 0.5).tolist() == pytest.approx([0.09, 0.9025])
    clip = methods.ppo_clip(torch.tensor([0.5, 0.5]), torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2)
    assert clip.tolist() == pytest.approx([-1.2, math.exp(0.5)])
