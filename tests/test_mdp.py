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
    hard_max,
    heights,
    implicit_rewards,
    luck,
    rewards_of,
    shape,
    solve,
    tree,
    visits,
)
from minqstar.theory.paths import bandit, segment
from minqstar.theory.paths import responses as all_responses


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


def recursive_value(arcs, s, beta, chance):
    """V*(s), from lists: a temperature for each state, and whether the environment draws there."""
    if s == len(arcs):
        return 0.0
    worth = [(p, r + recursive_value(arcs, n, beta, chance)) for _, n, p, r in arcs[s] if p]
    if chance[s]:
        return math.fsum(p * v for p, v in worth)
    top = max(v for _, v in worth)
    return top + beta[s] * math.log(math.fsum(p * math.exp((v - top) / beta[s]) for p, v in worth))


def in_parts(arcs, seed):
    """A temperature and a flag, whether the environment draws, for each state."""
    rng = random.Random(seed)
    return [10 ** rng.uniform(-2, 2) for _ in arcs], [rng.random() < 0.4 for _ in arcs]


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


@given(cases, st.integers(0, 10**6))
def test_temperatures_and_chance_equal_enumeration(case, seed):
    """V*, pi* and, on every path, R = V*(s_0) + sum beta(s) log(pi*/pi_ref) + luck, luck from the recursion alone."""
    arcs = random_automaton(*case)
    beta, chance = in_parts(arcs, seed)
    mdp = replace(table(arcs), chance=torch.tensor(chance))
    temperatures = torch.tensor(beta, dtype=torch.float64)
    solution = solve(mdp, temperatures)
    V = [recursive_value(arcs, s, beta, chance) for s in range(len(arcs) + 1)]
    scale = max(1.0, *map(abs, V), solution.Q[solution.Q.isfinite()].abs().max().item())
    assert torch.allclose(solution.V, torch.tensor(V, dtype=torch.float64), atol=1e-10 * scale)
    A_star, fortune = implicit_rewards(mdp, solution, temperatures), luck(mdp, solution)
    mean = 0.0
    for path, log_ref, total in responses(arcs):
        lucky = sum(arcs[s][a][3] + V[arcs[s][a][1]] - V[s] for s, a in path if chance[s])
        assert math.isclose(sum(fortune[s, a].item() for s, a in path), lucky, abs_tol=1e-9 * scale)
        earned = sum(A_star[s, a].item() for s, a in path)
        assert math.isclose(V[0] + earned + lucky, total, abs_tol=1e-9 * max(scale, abs(total)))
        log_pi = log_ref + sum(A_star[s, a].item() / beta[s] for s, a in path)
        mean += math.exp(log_pi) * lucky
        assert math.isclose(sum(solution.log_pi[s, a].item() for s, a in path), log_pi, abs_tol=1e-9 * max(1, -log_pi))
    assert abs(mean) < 1e-9 * scale  # the environment's luck evens out
    for s in range(len(arcs)):
        if chance[s]:
            assert torch.equal(solution.log_pi[s], mdp.log_ref[s]) and (A_star[s] == 0).all()
        else:
            assert (fortune[s] == 0).all()
    assert (solution.Q[~mdp.support] == -math.inf).all() and solution.Q[mdp.support].isfinite().all()
    again = rewards_of(mdp, solution.Q, temperatures)
    assert torch.allclose(again[mdp.support], mdp.reward[mdp.support], atol=1e-10 * scale) and not again.isnan().any()
    V_hard, _ = hard_max(mdp)
    cold = solve(mdp, 1e-4).V
    assert (V_hard - cold).abs().max() < 1e-4 * 60 * len(arcs)


@given(cases, st.integers(0, 10**6))
def test_a_batch_of_temperatures_is_its_members(case, seed):
    arcs = random_automaton(*case)
    one = replace(table(arcs), chance=torch.tensor(in_parts(arcs, seed)[1]))
    two = replace(one, reward=-one.reward)
    both = replace(one, log_ref=torch.stack([one.log_ref, two.log_ref]), reward=torch.stack([one.reward, two.reward]))
    betas = torch.tensor([in_parts(arcs, seed)[0], in_parts(arcs, seed + 1)[0]], dtype=torch.float64)
    solution = solve(both, betas)
    for i, mdp in enumerate((one, two)):
        alone = solve(mdp, betas[i])
        for of_both, of_one in zip(solution, alone, strict=True):
            assert torch.equal(of_both[i], of_one)
        assert torch.equal(rewards_of(both, solution.Q, betas)[i], rewards_of(mdp, alone.Q, betas[i]))
        assert torch.equal(implicit_rewards(both, solution, betas)[i], implicit_rewards(mdp, alone, betas[i]))
        assert torch.equal(luck(both, solution)[i], luck(mdp, alone))
        assert torch.equal(hard_max(both)[0][i], hard_max(mdp)[0])


@given(cases, betas)
def test_where_the_environment_draws_the_bandit_view_promises_too_much(case, beta):
    """beta log E_ref exp(R/beta), which takes luck for a choice, is above V*(s_0), unless there is no luck."""
    arcs = random_automaton(*case)
    _, chance = in_parts(arcs, case[0])
    mdp = replace(table(arcs), chance=torch.tensor(chance))
    solution = solve(mdp, beta)
    reached = visits(mdp, mdp.log_ref) > 0
    spread = luck(mdp, solution)[reached].abs().max().item()
    promised, scale = brute_value(arcs, 0, beta), max(1, solution.V.abs().max().item())
    assert promised >= solution.V[0].item() - 1e-9 * scale
    if spread < 1e-12:
        assert math.isclose(promised, solution.V[0].item(), abs_tol=1e-9 * scale)
    if spread > 0.1:
        assert promised > solution.V[0].item()


@given(cases)
def test_a_large_beta_freezes_a_state_and_chance_is_its_limit(case):
    arcs = random_automaton(*case)
    mdp, frozen = table(arcs), torch.tensor(in_parts(arcs, case[0])[1])
    limit = solve(replace(mdp, chance=frozen), 0.7)

    def off(large: float) -> float:
        return (solve(mdp, torch.where(frozen, torch.tensor(large).double(), 0.7)).V - limit.V).abs().max().item()

    assert off(1e6) < 1e-3 and abs(off(1e4) - 10 * off(1e5)) < 1e-2 * off(1e4) + 1e-8  # it nears it as 1 / beta
    hot = solve(mdp, torch.where(frozen, torch.tensor(1e9).double(), 0.7)).log_pi
    assert torch.allclose(hot[frozen].exp(), mdp.log_ref[frozen].exp(), atol=1e-6)


@given(cases, betas)
def test_without_a_reference_it_is_the_entropy_that_counts(case, beta):
    """log pi_ref = 0: V*(s_0) = beta log sum_y exp(R(y)/beta), and E_pi*[R] + beta H(pi*) is it."""
    arcs = random_automaton(*case[:3], False)
    mdp = table(arcs)
    mdp = replace(mdp, log_ref=torch.where(mdp.support, 0.0, -torch.inf).double())
    returns = torch.tensor([total for _, _, total in responses(arcs)], dtype=torch.float64)
    solution = solve(mdp, beta)
    V0, scale = solution.V[0].item(), max(1.0, returns.abs().max().item(), beta)
    assert math.isclose(V0, beta * (returns / beta).logsumexp(0).item(), abs_tol=1e-9 * scale)
    p = (returns / beta).softmax(0)
    entropy = torch.special.entr(p).sum().item()
    assert math.isclose(V0, (p @ returns).item() + beta * entropy, abs_tol=1e-9 * scale)
    with pytest.raises(ValueError, match="environment's law does not sum to one at state 0"):
        both = TokenMDP(
            torch.tensor([[0, 1]]), torch.tensor([[1, 1]]), torch.zeros(1, 2).double(), torch.zeros(1, 2).double()
        )
        solve(replace(both, chance=torch.tensor([True])), beta)


def test_a_segment_is_a_piece():
    """Truncated is not terminal: r of a piece + V*(its end) - V*(its start) is what its tokens' rewards add up to."""
    mdp = table(random_automaton(3, 6, 3, False))
    paths, solution = all_responses(mdp), solve(mdp, 0.6)
    A_star, lengths = implicit_rewards(mdp, solution, 0.6), paths.scored.sum(-1)
    for start in range(int(lengths.max())):
        for stop in range(start + 1, int(lengths.max()) + 1):
            some = [t[lengths >= stop] for t in paths]
            whole = type(paths)(*some)
            first, last = torch.full((len(some[0]),), start), torch.full((len(some[0]),), stop)
            piece = segment(mdp, whole, first, last)
            assert torch.equal(piece.scored.sum(-1), last - first)
            assert (piece.states[~piece.scored] == 6).all() and (piece.actions[~piece.scored] == 0).all()
            states, actions = whole.states[:, start:stop], whole.actions[:, start:stop]
            assert torch.equal(piece.along(mdp.reward).sum(-1), mdp.reward[states, actions].sum(-1))
            ends = solution.V[mdp.next[states[:, -1], actions[:, -1]]] - solution.V[states[:, 0]]
            assert torch.allclose(piece.along(mdp.reward).sum(-1) + ends, piece.along(A_star).sum(-1), atol=1e-12)
    L, three = lengths[:1], type(paths)(*(t[:1] for t in paths))
    for start, stop in ((torch.tensor([0]), L + 1), (L, L), (torch.tensor([-1]), L), (L - 1, L - 2)):
        with pytest.raises(ValueError, match=f"segment 0, tokens {start[0]} to {stop[0]}, is no piece of a response"):
            segment(mdp, three, start, stop)
    token, next = tree(2, 2)
    mdp = TokenMDP(token, next, torch.zeros(token.shape).double(), torch.zeros(token.shape).double())
    paths = all_responses(mdp)
    lengths = paths.scored.sum(-1)
    assert lengths[2] < lengths.max()
    over = lengths + (torch.arange(len(lengths)) > 1)  # all but the first two: the third is named
    with pytest.raises(ValueError, match=f"segment 2, tokens 0 to {over[2]}, .* a response of {lengths[2]}$"):
        segment(mdp, paths, torch.zeros_like(over), over)


def test_temperatures_chance_and_laws_that_make_no_sense_are_refused():
    mdp = table([[(0, 1, 0.5, 0.0), (1, 1, 0.5, 0.0)], [(0, 2, 1.0, 0.0)]])
    one, solution = torch.ones(2, dtype=torch.float64), solve(mdp, 1.0)
    for bad in (0.0, -1.0, math.nan, math.inf):
        calls = (solve, lambda m, b: rewards_of(m, m.reward, b), lambda m, b: implicit_rewards(m, solution, b))
        for call in calls:
            with pytest.raises(ValueError, match=r"beta must be positive and finite, got .* at state 1"):
                call(mdp, torch.tensor([1.0, bad], dtype=torch.float64))
    with pytest.raises(ValueError, match="beta has 3 entries for 1 states"):
        solve(table([[(0, 1, 0.5, 0.0), (1, 1, 0.5, 0.0)]]), torch.ones(3))
    paths, in_one = all_responses(mdp), replace(mdp, chance=torch.tensor([False, True]))
    for of, beta, message in (
        (mdp, one, "the bandit view needs one beta"),
        (in_one, 1.0, "no state in which the environment draws"),
        (mdp, -1.0, "beta must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            bandit(of, paths, beta)
    assert torch.equal(bandit(mdp, paths, one[0])[0], bandit(mdp, paths, 1.0)[0])
    for chance in (torch.tensor([True]), torch.tensor([1, 0]), torch.tensor([[True], [False]])):
        with pytest.raises(ValueError, match="chance must be one bool for each of the 2 states"):
            replace(mdp, chance=chance)
    log_ref = mdp.log_ref.clone()
    log_ref[1] = -torch.inf
    with pytest.raises(ValueError, match="the environment's law does not sum to one at state 1"):
        solve(replace(mdp, log_ref=log_ref, chance=torch.tensor([False, True])), 1.0)
    with pytest.raises(ValueError, match="pi_ref does not sum to one at state 1"):
        solve(replace(mdp, log_ref=log_ref), 1.0)
    log_ref = torch.where(mdp.support, 0.0, -torch.inf).double()
    assert solve(replace(mdp, log_ref=log_ref), 1.0).V[0] == pytest.approx(math.log(2))
    for entry, message in ((-math.inf, "pi_ref does not sum to one"), (math.nan, "pi_ref is NaN")):
        broken = log_ref.clone()
        broken[1, 0] = entry  # where all else is as if there were no reference
        with pytest.raises(ValueError, match=message):
            solve(replace(mdp, log_ref=broken), 1.0)
    log_ref[0, 0] = -0.1  # neither a distribution nor the absence of one
    with pytest.raises(ValueError, match="pi_ref does not sum to one at state 0"):
        solve(replace(mdp, log_ref=log_ref), 1.0)


def test_bad_input_is_refused():
    mdp = table([[(0, 1, 0.5, 0.0), (1, 1, 0.5, 0.0)], [(0, 2, 1.0, 0.0)]])
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="beta"):
            solve(mdp, beta)
    with pytest.raises(ValueError, match="topological"):
        TokenMDP(mdp.token, torch.zeros_like(mdp.next), mdp.log_ref, mdp.reward)
    with pytest.raises(ValueError, match="shape"):
        TokenMDP(mdp.token, mdp.next, mdp.log_ref, mdp.reward[0])
    for token, next in ((mdp.token[:, :1], mdp.next), (mdp.token, mdp.next[:1]), (mdp.token[:, :1], mdp.next[:, :1])):
        with pytest.raises(ValueError, match="must agree"):
            TokenMDP(token, next, mdp.log_ref, mdp.reward)
    for value in (math.nan, math.inf):
        reward = mdp.reward.clone()
        reward[1] = value  # both actions: the first is named
        for call in (hard_max, lambda m: solve(m, 1.0)):
            with pytest.raises(ValueError, match="reward is not finite at action 0, state 1"):
                call(replace(mdp, reward=reward))
    log_ref = mdp.log_ref.clone()
    log_ref[0, 1] = math.log(0.5 - 1e-8)
    with pytest.raises(ValueError, match="does not sum to one at state 0"):
        solve(replace(mdp, log_ref=log_ref), 1.0)
    log_ref[1, 1] = math.log(0.1)
    with pytest.raises(ValueError, match="no action, at action 1, state 1"):
        solve(replace(mdp, log_ref=log_ref), 1.0)
    batch = replace(mdp, log_ref=torch.stack([mdp.log_ref, log_ref]), reward=torch.stack([mdp.reward] * 2))
    with pytest.raises(ValueError, match="state 1, MDP 1"):
        solve(batch, 1.0)
