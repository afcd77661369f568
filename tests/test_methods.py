"""Other methods' losses against hand-computed cases, and in tables, where what they lead to is known."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minqstar.theory import methods, tabular
from minqstar.theory.cases import random_mdp, without_reference
from minqstar.theory.losses import chosen_nll, dpo_loss
from minqstar.theory.mdp import TokenMDP, implicit_rewards, solve, tree, visits
from minqstar.theory.paths import responses


def small(seed: int, horizon: int = 2) -> TokenMDP:
    generator = torch.Generator().manual_seed(seed)
    token, next = tree(2, horizon)
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


def test_one_kl_term_more_leads_to_one_step_of_improvement():
    """TDPO1: DPO on sum beta log(pi/pi_ref) + beta KL(pi_ref || pi) finds pi_ref exp(Q/beta), Q the value of pi_ref."""
    mdp, beta = small(1), 0.5
    paths, pi_ref = responses(mdp), mdp.log_ref.exp()
    expected = lambda values: (pi_ref * values).sum(-1, keepdim=True)  # noqa: E731
    score = lambda rewards: paths.along(rewards - expected(rewards)).sum(-1)  # noqa: E731
    fit = tabular.fit(mdp, beta, 60, tabular.rankings(mdp)._replace(score=score))
    Q, V = mdp.reward.clone(), torch.zeros(mdp.num_states + 1, dtype=torch.float64)
    for s in reversed(range(mdp.num_states)):
        Q[s] += V[mdp.next[s]]
        V[s] = (pi_ref[s] * Q[s]).sum()
    limit = (mdp.log_ref + Q / beta).softmax(-1)
    assert torch.allclose(fit.log_pi.exp(), limit, atol=1e-6) and fit.policy_gap[-1] > 0.01


def test_without_a_reference_the_optimum_is_the_same_iff_whole_responses_are_equally_likely():
    """CPL. Uniform over the tokens of each state is not enough: pi_ref(a|s) is the share of the responses behind a."""
    mdp, beta = small(0), 0.5
    behind = torch.zeros(mdp.num_states + 1, dtype=torch.float64)
    behind[-1] = 1
    for s in reversed(range(mdp.num_states)):
        behind[s] = behind[mdp.next[s]][mdp.support[s]].sum()
    equally = (behind[mdp.next] / behind[:-1, None]).log().masked_fill(~mdp.support, -torch.inf)
    by_token = torch.where(mdp.support, 0.0, -torch.inf).double().log_softmax(-1)
    free = solve(without_reference(mdp), beta).log_pi.exp()
    gaps = [(solve(replace(mdp, log_ref=ref), beta).log_pi.exp() - free).abs().max() for ref in (equally, by_token)]
    assert gaps[0] < 1e-12 and gaps[1] > 0.01


@given(st.integers(0, 10**6), st.floats(0.1, 10))
def test_ppo_on_dpos_rewards_ends_at_dpos_policy_or_at_the_optimum_of_its_own_temperature(seed, other):
    """RTO (arXiv 2404.18922). r' = beta log(pi_dpo/pi_ref) has V = 0 at beta, so its optimum is pi_dpo (Lemma 1). With
    the KL weight beta' it is pi_ref (pi_dpo/pi_ref)^(beta/beta') normalised over whole responses; r' is r but for
    shaping, so that is the exact pi* of beta'."""
    generator = torch.Generator().manual_seed(seed)
    mdp, beta = random_mdp(generator), 0.7
    dpo = solve(mdp, beta)
    dense = replace(mdp, reward=implicit_rewards(mdp, dpo, beta))
    scale = max(1.0, dense.reward.abs().max().item(), dpo.V.abs().max().item())
    same = solve(dense, beta)
    assert torch.allclose(same.log_pi.exp(), dpo.log_pi.exp(), atol=1e-9) and same.V.abs().max() < 1e-9 * scale
    assert torch.allclose(solve(dense, other).log_pi.exp(), solve(mdp, other).log_pi.exp(), atol=1e-9 * scale / other)


@pytest.mark.parametrize("other", [0.2, 1.5])
def test_a_power_of_a_policy_normalised_by_state_is_not_the_optimum_of_its_temperature(other):
    """But for states whose successors have one V at beta', the last ones among them: it is proxy tuning (Eq. 14)."""
    mdp, beta = small(0, 3), 0.5
    dense = replace(mdp, reward=implicit_rewards(mdp, solve(mdp, beta), beta))
    exact = solve(dense, other)
    by_state = (mdp.log_ref + dense.reward / other).softmax(-1)
    gap = (by_state - exact.log_pi.exp()).abs().amax(-1)
    after = exact.V[mdp.next].masked_fill(~mdp.support, torch.nan)
    alike = torch.tensor([v[~v.isnan()].max() - v[~v.isnan()].min() < 1e-9 for v in after])
    assert gap[alike].max() < 1e-9 and gap[~alike].min() > 1e-4 and gap.max() > 5e-3
    assert alike.sum() >= 8 and (~alike).sum() >= 3
    assert (exact.V[:-1] * (beta - other) >= -1e-12).all()  # a smaller KL weight leaves V > 0, a larger one V < 0


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


def penalised(mdp: TokenMDP, logits: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(y) (N,) and the KL-penalised returns (N,) of every response."""
    log_pi = logits.masked_fill(~mdp.support, -torch.inf).log_softmax(-1)
    log_pi, log_ref = (torch.where(mdp.support, t, 0.0) for t in (log_pi, mdp.log_ref))
    paths = responses(mdp)
    return paths.along(log_pi).sum(-1), paths.along(mdp.reward - beta * (log_pi - log_ref)).sum(-1)


@pytest.mark.parametrize("K", [2, 3])
def test_reinforce_with_leave_one_out_has_the_gradient_of_the_objective(K):
    """In expectation over all K-tuples of draws, exactly; less the mean of all K it would be (K - 1)/K of it."""
    mdp, beta = small(0, 1), 0.5
    logits = torch.randn(mdp.log_ref.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    logits.requires_grad_()
    log_pi, returns = penalised(mdp, logits, beta)
    (exact,) = torch.autograd.grad((log_pi.exp() * returns).sum(), logits, retain_graph=True)
    loss = 0.0
    for drawn in itertools.product(range(len(log_pi)), repeat=K):
        drawn = list(drawn)
        advantages = methods.leave_one_out(returns[None, drawn])[0]
        loss += log_pi[drawn].sum().exp().detach() * methods.reinforce(log_pi[drawn], advantages).mean()
    (found,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(found, -exact, atol=1e-12) and exact.abs().max() > 0.01


def test_at_the_policy_that_drew_ppo_has_the_gradient_of_the_objective():
    """And GAE with exact values, over all draws: the policy gradient theorem, by enumeration."""
    mdp, beta = small(1), 0.5
    logits = torch.randn(mdp.log_ref.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    logits.requires_grad_()
    sums, returns = penalised(mdp, logits, beta)
    (exact,) = torch.autograd.grad((sums.exp() * returns).sum(), logits, retain_graph=True)
    log_pi = logits.masked_fill(~mdp.support, -torch.inf).log_softmax(-1)
    old, on = log_pi.detach(), mdp.support
    paid = torch.where(on, mdp.reward - beta * (old - mdp.log_ref), 0.0)
    V = torch.zeros(mdp.num_states + 1, dtype=torch.float64)
    for s in reversed(range(mdp.num_states)):
        V[s] = (old[s].exp() * (paid[s] + V[mdp.next[s]])).sum()
    advantage = paid + V[mdp.next] - V[:-1, None]
    loss = (visits(mdp, old)[on] * methods.ppo_clip(log_pi[on], old[on], advantage[on], 0.2)).sum()
    (found,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(found, -exact, atol=1e-12) and exact.abs().max() > 0.01


@given(st.integers(0, 10**6))
def test_at_the_optimum_every_response_has_one_penalised_return(seed):
    """V*(s_0): the returns of draws have no variance, and each draw's own gradient is 0."""
    generator = torch.Generator().manual_seed(seed)
    mdp, beta = random_mdp(generator), 0.7
    solution = solve(mdp, beta)
    paths = responses(mdp)
    kept = paths.along(mdp.log_ref).sum(-1) > -torch.inf
    penalised = paths.along(mdp.reward - implicit_rewards(mdp, solution, beta)).sum(-1)[kept]
    scale = max(1.0, mdp.reward.abs().max().item(), solution.V.abs().max().item())
    assert torch.allclose(penalised, solution.V[0].expand_as(penalised), atol=1e-9 * scale * 10)
    assert methods.leave_one_out(penalised[None, :2].repeat(1, 2)).abs().max() < 1e-8 * scale


def test_no_spread_over_own_draws_is_no_proof_of_the_optimum_and_none_over_those_of_the_reference_is():
    """pi* kept to a few responses, or to one, has no spread over what it draws, at a level below V*(s_0). Over draws
    from pi_ref, which miss nothing, the spread is 0 at pi* alone: elsewhere the worst missed response shows."""
    mdp, beta = small(0), 0.5
    V = solve(mdp, beta).V[0]
    paths = responses(mdp)
    log_ref, R = (paths.along(t).sum(-1) for t in (mdp.log_ref, mdp.reward))
    for kept in ([0, 3, 4], [5], list(range(len(R)))):
        missed = torch.full_like(R, 20.0)  # nats below its place under pi*
        missed[kept] = 0.0
        log_pi = (log_ref + R / beta - missed).log_softmax(-1)
        returns = R - beta * (log_pi - log_ref)
        own, of_reference = (
            (w * (returns - (w * returns).sum()) ** 2).sum().sqrt() for w in (log_pi.exp(), log_ref.exp())
        )
        assert own < 1e-2
        if len(kept) < len(R):
            assert of_reference > 0.1 and (log_pi.exp() * returns).sum() < V - 1e-3
        else:
            assert of_reference < 1e-9 and torch.allclose(returns, V)


def test_grpo_divides_nought_by_nought_at_the_optimum():
    """Equal returns give NaN. What floats leave of them, 1e-7, gives advantages of size 1: a gradient that is noise,
    where leave-one-out has one of 1e-7. So its steps do not shrink towards pi*."""
    mdp, beta = small(0), 0.5
    solution = solve(mdp, beta)
    assert methods.group_normalised(solution.V[0].expand(1, 4)).isnan().all()
    drawn = [0, 3, 4, 6]
    logits = torch.where(mdp.support, solution.log_pi, 0.0).float().requires_grad_()
    log_pi, returns = penalised(mdp, logits, beta)
    group = returns.detach()[None, drawn]
    assert 0 < group.std() < 1e-6 and group[0, 0].item() == pytest.approx(solution.V[0].item(), abs=1e-6)
    gradients = []
    for advantages in (methods.leave_one_out(group), methods.group_normalised(group)):
        loss = methods.reinforce(log_pi[drawn], advantages[0]).mean()
        gradients.append(torch.autograd.grad(loss, logits, retain_graph=True)[0].abs().max().item())
    assert gradients[0] < 1e-6 and gradients[1] > 0.05


@given(st.lists(st.floats(-9, 0), min_size=4, max_size=4), st.floats(0.5, 2), st.booleans())
def test_which_losses_see_a_shift_of_both_sums(values, shift, down):
    """log pi_w + c and log pi_l + c: DPO, IPO, CPL and TDPO are functions of the difference of the sums."""
    c, beta = -shift if down else shift, 0.5
    log_pi, ref = torch.tensor(values[:2]).double(), torch.tensor(values[2:]).double()
    kl, lengths, response = torch.tensor([0.3, 0.8]), torch.tensor([2.0, 5.0]), torch.arange(2)
    dpo = lambda x: dpo_loss(x, ref, response, [2], beta).loss  # noqa: E731
    blind = {
        "dpo": dpo,
        "cpl": lambda x: dpo_loss(x, None, response, [2], beta).loss,
        "ipo": lambda x: methods.ipo(x, ref, beta),
        "tdpo": lambda x: methods.tdpo(x, ref, kl, beta, 0.5),
        "simpo, equal lengths": lambda x: methods.simpo(x, torch.tensor([3.0, 3.0]), 2.0, 0.5),
    }
    seeing = {
        "rpo": lambda x: dpo(x) + 0.2 * chosen_nll(x, response, [2]),
        "simpo": lambda x: methods.simpo(x, lengths, 2.0, 0.5),
        "kto": lambda x: methods.kto(x[:1], ref[:1], torch.tensor([True]), beta, torch.tensor(0.1)),
        "tbrm": lambda x: methods.whole_path_residual(x[:1], ref[:1], 20.0, torch.zeros(1), beta),
    }
    for name, loss in blind.items():
        assert torch.allclose(loss(log_pi + c), loss(log_pi), atol=1e-9), name
    for name, loss in seeing.items():
        assert (loss(log_pi + c) - loss(log_pi)).abs().max() > 1e-6, name


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0, 1))
def test_gae_is_its_sum(values, lam):
    """sum_k lambda^k delta_{t+k}, term by term; lambda = 1 is the return to come less V, lambda = 0 is delta."""
    reward, V = torch.tensor(values).double(), torch.tensor([*(0.5 * v - 1 for v in values), 0.0]).double()
    delta = [reward[t] + V[t + 1] - V[t] for t in range(len(reward))]
    naive = [sum(lam**k * d for k, d in enumerate(delta[t:])) for t in range(len(reward))]
    assert torch.allclose(methods.gae(reward, V, lam), torch.stack(naive), atol=1e-9)
    to_come = torch.stack([reward[t:].sum() for t in range(len(reward))])
    assert torch.allclose(methods.gae(reward, V, 1.0), to_come - V[:-1], atol=1e-9)
    assert torch.equal(methods.gae(reward, V, 0.0), torch.stack(delta))


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
    steps = methods.step_residual(pi, ref, value, torch.tensor([0.5, 0.0]).double(), R / 4, 0.5)
    assert steps.tolist() == pytest.approx([(0.5 + 0.2 - 0.5 - 0.25) ** 2, (-0.25 + 0.2 + 0.25) ** 2])
    group = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert methods.leave_one_out(group).tolist() == [[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]]
    assert methods.group_normalised(group)[1].tolist() == pytest.approx([-(3**-0.5), -(3**-0.5), 2 * 3**-0.5])
    sums = pi.clone().requires_grad_()
    (slope,) = torch.autograd.grad(methods.reinforce(sums, R * sums / sums.detach()).sum(), sums)
    assert slope.tolist() == [-1.0, 1.0]  # minus the returns, which have no gradient of their own
