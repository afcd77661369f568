"""A refiner and a generator (Appendix D), against enumeration of every (z, y) written without the solver."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_mdp import random_automaton, table
from test_mdp import responses as every_path

from minqstar.theory.cases import parts_betas, random_parts
from minqstar.theory.mdp import TokenMDP, solve, visits
from minqstar.theory.parts import ends, same_answer, then, unseen_thought
from minqstar.theory.paths import responses
from minqstar.theory.tabular import Population, fit

betas = st.floats(-2, 2).map(lambda x: 10**x)


def soft(pairs, beta):
    """beta log sum_i p_i exp(v_i / beta) of (p, v)."""
    top = max(v for _, v in pairs)
    return top + beta * math.log(math.fsum(p * math.exp((v - top) / beta) for p, v in pairs))


@given(st.integers(0, 10**6), betas, betas)
def test_glued_tables_are_two_bandits_one_in_the_other(seed, gamma, beta):
    """Any first, any seconds of any sizes: every (z, y) once, V* and pi* by enumeration, nested as they are."""
    first = random_automaton(seed, 3, 3, False)
    heads = [(s, a) for s, row in enumerate(first) for a, arc in enumerate(row) if arc[1] == len(first)]
    seconds = [random_automaton(seed + 1 + i, 1 + (seed + i) % 3, 1 + (seed + i) % 4, False) for i in range(len(heads))]
    ending = table(first)
    mdp = then(ending, [table(arcs) for arcs in seconds])
    assert [(s, a) for s, a in zip(*map(torch.Tensor.tolist, ends(ending)), strict=True)] == heads
    assert mdp.num_states == len(first) + sum(map(len, seconds))
    absent = ~mdp.support
    assert (mdp.token[absent] == -1).all() and (mdp.reward[absent] == 0).all()
    solution = solve(mdp, parts_betas(mdp, ending, (gamma, beta)))
    worth = [soft([(math.exp(lp), r) for _, lp, r in every_path(arcs)], beta) for arcs in seconds]
    thoughts = [(heads.index(path[-1]), math.exp(lp), r) for path, lp, r in every_path(first)]
    V0 = soft([(p, r + worth[i]) for i, p, r in thoughts], gamma)
    scale = max(1.0, *map(abs, worth), abs(V0), *(abs(r) for *_, r in thoughts))
    assert math.isclose(solution.V[0].item(), V0, abs_tol=1e-9 * scale)
    starts = [len(first) + sum(map(len, seconds[:i])) for i in range(len(seconds))]
    for start, value in zip(starts, worth, strict=True):
        assert math.isclose(solution.V[start].item(), value, abs_tol=1e-9 * scale)
    found = {}
    paths = responses(mdp)
    for i in range(len(paths.states)):
        on = paths.scored[i]
        steps = list(zip(paths.states[i][on].tolist(), paths.actions[i][on].tolist(), strict=True))
        found[tuple(steps)] = (paths.along(mdp.reward)[i].sum().item(), paths.along(solution.log_pi)[i].sum().item())
    for z, log_z, of_z in every_path(first):
        i = heads.index(z[-1])
        for y, log_y, of_y in every_path(seconds[i]):
            total, log_pi = found.pop((*z, *((starts[i] + s, a) for s, a in y)))
            assert math.isclose(total, of_z + of_y, abs_tol=1e-9 * scale)
            expected = log_z + (of_z + worth[i] - V0) / gamma + log_y + (of_y - worth[i]) / beta
            assert math.isclose(log_pi, expected, abs_tol=1e-9 * max(1, abs(expected), scale / min(gamma, beta)))
    assert not found  # and no other


@given(st.integers(0, 10**6), betas, betas)
def test_together_they_get_what_neither_gets_alone(seed, gamma, beta):
    """Refiner alone, generator alone and both are three solves of one table, and both get the most."""
    generator = torch.Generator().manual_seed(seed)
    first, seconds = random_parts(generator)
    mdp = then(first, seconds)
    both, is_first = parts_betas(mdp, first, (gamma, beta)), torch.arange(mdp.num_states) < first.num_states
    joint, no_generator, no_refiner, none = (
        solve(replace(mdp, chance=frozen), both).V[0].item()
        for frozen in (None, ~is_first, is_first, torch.ones_like(is_first))
    )
    slack = 1e-9 * max(1, abs(joint))
    assert joint >= max(no_generator, no_refiner) - slack and min(no_generator, no_refiner) >= none - slack


def some_parts(seed: int, letters: int = 2) -> tuple[TokenMDP, TokenMDP]:
    """Two temperatures' worth of random tables: two or three z, and strings y that are worth the same after any."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        first, seconds = random_parts(generator)
        mdp = then(first, seconds)
        if seconds[0].num_states > 1 and len(seconds) == letters + 1 and len(mdp.token) < 20:
            tame = lambda m: replace(m, log_ref=(m.log_ref / 4).log_softmax(-1), reward=m.reward / 4)  # noqa: E731
            return first, tame(mdp)


@pytest.mark.parametrize("seed", range(2))
def test_pairs_of_z_and_y_lead_to_the_joint_optimum(seed):
    """Eq. 17, 18: gamma log(pi/pi_ref)(z) + beta log(pi/pi_ref)(y | z) fitted on pairs of (z, y)."""
    first, mdp = some_parts(seed)
    both = parts_betas(mdp, first, (1.3, 0.4))
    found = fit(mdp, both, 60)
    assert found.policy_gap[-1] < 1e-5 and found.reward_gap[-1] < 1e-5 and abs(found.loss[-1]) < 1e-10
    assert (found.log_pi.exp() - solve(mdp, 0.4).log_pi.exp()).abs().max() > 0.01  # one temperature is another optimum


def test_where_z_is_unobserved_only_the_answers_are_settled():
    """The loss on log sum_z. One temperature: pi*'s distribution of y, by many policies. Two: not the optimum's."""
    first, mdp = some_parts(0)
    paths = responses(mdp)
    gives = same_answer(mdp, paths, first.num_states)
    log_ref, R = paths.along(mdp.log_ref).sum(-1), paths.along(mdp.reward).sum(-1)
    labels = R[gives.int().argmax(-1)]
    assert torch.allclose(gives.double().T @ labels, R)  # an answer is worth the same after any z
    drawn = gives.double() @ log_ref.exp()

    def answers(log_pi: torch.Tensor) -> torch.Tensor:
        return gives.double() @ paths.along(log_pi.masked_fill(~mdp.support, 0.0)).sum(-1).exp()

    def distance(gamma: float, beta: float) -> tuple[float, float]:
        """How far the fit is from the optimum's answers, and from the optimum itself."""
        both = parts_betas(mdp, first, (gamma, beta))
        score = lambda rewards: unseen_thought(paths.along(rewards / both[:, None]).sum(-1), log_ref, gives, beta)  # noqa: E731
        found = fit(mdp, both, 40, Population(torch.outer(drawn, drawn), labels, score))
        assert abs(found.loss[-1]) < 1e-10  # no loss could be less
        return (answers(found.log_pi) - answers(solve(mdp, both).log_pi)).abs().max().item(), found.policy_gap[-1]

    of_answers, of_policy = distance(0.4, 0.4)
    assert of_answers < 1e-5 and of_policy > 0.05
    assert distance(5.0, 0.4)[0] > 1e-3


def test_answers_are_told_apart_by_their_tokens():
    """By hand: z is 0 or nothing, y is 0 or nothing; EOS is 1."""
    one = table([[(0, 1, 0.5, 0.0), (1, 2, 0.5, 0.0)], [(1, 2, 1.0, 0.0)]])  # "0 EOS" or "EOS"
    mdp = then(one, [one, one])
    assert mdp.token.tolist() == [[0, 1], [1, -1]] * 3
    assert mdp.next.tolist() == [[1, 2], [4, 6], [3, 6], [6, 6], [5, 6], [6, 6]]
    assert mdp.own.all() and mdp.log_ref[1].tolist() == [0.0, -math.inf]
    paths = responses(mdp)
    gives = same_answer(mdp, paths, 2)
    assert gives.shape == (2, 4) and (gives.sum(0) == 1).all() and gives.sum(1).tolist() == [2, 2]
    long = paths.scored.sum(-1) - (paths.states < 2).sum(-1) == 2  # y is "0 EOS"
    assert any(torch.equal(row, long) for row in gives)
    ratio = torch.tensor([0.1, -0.2, 0.3, 0.4], dtype=torch.float64)
    found = unseen_thought(ratio, paths.along(mdp.log_ref).sum(-1), gives, 2.0)
    for row, value in zip(gives, found.tolist(), strict=True):  # all four are equally likely
        assert math.isclose(value, 2 * math.log(ratio[row].exp().mean()))
    kept = then(
        replace(one, chance=torch.tensor([True, False])), [one, replace(one, chance=torch.tensor([False, True]))]
    )
    assert kept.chance.tolist() == [True, False, False, False, False, True]


def test_what_does_not_fit_together_is_refused():
    one = table([[(0, 1, 0.5, 0.0), (1, 2, 0.5, 0.0)], [(1, 2, 1.0, 0.0)]])
    for seconds in ([], [one], [one] * 3):
        with pytest.raises(ValueError, match=f"the first has 2 ends, but there are {len(seconds)} seconds to begin"):
            then(one, seconds)
    batch = replace(one, log_ref=torch.stack([one.log_ref] * 2), reward=torch.stack([one.reward] * 2))
    with pytest.raises(ValueError, match=r"batches of one shape, got \[\(\), \(2,\)\]"):
        then(one, [one, batch])
    glued = then(batch, [batch, batch])
    assert torch.equal(solve(glued, 0.7).V[1], solve(then(one, [one, one]), 0.7).V)
    assert (visits(glued, glued.log_ref)[0] >= 0).all()
