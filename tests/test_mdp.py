"""Backward induction against enumeration of every response, written without `minqstar.theory.mdp`."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minqstar.theory.mdp import (
    TokenMDP,
    bandit,
    hard_max,
    heights,
    implicit_rewards,
    rewards_of,
    shape,
    solve,
    tree,
    visits,
)
from minqstar.theory.mdp import responses as all_responses


def random_automaton(seed: int, states: int, width: int, zeros: bool):
    """arcs[s] = [(token, next, pi_ref, reward)]: a random acyclic automaton, every state reachable or not."""
    rng = random.Random(seed)
    arcs = []
    for s in range(states):
        n = rng.randint(1, width)
        weights = [rng.expovariate(1) for _ in range(n)]
        if zeros and n > 1 and rng.random() < 0.3:
            weights[rng.randrange(n)] = 0.0
        tokens = rng.sample(range(width), n)
        arcs.append(
            [
                (t, rng.randint(s + 1, states), w / sum(weights), rng.gauss(0, 2))
                for t, w in zip(tokens, weights, strict=True)
            ]
        )
    return arcs


def table(arcs) -> TokenMDP:
    S, A = len(arcs), max(map(len, arcs))
    token, nxt = torch.full((S, A), -1), torch.full((S, A), S)
    log_ref, reward = (torch.full((S, A), -torch.inf, dtype=torch.float64), torch.zeros(S, A, dtype=torch.float64))
    for s, row in enumerate(arcs):
        for a, (t, n, p, r) in enumerate(row):
            token[s, a], nxt[s, a], reward[s, a] = t, n, r
            log_ref[s, a] = math.log(p) if p else -math.inf
    return TokenMDP(token, nxt, log_ref, reward)


def responses(arcs, s=0):
    """Every path from s to the terminal state: (list of (state, action), log pi_ref, return)."""
    if s == len(arcs):
        yield [], 0.0, 0.0
        return
    for a, (_, n, p, r) in enumerate(arcs[s]):
        if p > 0:
            for path, log_ref, total in responses(arcs, n):
                yield [(s, a), *path], math.log(p) + log_ref, r + total


def brute_value(arcs, s, beta):
    """V*(s) = beta log sum over all completions of pi_ref(y) exp(R(y) / beta)."""
    terms = [log_ref + total / beta for _, log_ref, total in responses(arcs, s)]
    top = max(terms)
    return beta * (top + math.log(math.fsum(math.exp(t - top) for t in terms)))


cases = st.tuples(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 4), st.booleans())
betas = st.floats(-2, 2).map(lambda x: 10**x)


@given(cases, betas)
def test_values_and_policy_equal_enumeration(case, beta):
    arcs = random_automaton(*case)
    mdp = table(arcs)
    solution = solve(mdp, beta)
    scale = max(1.0, *(abs(brute_value(arcs, s, beta)) for s in range(len(arcs))))
    for s in range(len(arcs)):
        assert abs(solution.V[s].item() - brute_value(arcs, s, beta)) < 1e-9 * scale
    log_z = brute_value(arcs, 0, beta) / beta
    A_star = implicit_rewards(mdp, solution, beta)
    for path, log_ref, total in responses(arcs):
        log_pi = sum(solution.log_pi[s, a].item() for s, a in path)
        assert abs(log_pi - (log_ref + total / beta - log_z)) < 1e-9 * max(
            1, abs(log_pi), scale / beta
        )  # the bandit view
        telescoped = solution.V[0].item() + sum(A_star[s, a].item() for s, a in path)
        assert abs(telescoped - total) < 1e-9 * max(1, abs(total), scale)
    assert torch.isfinite(solution.V).all() and not torch.isnan(solution.Q).any() and not torch.isnan(A_star).any()
    assert torch.allclose(solution.log_pi.exp().sum(-1), torch.ones(len(arcs), dtype=torch.float64), atol=1e-9)


@given(cases, betas)
def test_visits_equal_enumeration(case, beta):
    arcs = random_automaton(*case)
    mdp = table(arcs)
    log_pi = solve(mdp, beta).log_pi
    expected = torch.zeros_like(log_pi)
    for path, _, _ in responses(arcs):
        p = math.exp(sum(log_pi[s, a].item() for s, a in path))
        for s, a in path:
            expected[s, a] += p
    assert torch.allclose(visits(mdp, log_pi), expected, atol=1e-9)


@given(cases, betas)
def test_a_batch_is_its_members(case, beta):
    mdp = table(random_automaton(*case))
    log_ref = torch.stack([mdp.log_ref, mdp.log_ref])
    both = solve(TokenMDP(mdp.token, mdp.next, log_ref, torch.stack([mdp.reward, -mdp.reward])), beta)
    assert torch.equal(both.V[0], solve(mdp, beta).V)
    assert torch.equal(both.V[1], solve(TokenMDP(mdp.token, mdp.next, mdp.log_ref, -mdp.reward), beta).V)


@given(cases)
def test_the_hard_maximum_is_the_best_response_from_each_state(case):
    arcs = random_automaton(*case)
    mdp = table(arcs)
    V, Q = hard_max(mdp)
    for s in range(len(arcs)):
        assert math.isclose(V[s].item(), max(total for _, _, total in responses(arcs, s)), abs_tol=1e-9)
        for a, (_, n, p, r) in enumerate(arcs[s]):
            assert math.isclose(Q[s, a].item(), r + V[n].item() if p else -math.inf, abs_tol=1e-9)
    tiny = solve(mdp, 1e-4)
    assert (V - tiny.V).abs().max() < 1e-4 * 60  # beta log of one response's pi_ref, at the most
    huge = solve(mdp, 1e9).log_pi
    support = mdp.log_ref > -torch.inf
    assert torch.allclose(huge[support], mdp.log_ref[support], atol=1e-6)


@given(cases, betas, st.integers(0, 10**6))
def test_rewards_and_q_are_in_bijection(case, beta, seed):
    """Lemma 1: r -> Q* -> r and Q -> r -> Q* return to where they began."""
    mdp = table(random_automaton(*case))
    support = mdp.log_ref > -torch.inf
    solution = solve(mdp, beta)
    scale = max(1.0, solution.Q[support].abs().max().item(), (beta * mdp.log_ref[support]).abs().max().item())
    assert torch.allclose(rewards_of(mdp, solution.Q, beta)[support], mdp.reward[support], atol=1e-10 * scale, rtol=0)
    Q = torch.randn(mdp.reward.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9
    Q = torch.where(support, Q, -torch.inf)
    again = solve(replace(mdp, reward=rewards_of(mdp, Q, beta)), beta).Q
    assert torch.allclose(again[support], Q[support], atol=1e-10 * scale, rtol=1e-9)
    assert (rewards_of(mdp, solution.Q, beta)[~support] == 0).all()


@given(cases, betas, st.integers(0, 10**6))
def test_shaping_changes_no_policy_and_moves_the_value_by_phi(case, beta, seed):
    """Definition 1, with Phi(terminal) = 0."""
    arcs = random_automaton(*case)
    mdp = table(arcs)
    phi = torch.randn(len(arcs) + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5
    phi[-1] = 0.0
    shaped = shape(mdp, phi)
    for s, row in enumerate(arcs):
        for a, (_, n, _, r) in enumerate(row):
            assert math.isclose(shaped.reward[s, a].item(), r + phi[n].item() - phi[s].item(), abs_tol=1e-12)
    before, after = solve(mdp, beta), solve(shaped, beta)
    scale = max(1.0, before.Q[before.Q.isfinite()].abs().max().item(), phi.abs().max().item()) / min(beta, 1.0)
    assert torch.allclose(before.log_pi.exp(), after.log_pi.exp(), atol=1e-10 * scale)
    assert torch.allclose(after.V, before.V - phi, atol=1e-10 * scale)
    with pytest.raises(ValueError, match="terminal"):
        shape(mdp, phi + 1)


@given(cases, betas)
def test_all_responses_and_their_distribution(case, beta):
    arcs = random_automaton(*case)
    mdp = table(arcs)
    paths = all_responses(mdp)
    found = {}
    for path, log_ref, total in responses(arcs):
        found[tuple(path)] = (log_ref, total)
    log_pi, log_Z = bandit(mdp, paths, beta)
    assert math.isclose(log_Z.item(), brute_value(arcs, 0, beta) / beta, rel_tol=1e-9, abs_tol=1e-9)
    for i in range(len(paths.states)):
        keep = paths.scored[i]
        path = tuple(zip(paths.states[i][keep].tolist(), paths.actions[i][keep].tolist(), strict=True))
        if path not in found:
            assert paths.along(mdp.log_ref)[i].sum() == -math.inf and log_pi[i] == -math.inf
            continue
        log_ref, total = found.pop(path)
        assert (paths.actions[i][~keep] == 0).all() and (paths.states[i][~keep] == len(arcs)).all()
        assert math.isclose(paths.along(mdp.log_ref)[i].sum().item(), log_ref, rel_tol=1e-9, abs_tol=1e-9)
        assert math.isclose(paths.along(mdp.reward)[i].sum().item(), total, rel_tol=1e-9, abs_tol=1e-9)
        expected = log_ref + total / beta - log_Z.item()
        assert math.isclose(log_pi[i].item(), expected, rel_tol=1e-9, abs_tol=1e-9 * max(1, abs(total) / beta))
    assert not found


@pytest.mark.parametrize(("num_tokens", "horizon"), [(1, 0), (1, 4), (2, 3), (3, 3)])
def test_a_tree_spells_every_string_once(num_tokens, horizon):
    token, next = tree(num_tokens, horizon)
    log_ref = torch.where(token >= 0, 0.0, -torch.inf).double().log_softmax(-1)
    mdp = TokenMDP(token, next, log_ref, torch.zeros_like(log_ref))
    paths = all_responses(mdp)
    spelled = [
        tuple(token[s, a].item() for s, a, real in zip(*row, strict=True) if real)
        for row in zip(paths.states.tolist(), paths.actions.tolist(), paths.scored.tolist(), strict=True)
    ]
    strings = [s for n in range(horizon + 1) for s in itertools.product(range(num_tokens), repeat=n)]
    assert sorted(spelled) == sorted((*s, num_tokens) for s in strings)


def test_two_million_states_are_solved_in_seconds():
    """The tree over six tokens to depth eight, against the closed form of a reward that counts one token."""
    token, next = tree(6, 8)
    assert len(token) == 2_015_539
    log_ref = torch.where(token >= 0, 0.0, -torch.inf).double().log_softmax(-1)
    mdp = TokenMDP(token, next, log_ref, (token == 0).double())
    value = 0.0
    for _ in range(8):  # from the deepest inner states up: EOS, token 0 which pays 1, five others
        value = math.log((1 + math.exp(1 + value) + 5 * math.exp(value)) / 7)
    assert math.isclose(solve(mdp, 1.0).V[0].item(), value, rel_tol=1e-12)


def test_levels_cover_every_state_once_and_need_only_earlier_ones():
    mdp = table(random_automaton(5, 30, 4, False))
    levels = heights(mdp)
    assert sorted(torch.cat(levels).tolist()) == list(range(30))
    done = {30}
    for level in levels:
        assert {
            n
            for s in level.tolist()
            for n, t in zip(mdp.next[s].tolist(), mdp.token[s].tolist(), strict=True)
            if t >= 0
        } <= done
        done |= set(level.tolist())


def test_bad_input_is_refused():
    mdp = table([[(0, 1, 0.5, 0.0), (1, 1, 0.5, 0.0)], [(0, 2, 1.0, 0.0)]])
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="beta"):
            solve(mdp, beta)
    with pytest.raises(ValueError, match="topological"):
        TokenMDP(mdp.token, torch.zeros_like(mdp.next), mdp.log_ref, mdp.reward)
    with pytest.raises(ValueError, match="shape"):
        TokenMDP(mdp.token, mdp.next, mdp.log_ref, mdp.reward[0])
    for value in (math.nan, math.inf):
        reward = mdp.reward.clone()
        reward[1, 0] = value
        with pytest.raises(ValueError, match="reward is not finite at action 0, state 1"):
            solve(replace(mdp, reward=reward), 1.0)
    log_ref = mdp.log_ref.clone()
    log_ref[0, 1] = math.log(0.4)
    with pytest.raises(ValueError, match="does not sum to one at state 0"):
        solve(replace(mdp, log_ref=log_ref), 1.0)
    log_ref[1, 1] = math.log(0.1)
    with pytest.raises(ValueError, match="no action, at action 1, state 1"):
        solve(replace(mdp, log_ref=log_ref), 1.0)
    batch = replace(mdp, log_ref=torch.stack([mdp.log_ref, log_ref]), reward=torch.stack([mdp.reward] * 2))
    with pytest.raises(ValueError, match="state 1, MDP 1"):
        solve(batch, 1.0)
