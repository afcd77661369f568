"""The checker says yes to what is true and no to what is not."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st

from minqstar.runchecks import RUN_FAULTS, RunClaim, cached_logps, check_run
from minqstar.theory.cases import random_claims, random_mdp
from minqstar.theory.faults import FAULTS, check_faults, fault_claim
from minqstar.theory.identities import IDENTITIES, Result, check_claims, gap
from minqstar.theory.mdp import implicit_rewards, shape, solve, visits
from minqstar.theory.qfunction import gap_figures
from minqstar.theory.tabular import fit
from minqstar.training.data import Group, PackedData
from minqstar.training.scoring import weights_hash

EOS, PAD = 21, 22


@given(st.integers(0, 2**40))
def test_true_claims_pass(seed):
    for result in check_claims(list(random_claims(4, seed))):
        assert result.passed and result.cases == 4, result


def test_every_fault_is_flagged_and_the_sound_claim_is_not():
    assert all(result.passed for result in check_claims([fault_claim()]))
    flagged = {fault.name: fault.flagged_by for fault in check_faults()}
    assert flagged.keys() == FAULTS.keys() and all(flagged.values())
    assert set().union(*flagged.values()) == IDENTITIES.keys()  # no identity is idle


@pytest.mark.parametrize(
    ("fault", "by"),
    [
        ("mask off by one", "telescoping"),
        ("dropped EOS", "DPO loss"),
        ("truncated taken for terminal", "Bellman"),
        ("mean in place of sum", "bandit view"),
        ("wrong beta", "bandit view"),
        ("bf16 reference", "implicit reward"),
        ("reference moves with the policy", "implicit reward"),
        ("V(terminal) is not 0", "Bellman"),
        ("a constant on V and Q, terminal too", "telescoping"),
        ("NaN in Q", "value of Q*"),
    ],
)
def test_a_fault_is_flagged_by_the_identity_that_it_breaks(fault, by):
    results = {result.id: result for result in check_claims([FAULTS[fault](fault_claim())])}
    assert not results[by].passed


def test_mass_off_the_support_is_named():
    results = {r.id: r for r in check_claims([FAULTS["mass off the reference's support"](fault_claim())])}
    assert results["implicit reward"].note == "the policy has mass where the reference has none, at action 0, state 0"
    assert not results["implicit reward"].passed


def test_a_shifted_constant_passes_the_local_identities():
    """It shows only against an oracle: this is why the check has one."""
    results = {r.id: r for r in check_claims([FAULTS["a constant on V and Q, terminal too"](fault_claim())])}
    assert results["policy of Q*"].passed and results["value of Q*"].passed and results["implicit reward"].passed


def test_one_bad_claim_among_many_fails_and_nan_fails():
    claims = [*random_claims(5, 1), FAULTS["wrong beta"](fault_claim())]
    assert not all(result.passed for result in check_claims(claims))
    assert not Result("x", "", 1, math.nan, 1e-9).passed
    assert math.isnan(gap(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 1.0])))
    assert gap(torch.tensor([math.inf]), torch.tensor([math.inf])) == 0.0
    assert gap(torch.tensor([1e6 + 1.0]), torch.tensor([1e6])) == pytest.approx(1e-6)


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
