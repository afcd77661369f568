"""The checker says yes to what is true and no to what is not."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st

from minqstar.evaluate import gap_figures
from minqstar.runchecks import RUN_FAULTS, RunClaim, cached_logps, check_run
from minqstar.theory.appendices import GAUSSIANS, NOISED, PARTS, draw_gaussian
from minqstar.theory.cases import (
    KINDS,
    random_beta,
    random_claims,
    random_denoising,
    random_mdp,
    random_parts,
    true_claim,
)
from minqstar.theory.claims import Result, check_claims, gap
from minqstar.theory.diffusion import credit, marginals
from minqstar.theory.faults import FAULTS, check_faults, check_theory, fault_claim
from minqstar.theory.identities import IDENTITIES, pair_losses
from minqstar.theory.losses import plackett_luce
from minqstar.theory.mdp import TokenMDP, implicit_rewards, luck, shape, solve, tree, visits
from minqstar.theory.parts import ends
from minqstar.theory.paths import responses
from minqstar.theory.tabular import fit
from minqstar.training.data import Group, PackedData
from minqstar.training.scoring import weights_hash

EOS, PAD = 21, 22


FAMILIES = (PARTS, NOISED, GAUSSIANS)


@given(st.integers(0, 2**40))
def test_true_claims_pass(seed):
    for result in check_claims(list(random_claims(1, seed)), IDENTITIES):
        assert result.passed and result.cases == len(KINDS), result


@pytest.mark.parametrize("cases", [5, pytest.param(500, marks=pytest.mark.slow)])
def test_all_identities_hold_on_random_cases_of_each_kind(cases):
    """The command checks a hundred of each."""
    results = check_theory(cases, 1)
    names = [name for identities in (IDENTITIES, *(f.identities for f in FAMILIES)) for name in identities]
    assert [result.id for result in results] == names
    assert all(result.passed for result in results), results
    assert {result.cases for result in results} == {cases, cases * len(KINDS)}


def test_another_seed_is_other_cases():
    first, again, other = (check_theory(2, seed) for seed in (0, 0, 1))
    assert first == again
    differ = {one.id for one, two in zip(first, other, strict=True) if one.residual != two.residual}
    assert all(differ & identities.keys() for identities in (IDENTITIES, *(f.identities for f in FAMILIES)))


def test_claims_are_of_the_kinds_that_they_are_said_to_be():
    claims = {kind: list(random_claims(20, 0, [kind])) for kind in KINDS}
    several = {kind for kind, some in claims.items() if any(c.beta.min() < c.beta.max() for c in some)}
    assert several == {"a temperature for each state", "chance states", "refiner and generator"}
    lucky = {kind for kind, some in claims.items() if any(c.luck.abs().max() > 0 for c in some)}
    assert lucky == {"chance states", "no reference"}
    for kind, some in claims.items():
        free = [c for c in some if (c.mdp.log_ref[c.chosen] == 0).all() and (c.support.sum(-1) > 1)[c.mdp.own].any()]
        assert (len(free) > 10) == (kind == "no reference")
        ends_of = [c.paths.scored.sum(-1, keepdim=True) - 1 for c in some]
        first = torch.cat([c.pieces.scored[:, 0] for c in some])
        last = torch.cat([c.pieces.scored.gather(1, end)[:, 0] for c, end in zip(some, ends_of, strict=True)])
        assert {*zip(first.tolist(), last.tolist(), strict=True)} >= {(True, True), (True, False), (False, True)}
        for c in some:
            assert torch.allclose(c.base.logsumexp(-1), torch.zeros(len(c.base)).double(), atol=1e-9)
            assert torch.equal(c.base[~c.mdp.own], c.mdp.log_ref[~c.mdp.own])
            on_support = responses(c.mdp).along(c.mdp.log_ref).sum(-1) > -math.inf
            assert (c.paths.along(c.mdp.log_ref).sum(-1) > -math.inf).all() and len(c.labels) == on_support.sum()


def test_random_cases_cover_what_they_are_said_to_cover():
    generator = torch.Generator().manual_seed(0)
    betas = [random_beta(generator) for _ in range(300)]
    assert 0.01 < min(betas) < 0.02 and 50 < max(betas) < 100
    chains = [random_denoising(generator) for _ in range(150)]
    seen = {(len(data), len(noise), absorbing) for data, noise, _, absorbing in chains}
    assert seen == {(X, T, absorbing) for X in (2, 3) for T in (1, 2, 3) for absorbing in (False, True)}
    amounts = torch.cat([noise for _, noise, *_ in chains])
    assert amounts.min() < 0.05 and amounts.max() > 0.95
    parts = [random_parts(generator) for _ in range(100)]
    assert {(len(seconds), seconds[0].num_states) for _, seconds in parts} == {
        (z, y) for z in (2, 3) for y in (1, 2, 3, 7)
    }
    assert all((first.reward == 0).all() for first, _ in parts)
    gaussians = [draw_gaussian(generator) for _ in range(200)]
    assert {c.drawn.shape[1:] for c in gaussians} == {(T + 1, D) for T in range(1, 9) for D in (1, 2, 3)}
    noise = torch.cat([c.noise for c in gaussians])
    assert 0.01 < noise.min() < 0.03 and 0.97 < noise.max() < 0.99
    bends = torch.cat([torch.linalg.eigvals(c.data.S[0] @ c.reward.P / c.beta).real for c in gaussians])
    assert -0.9 < bends.min() < -0.8 and 4.0 < bends.max() < 4.1  # exp(r/beta) may grow, but its integral is finite
    automata = [m for m in (random_mdp(generator) for _ in range(50)) if (m.token >= 0).all() and m.num_states > 2]
    assert any(((m.next[0] > 1) & (m.next[0] < m.num_states)).any() for m in automata)  # that pass states over
    assert any((c.data.S[0] - c.data.S[0].diag().diag()).any() for c in gaussians)
    assert all(c.reward.q.any() and c.reward.c != 0 and c.data.d.any() for c in gaussians)
    claims = list(random_claims(50, 0))
    alphas, drawn = [c.alpha for c in claims], [c.mdp.chance.double().mean() for c in claims if c.luck.any()]
    assert 0 < min(alphas) < 0.1 and 1.9 < max(alphas) < 2 and 0.3 < sum(drawn) / len(drawn) < 0.5
    assert all(c.rejected_weight == 1 and c.phi[-1] == 0 and c.phi.any() for c in claims)


def test_each_part_of_an_appendix_notices():
    generator = torch.Generator().manual_seed(3)
    c = PARTS.draw(generator)
    for states in (c.mdp.next[ends(c.first)], 0):  # the generator's values alone, and that of the whole
        V = c.both.V.clone()
        V[states] += 0.1
        assert PARTS.identities["refiner, generator"][1](c._replace(both=c.both._replace(V=V))) > 1e-3
    changed = c.both._replace(log_pi=c.both.log_pi.clone())
    changed.log_pi[0] = c.both.log_pi[0].where(c.both.log_pi[0] == -math.inf, -1.0)  # the refiner's choices alone
    assert PARTS.identities["refiner, generator"][1](c._replace(both=changed)) > 1e-3
    c = NOISED.draw(generator)
    changed = c.solution._replace(log_pi=c.solution.log_pi.clone())
    changed.log_pi[-1] -= 1.0  # of the last step alone
    assert NOISED.identities["noised optimum"][1](c._replace(solution=changed)) > 1e-3
    c = GAUSSIANS.draw(generator)
    first = c.values[0]._replace(c=c.values[0].c + 0.1 * max(1, abs(c.values[0].c)))
    flagged = {name for name, (_, residual) in GAUSSIANS.identities.items()
               if residual(c._replace(values=[first, *c.values[1:]])) > 1e-6}  # fmt: skip
    assert flagged == GAUSSIANS.identities.keys() - {"Gaussians: noised optimum"}


def test_each_part_of_a_gaussian_identity_notices():
    c = GAUSSIANS.draw(torch.Generator().manual_seed(3))
    by, residuals = 0.1 * max(1, abs(c.values[0].c)), {name: i for name, (_, i) in GAUSSIANS.identities.items()}

    def raised(*steps: int) -> list:
        return [v._replace(c=v.c + by * (k in steps)) for k, v in enumerate(c.values)]

    everywhere = range(len(c.values))
    assert len(c.values) > 3
    for name, wrong in (
        ("values", c._replace(values=raised(1))),  # not that of the whole
        ("values", c._replace(values=raised(*everywhere))),
        ("log-ratios", c._replace(values=raised(2))),  # between the ends
        ("log-ratios", c._replace(values=raised(*everywhere))),
        ("noised optimum", c._replace(policy=c.policy._replace(A=c.policy.A + by))),
        ("noised optimum", c._replace(policy=c.policy._replace(d=c.policy.d + by))),
        ("noised optimum", GAUSSIANS.faults["Gaussians: prior left out"](c)),
    ):
        assert residuals[f"Gaussians: {name}"](wrong) > 1e-6, name
    policy = c.policy._replace(S=c.chain.S)  # whose value is its own, but not at the steps at which pi*'s would be owed
    worth = c.reward.mean(*marginals(policy)[-1]) - credit(c.chain, policy, c.beta).sum()
    wrong = c._replace(policy=policy, values=[c.values[0]._replace(c=worth), *c.values[1:]])
    assert residuals["Gaussians: credit"](wrong) > 1e-6


@functools.cache
def faults_found() -> dict[str, list[str]]:
    return {fault.name: fault.flagged_by for fault in check_faults()}


def test_every_fault_is_flagged_and_the_sound_claim_is_not():
    sound = check_claims([fault_claim()], IDENTITIES)
    for family in FAMILIES:
        sound += check_claims([family.draw(torch.Generator().manual_seed(0))], family.identities)
    assert all(result.passed for result in sound)
    flagged = faults_found()
    assert list(flagged) == [name for faults in (FAULTS, *(f.faults for f in FAMILIES)) for name in faults]
    assert all(flagged.values()) and set().union(*flagged.values()) == {r.id for r in sound}  # no identity is idle


@pytest.mark.parametrize(
    ("fault", "by"),
    [
        ("mask off by one", "telescoping"),
        ("mask off by one", "Bradley-Terry"),
        ("mask off by one", "search values"),
        ("reference moves with the policy", "search values"),
        ("reference moves with the policy", "KL objective"),
        ("hard maximum for soft", "policy of Q*"),
        ("environment's tokens scored", "policy of Q*"),
        ("dropped EOS", "DPO loss"),
        ("truncated taken for terminal", "Bellman"),
        ("truncated taken for terminal", "Bradley-Terry"),
        ("mean in place of sum", "bandit view"),
        ("wrong beta", "bandit view"),
        ("bf16 reference", "implicit reward"),
        ("reference moves with the policy", "implicit reward"),
        ("V(terminal) is not 0", "Bellman"),
        ("a constant on V and Q, terminal too", "telescoping"),
        ("NaN in Q", "value of Q*"),
        ("a constant on V and Q, terminal too", "Bellman"),
        ("a constant on V and Q, terminal too", "bijection r, Q*"),
        ("a constant on V and Q, terminal too", "shaping"),
        ("a constant on V and Q, terminal too", "bandit view"),
        ("tokens shifted by one", "shaping"),
        ("tokens shifted by one", "representative"),
        ("mask off by one", "shaping"),
        ("wrong temperature of one part", "telescoping"),
        ("environment's tokens scored", "telescoping"),
        ("luck ignored", "telescoping"),
        ("segment taken for complete", "segments"),
        ("rejected counts half (lambda < 1)", "segments"),
        ("wrong temperature of the generator", "refiner, generator"),
        ("z unobserved, two temperatures", "z unobserved"),
        ("prior left out", "noised optimum"),
        ("Gaussians: prior left out", "Gaussians: log-ratios"),
        ("Gaussians: variances of pi_ref", "Gaussians: noised optimum"),
        ("Gaussians: wrong beta", "Gaussians: values"),
    ],
)
def test_a_fault_is_flagged_by_the_identity_that_it_breaks(fault, by):
    assert by in faults_found()[fault]


def test_each_state_s_value_is_held_to_its_q():
    """In the state where the environment draws (1) as in those where the policy does."""
    sound = fault_claim()
    V, Q, _ = sound.solution
    for state in (0, 1, 2, 3):
        wrong = V + 0.1 * (torch.arange(len(V)) == state)
        log_pi = torch.where(sound.chosen, (Q - wrong[:-1, None]) / 0.5, sound.solution.log_pi)  # all but sums to one
        c = replace(sound, solution=sound.solution._replace(V=wrong, log_pi=log_pi))
        assert IDENTITIES["value of Q*"][1](c) > 0.01
        assert (IDENTITIES["policy of Q*"][1](c) > 0.01) == (state != 1)
        c = replace(sound, solution=sound.solution._replace(V=wrong))
        assert IDENTITIES["implicit reward"][1](c) > 0.01 and IDENTITIES["search values"][1](c) > 0.01
        assert (IDENTITIES["proxy tuning"][1](c) > 0.001) == (state > 0)  # what all actions share makes no difference
        c = replace(c, luck=luck(c.mdp, c.solution))  # that of a fair draw has the mean 0
        assert IDENTITIES["falling likelihood"][1](c) > 0.001
        assert IDENTITIES["representative"][1](c) < 1e-9  # it speaks of the policy alone


@pytest.mark.parametrize("by", [-1e3, 1e3])
def test_the_value_lies_between_those_of_the_extreme_temperatures(by):
    (c,) = random_claims(1, 0, ["a temperature for each state"])
    V = c.solution.V + by * (torch.arange(len(c.solution.V)) == 0)
    assert len(c.beta) > 1 and IDENTITIES["bandit view"][1](replace(c, solution=c.solution._replace(V=V))) > 0.01


def test_another_policy_is_not_the_optimum_s_representative():
    """Its implicit rewards are of another class; and those of the right class may be said of another policy."""
    sound, residual = fault_claim(), IDENTITIES["representative"][1]
    assert residual(replace(sound, solution=sound.solution._replace(log_pi=sound.base))) > 0.01
    log_ref, log_pi = (t.clone() for t in (sound.log_ref, sound.solution.log_pi))
    log_ref[0, 0] += 0.1
    log_pi[0, 0] += 0.1
    assert residual(replace(sound, log_ref=log_ref, solution=sound.solution._replace(log_pi=log_pi))) > 0.01
    log_pi = sound.solution.log_pi.clone()
    log_pi[0] = log_pi[0, [1, 0, 2]]  # the sum over actions is as it was
    assert IDENTITIES["implicit reward"][1](replace(sound, solution=sound.solution._replace(log_pi=log_pi))) > 0.01


def test_rankings_are_of_more_than_two_and_their_law_is_one(monkeypatch):
    sound, residual = fault_claim(), IDENTITIES["Plackett-Luce"][1]
    third = torch.arange(len(sound.weights))[:, None] == 2
    assert residual(replace(sound, weights=sound.weights * ~third)) > 0.01
    R = sound.returns()
    weights = sound.weights.clone()
    weights[2] *= 1 + 1 / R[2]
    weights[3] *= 1 - 1 / R[3]  # one sum is 1 too large, and one 1 too small
    assert IDENTITIES["Bradley-Terry"][1](replace(sound, weights=weights)) > 0.01
    for law in (  # right for two only; a law, but one that looks at no return
        lambda S: plackett_luce(S) * (0.5 if S.shape[-1] > 2 else 1.0),
        lambda S: torch.full(S.shape[:-1], -math.lgamma(S.shape[-1] + 1), dtype=torch.float64),
    ):
        monkeypatch.setattr("minqstar.theory.identities.plackett_luce", law)
        assert residual(sound) > 0.01


def test_a_worse_policy_is_flagged_though_its_value_is_its_own():
    """Eq. 2, 3 also say that no other policy gets more."""
    sound = fault_claim()
    worse = visits(sound.mdp, sound.base) * sound.stepwise(torch.where(sound.support, sound.log_ref - sound.base, 0.0))
    V = sound.solution.V.clone()
    V[0] = worse.sum()
    wrong = replace(sound, solution=sound.solution._replace(V=V, log_pi=sound.base), base=sound.solution.log_pi)
    assert IDENTITIES["KL objective"][1](wrong) > 0.01
    wrong = replace(sound, labels=sound.labels + 1)  # all alike: no loss of pairs could tell
    assert IDENTITIES["segments"][1](wrong) > 0.01


@pytest.mark.parametrize("id", ["DPO loss", "Plackett-Luce", "segments"])
def test_two_responses_suffice_and_one_is_no_pair(id):
    for horizon, flagged in ((1, True), (0, False)):
        token, next = tree(1, horizon)
        generator = torch.Generator().manual_seed(0)
        logits, reward = (torch.randn(token.shape, generator=generator, dtype=torch.float64) for _ in range(2))
        mdp = TokenMDP(token, next, logits.masked_fill(token < 0, -torch.inf).log_softmax(-1), reward)
        sound = true_claim(mdp, 0.5, generator)
        assert len(sound.paths.states) == horizon + 1 and IDENTITIES[id][1](sound) < 1e-12
        wrong = replace(sound, beta=2 * sound.beta, rejected_weight=0.5)
        assert (IDENTITIES[id][1](wrong) > 0.01) == flagged
        segments = IDENTITIES["segments"][1]
        assert (segments(replace(sound, rejected_weight=0.5)) > 0.01) == flagged
        assert segments(replace(sound, labels=sound.labels + 1)) > 0.01


def test_losses_of_pairs_count_tokens_as_they_are_told():
    c = fault_claim()
    counts = torch.rand(c.weights.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratios = torch.where(c.support, c.solution.log_pi - c.log_ref, 0.0)
    returns = (c.paths.along(ratios) * counts * c.paths.scored).sum(-1) * 0.5
    two = 2 * (len(returns) // 2)
    margins = returns[:two:2] - 0.3 * returns[1:two:2]
    assert torch.allclose(pair_losses(c, c.paths, counts, 0.3), margins.neg().exp().log1p(), atol=1e-12)


def test_a_fault_is_planted_where_its_name_says():
    sound = fault_claim()
    scored = FAULTS["environment's tokens scored"](sound).solution.log_pi
    own = sound.mdp.own
    assert torch.equal(scored[own], sound.solution.log_pi[own]) and not torch.equal(scored, sound.solution.log_pi)
    moved = FAULTS["reference moves with the policy"](sound).log_ref
    step = (moved - sound.log_ref)[0].diff() / (sound.solution.log_pi - sound.log_ref)[0].diff()
    assert step.tolist() == pytest.approx([0.05, 0.05])  # towards the policy
    whole = (sound.pieces.scored == sound.paths.scored).all(-1)
    labels = FAULTS["segment taken for complete"](sound).labels
    assert 1 < whole.sum() < len(whole) and torch.allclose(labels[whole], sound.earned()[whole])
    parts = PARTS.draw(torch.Generator().manual_seed(0))
    betas = PARTS.faults["wrong temperature of the generator"](parts).betas
    assert betas == (parts.betas[0], 1.05 * parts.betas[1])
    sound = NOISED.draw(torch.Generator().manual_seed(0))
    log_pi, chain = NOISED.faults["prior left out"](sound).solution.log_pi, sound.chain(sound.data)
    assert torch.equal(log_pi[0], chain.log_ref[0]) and torch.equal(log_pi[1:], sound.solution.log_pi[1:])
    gaussian = GAUSSIANS.draw(torch.Generator().manual_seed(0))
    left_out = GAUSSIANS.faults["Gaussians: prior left out"](gaussian).policy
    for kept, ref, policy in zip(left_out, gaussian.chain, gaussian.policy, strict=True):
        assert torch.equal(kept[0], ref[0]) and torch.equal(kept[1:], policy[1:])
    sound = fault_claim()
    warmer = FAULTS["wrong temperature of one part"](sound).beta / sound.beta
    assert warmer.tolist() == pytest.approx([1.05] + [1.0] * (len(warmer) - 1))


def test_mass_off_the_support_is_named():
    wrong = FAULTS["mass off the reference's support"](fault_claim())
    results = {r.id: r for r in check_claims([fault_claim(), wrong], IDENTITIES)}
    assert results["implicit reward"].note == "the policy has mass where the reference has none, at action 0, state 0"
    assert not results["implicit reward"].passed


def test_a_shifted_constant_passes_the_local_identities():
    """It shows only against an oracle: this is why the check has one."""
    wrong = FAULTS["a constant on V and Q, terminal too"](fault_claim())
    results = {r.id: r for r in check_claims([wrong], IDENTITIES)}
    assert results["policy of Q*"].passed and results["value of Q*"].passed and results["implicit reward"].passed


def test_one_bad_claim_among_many_fails_and_nan_fails():
    claims = [*random_claims(1, 1), FAULTS["wrong beta"](fault_claim())]
    assert not all(result.passed for result in check_claims(claims, IDENTITIES))
    assert not Result("x", "", 1, math.nan, 1e-9).passed
    assert math.isnan(gap(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 1.0])))
    assert gap(torch.tensor([math.inf]), torch.tensor([math.inf])) == 0.0
    assert gap(torch.tensor([1e6 + 1.0]), torch.tensor([1e6])) == pytest.approx(1e-6)
    assert gap(torch.tensor([0.5]), torch.tensor([0.25])) == 0.25  # relative to 1 at the least
    assert gap(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([-8.0, -math.inf])) == 0.25
    assert gap(torch.tensor([4.0, 0.0]), torch.tensor([2.0, 0.0]), torch.tensor([0.5])) == 0.5  # the worst entry


def claim(seed: int = 0) -> RunClaim:
    rng = np.random.default_rng(seed)
    draw = lambda longest: rng.integers(0, 21, rng.integers(1, longest)).tolist()  # noqa: E731
    groups = [Group(draw(9), ([*draw(7), EOS], [*draw(7), EOS])) for _ in range(6)]
    policy, reference = random_model(seed), random_model(seed + 1)
    return RunClaim(policy, reference, weights_hash(reference), 0.5, EOS, groups, PackedData(groups, PAD, 40))


@pytest.mark.parametrize("seed", range(2))
def test_a_sound_run_passes_and_each_fault_in_it_is_flagged(seed):
    sound = claim(seed)
    results = check_run(sound)
    assert len(results) == 9 and all(result.passed and result.cases == 12 for result in results), results
    for name, plant in RUN_FAULTS.items():
        assert not all(result.passed for result in check_run(plant(sound))), name


@pytest.mark.parametrize("shift", [0, 1])
def test_a_late_cache_is_the_model_at_late_positions(shift):
    sound = claim()
    for (prompt, response), logps in zip(
        sound.responses, cached_logps(sound.policy, sound.responses, shift), strict=True
    ):
        tokens = torch.tensor([prompt + response[:-1]])
        late = shift * (torch.arange(tokens.shape[1]) >= len(prompt))
        with torch.no_grad():
            hidden = sound.policy(tokens, (torch.arange(tokens.shape[1]) + late)[None])[0, len(prompt) - 1 :]
            assert gap(sound.policy.logits(hidden).log_softmax(-1), logps) < 1e-5


def test_a_wrong_response_length_or_a_second_eos_is_flagged():
    sound = claim()
    groups = [Group(g.prompt, tuple([*response[:-1], EOS, EOS] for response in g.responses)) for g in sound.groups]
    twice = replace(sound, groups=groups, data=PackedData(groups, PAD, 60))
    assert [result.id for result in check_run(twice) if not result.passed] == ["one scored EOS"]


@given(st.integers(0, 10**6))
def test_gap_figures(seed):
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=50)
    learned = 2 * exact + 1
    found = gap_figures(learned, exact)
    assert found["rmse"] == pytest.approx(math.sqrt(np.mean((exact + 1) ** 2)))
    assert found["correlation"] == pytest.approx(1.0) and found["tokens"] == 50
    assert found["r2"] == pytest.approx(1 - np.mean((exact + 1) ** 2) / exact.var())
    assert gap_figures(exact, exact)["r2"] == 1.0
    assert gap_figures(exact[:0], exact[:0]) == {"rmse": None, "correlation": None, "r2": None, "tokens": 0}


@pytest.mark.parametrize("seed", range(5))
def test_population_dpo_is_inverse_q_learning(seed):
    """Theorem 1, on tabular logits: the one minimiser of the exact DPO loss is pi*, and r comes back up to shaping."""
    generator = torch.Generator().manual_seed(seed)
    mdp = random_mdp(generator)
    mdp = replace(
        mdp, log_ref=(mdp.log_ref / 4).log_softmax(-1), reward=mdp.reward / 4
    )  # no response too rare to count
    beta = 0.5
    found, solution = fit(mdp, beta), solve(mdp, beta)
    reached = visits(mdp, mdp.log_ref) > 0
    assert torch.allclose(found.log_pi.exp()[reached], solution.log_pi.exp()[reached], atol=1e-5)
    assert torch.allclose(found.rewards[reached], implicit_rewards(mdp, solution, beta)[reached], atol=1e-5)
    shaped = shape(mdp, solution.V).reward  # Phi = V*: the class's one reward of the form beta log(pi/pi_ref)
    assert torch.allclose(found.rewards[reached], shaped[reached], atol=1e-5)
    assert -1e-12 < found.loss[-1] < 1e-10 and found.reward_gap[-1] < 1e-5 and found.policy_gap[-1] < 1e-5
