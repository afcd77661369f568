"""Where the league's methods go with all data: pi* for those that are consistent, closed forms where there are any."""

import itertools

import pytest
import torch

from minqstar.lab.league import limits as league
from minqstar.lab.league.limits import BETA, LIMITS, Table, limits, small_table
from minqstar.theory import methods
from minqstar.theory.mdp import solve
from minqstar.theory.tabular import fit

CONSISTENT = "dpo plackett_luce tbrm step reward_head ppo rto".split()  # in the order of the table


@pytest.fixture(scope="module", params=[(1, 0), (2, 1)], ids=["smallest", "two tokens"])
def table(request) -> Table:
    return Table(small_table(*request.param))


def law(table: Table, log_pi: torch.Tensor) -> torch.Tensor:
    """pi(y) (N,)."""
    return table.paths.along(torch.where(table.mdp.support, log_pi, 0.0)).sum(-1).exp()


def test_the_table_says_how_far_from_the_optimum_each_method_ends():
    found = limits([small_table(1, 0)])
    assert list(found) == "dpo plackett_luce rpo ipo tdpo kto simpo cpl tbrm step reward_head ppo rto".split()
    assert [name for name, entry in found.items() if entry["gap"] < 1e-5] == CONSISTENT
    assert all(entry["goes_to"] for entry in found.values())


@pytest.mark.parametrize("name", CONSISTENT)
def test_consistent_methods_reach_the_optimum(table, name):
    assert torch.allclose(LIMITS[name][0](table).exp(), solve(table.mdp, BETA).log_pi.exp(), atol=1e-5)


def test_ipo_and_cpl_reach_their_closed_forms(table):
    log_pi = {name: LIMITS[name][0](table) for name in ("ipo", "cpl")}
    expected = (table.log_ref + table.wins.sum(-1) / league.IPO_BETA).softmax(-1)
    assert torch.allclose(law(table, log_pi["ipo"]), expected, atol=1e-6)
    assert torch.allclose(law(table, log_pi["cpl"]), (table.returns / BETA).softmax(-1), atol=1e-5)


def test_simpo_counts_a_return_as_often_as_it_has_tokens(table):
    """Without its margin: mean log pi = (R + c)/beta. With it, two responses are farther apart than their returns."""
    off = [
        league.SIMPO_BETA * law(table, league.simpo(table, gamma)).log() / table.length - table.returns
        for gamma in (0.0, league.SIMPO_GAMMA)
    ]
    assert (off[0].max() - off[0].min()).item() < 1e-5
    best, worst = table.returns.argmax(), table.returns.argmin()
    assert off[1][best] - off[1][worst] > 0.1


def test_what_kto_calls_undesirable_more_often_than_not_dies_out(table):
    """And the others' implicit return has (2q - 1) sigmoid'(R - z) in proportion to exp(R / beta)."""
    pi, q = law(table, LIMITS["kto"][0](table)), table.wins.sum(-1)
    returns = BETA * (pi.log() - table.log_ref)
    z = (pi * returns).sum()
    good = q > 0.5
    assert 0 < pi[~good].sum() < 1e-6 < 0.1 < table.drawn[~good].sum()
    p = torch.sigmoid(returns - z)
    force = ((2 * q - 1) * p * (1 - p) / (returns / BETA).exp())[good]
    assert force.max() / force.min() == pytest.approx(1, abs=1e-4) and good.sum() >= 2


def test_tdpo_ends_where_its_gradient_is_0_nearer_to_pi_ref(table):
    """The gradient pair by pair, of which the chosen's KL has no part."""
    found, exact, on = LIMITS["tdpo"][0](table), solve(table.mdp, BETA).log_pi, table.mdp.support
    logits = torch.where(on, found, 0.0).requires_grad_()
    ratio = torch.where(on, table.log_pi(logits) - table.mdp.log_ref, 0.0)
    kl = -(table.mdp.log_ref.exp() * ratio).sum(-1, keepdim=True).expand_as(ratio)
    moved, kl = (table.paths.along(t).sum(-1) for t in (ratio, kl))
    loss = 0.0
    for i, j in itertools.product(range(len(moved)), repeat=2):
        chance = table.drawn[i] * table.drawn[j] * torch.sigmoid(table.returns[i] - table.returns[j])
        loss += chance * methods.tdpo(moved[[i, j]], torch.zeros(2), kl[[i, j]], BETA, league.TDPO_ALPHA)[0]
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-7
    far = [(table.drawn * (table.log_ref - law(table, log_pi).log())).sum().item() for log_pi in (found, exact)]
    assert 0 < far[0] < 0.8 * far[1]  # KL(pi_ref || pi)


def test_rpo_is_pulled_to_the_law_of_the_chosen(table, monkeypatch):
    """A weight without bound leads to it: each response as often as it is chosen, weighed by 1/|y|."""
    monkeypatch.setattr(league, "SFT_WEIGHT", 1e5)
    chosen = table.drawn * table.wins.sum(-1) / table.length
    flow = torch.zeros_like(table.mdp.reward)
    for states, actions, scored, mass in zip(*table.paths, chosen, strict=True):
        flow[states[scored], actions[scored]] += mass
    assert torch.allclose(league.rpo(table).exp(), flow / flow.sum(-1, keepdim=True), atol=1e-3)


def test_rto_stays_where_dpo_is(table):
    assert torch.allclose(LIMITS["rto"][0](table).exp(), fit(table.mdp, BETA, 50).log_pi.exp(), atol=1e-9)
