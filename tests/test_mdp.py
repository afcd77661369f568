"""Backward induction against enumeration of every response, written without `minqstar.mdp`."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minqstar.mdp import TokenMDP, heights, implicit_rewards, solve, visits


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
    log_ref, reward = (
        torch.full((S, A), -torch.inf, dtype=torch.float64),
        torch.zeros(S, A, dtype=torch.float64),
    )
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


def test_limits_of_beta():
    arcs = random_automaton(3, 6, 3, False)
    mdp = table(arcs)
    hard = max(total for _, _, total in responses(arcs))
    assert abs(solve(mdp, 1e-6).V[0].item() - hard) < 1e-4
    real = mdp.token >= 0
    assert torch.allclose(solve(mdp, 1e9).log_pi[real], mdp.log_ref[real], atol=1e-6)


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
    mdp = table([[(0, 1, 1.0, 0.0)]])
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta"):
            solve(mdp, beta)
    with pytest.raises(ValueError, match="topological"):
        TokenMDP(mdp.token, torch.tensor([[0]]), mdp.log_ref, mdp.reward)
    with pytest.raises(ValueError, match="shape"):
        TokenMDP(mdp.token, mdp.next, mdp.log_ref, mdp.reward[0])
