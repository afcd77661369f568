"""Searches that end with a proof: right by enumeration, and in what they need not look at."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model, random_tree
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_search import PROMPTS, brute_force

from minqstar.errors import UserError
from minqstar.lm.model import GPT
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import decode, greedy
from minqstar.search.evaluator import Evaluation, Evaluator, ImplicitReward, Network, Table
from minqstar.search.mcts import MCTSConfig, mcts
from minqstar.search.proofs import Proof, best_first, depth_first
from minqstar.theory.mdp import TokenMDP, solve
from minqstar.world.tldr import BETA, draw_post

seeds = st.integers(0, 10**6)
searches = st.sampled_from([depth_first, best_first])
some_ends = st.sampled_from([(3,), (3, 1), (3, 0, 2)])
Text = tuple[int, ...]


class Recorded:
    """An evaluator that remembers which prefixes each prompt's search asked it about, in their order."""

    def __init__(self, evaluator: Evaluator):
        self.evaluator, self.beta, self.by_likelihood = evaluator, evaluator.beta, evaluator.by_likelihood

    def start(self, prompts: list[list[int]], nodes: int, depth: int) -> Evaluation:
        self.nodes = [[()] for _ in prompts]  # by their numbers; None where nobody asked
        return self.evaluator.start(prompts, nodes, depth)

    def extend(self, parents: torch.Tensor, tokens: torch.Tensor) -> Evaluation:
        for row, (before, token) in enumerate(zip(parents[:, 0].tolist(), tokens[:, 0].tolist(), strict=True)):
            self.nodes[row].append((*self.nodes[row][before], token) if before >= 0 else None)
        return self.evaluator.extend(parents, tokens)

    @property
    def asked(self) -> list[list[Text]]:
        return [[path for path in of if path is not None] for of in self.nodes]


def flat_tree(seed: int) -> tuple[TokenMDP, float]:
    """`random_tree`, so flat that a proof takes some work; every fifth is full of ties."""
    mdp, _ = random_tree(seed)
    return replace(mdp, log_ref=(0.3 * mdp.log_ref).log_softmax(-1), reward=0.3 * mdp.reward), 0.7


def decided_model(seed: int, vocab: int) -> GPT:
    """A tiny network in float64 whose logits are large, so that not every mode is an end at once."""
    model = random_model(seed, vocab_size=vocab, block_size=16, n_layer=1, n_embd=8, tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    return model.double()


def everything(
    mdp: TokenMDP, log_pi: torch.Tensor, ends: tuple[int, ...], limit: int
) -> tuple[dict[Text, float], dict[Text, float]]:
    """log pi of all finished responses, and of all prefixes after which a search may ask for more."""
    finished, live = {}, {}

    def walk(path: Text, state: int, logp: float):
        live[path] = logp
        for action, token in enumerate(mdp.token[state].tolist() if state < mdp.num_states else ()):
            step = log_pi[state, action].item()
            if token >= 0 and step > -math.inf:
                if token in ends:
                    finished[(*path, token)] = logp + step
                elif len(path) + 1 < limit:
                    walk((*path, token), int(mdp.next[state, action]), logp + step)

    walk((), 0, 0.0)
    return finished, live


def must(finished: dict[Text, float], live: dict[Text, float], mode: Text) -> set[Text]:
    """What every proof that a response is the mode has looked at."""
    return {path for path, logp in live.items() if logp > finished[mode] + 1e-9 or path == mode[: len(path)]}


def table_of(seed: int, guided: bool = False) -> tuple[Table, TokenMDP, torch.Tensor]:
    mdp, beta = flat_tree(seed)
    solution = solve(mdp, beta)
    return Table(mdp, solution, beta, 5, guided), mdp, solution.log_pi


def run(search, evaluator: Evaluator, ends=(3,), limit: int = 4, **options) -> tuple[Proof, list[Text]]:
    """A proof, and the prefixes evaluated for it."""
    recorded = Recorded(evaluator)
    (proof,) = search(recorded, [[]], ends, limit, **options)
    assert len(proof.evaluated) == len(recorded.asked[0]) == len(set(recorded.asked[0]))
    return proof, recorded.asked[0]


# ---- the mode


@settings(max_examples=100)
@given(seeds, searches, some_ends, st.integers(1, 4))
def test_the_proved_response_is_the_mode_by_enumeration(seed, search, ends, limit):
    """On tables with ties, with actions of no mass, with several ends, cut at every length."""
    table, mdp, log_pi = table_of(seed)
    finished, live = everything(mdp, log_pi, ends, limit)
    proof, asked = run(search, table, ends, limit)
    mode = tuple(proof.response.tokens)
    assert proof.proved and not proof.response.truncated
    assert finished[mode] == pytest.approx(max(finished.values()), abs=1e-9)
    assert proof.response.score == pytest.approx(finished[mode], abs=1e-12)
    assert proof.evaluated == pytest.approx([live[path] for path in asked], abs=1e-12)
    assert must(finished, live, mode) <= set(asked) and proof.needed == len(must(finished, live, mode))


@settings(max_examples=60)
@given(seeds, st.integers(2, 4), st.integers(1, 3), st.integers(1, 4))
def test_every_exact_search_agrees_on_a_network(seed, vocab, ends, limit):
    """Both searches for a proof, a closed tree, a beam as wide as all live prefixes, and brute force, in float64."""
    model, ends = decided_model(seed, vocab), tuple((seed + i) % vocab for i in range(min(ends, vocab)))
    prompt = np.random.default_rng(seed).integers(0, vocab, 1 + seed % 3).tolist()
    truth = brute_force(model, prompt, ends, limit)
    ((beam,),) = beam_search(Network(model), [prompt], ends, limit, BeamConfig((vocab - 1) ** limit))
    (found,), _ = mcts(Network(model), [prompt], ends, limit, MCTSConfig(10**4, vocab))
    proofs = [search(Network(model), [prompt], ends, limit)[0] for search in (depth_first, best_first)]
    assert found.proved and all(proof.proved for proof in proofs)
    for response in (beam, found.response, *(proof.response for proof in proofs)):
        assert response.score == pytest.approx(max(truth.values()), abs=1e-9)
        assert truth[tuple(response.tokens)] == pytest.approx(response.score, abs=1e-9)
    one, other = proofs
    assert one.needed == other.needed == len(other.evaluated) <= min(found.nodes, len(one.evaluated))
    assert one.needed <= limit * math.exp(-other.response.score)  # at each length they share one unit of probability


@given(seeds, searches)
def test_batched_proofs_equal_one_by_one(seed, search):
    """Prompts of unequal lengths, whose searches end at different times."""
    model = decided_model(seed, 10)
    recorded = Recorded(Network(model))
    together = search(recorded, PROMPTS, (2, 7), 6)
    assume(len({len(of) for of in recorded.asked}) > 1)
    for prompt, proof, asked in zip(PROMPTS, together, recorded.asked, strict=True):
        alone = Recorded(Network(model))
        (same,) = search(alone, [prompt], (2, 7), 6)
        assert alone.asked[0] == asked and same.response.tokens == proof.response.tokens and proof.proved
        assert same.evaluated == pytest.approx(proof.evaluated)
    assert int(recorded.evaluator.tokens.sum()) == sum(map(len, PROMPTS)) + sum(map(len, recorded.asked)) - len(PROMPTS)


# ---- what is evaluated, and in which order


@settings(max_examples=100)
@given(seeds, some_ends, st.integers(1, 4))
def test_best_first_evaluates_what_every_proof_must_and_nothing_else(seed, ends, limit):
    """The likeliest prefix first; efficiency 1. Equally likely prefixes (every fifth tree) may cost more."""
    assume(seed % 5)
    table, mdp, log_pi = table_of(seed)
    finished, live = everything(mdp, log_pi, ends, limit)
    proof, asked = run(best_first, table, ends, limit)
    wanted = must(finished, live, max(finished, key=finished.get))
    assert asked == sorted(wanted, key=lambda path: -live[path]) and proof.needed == len(wanted)


def test_ties_are_told_from_what_is_needed():
    """Two equal halves, each sure to end after one more token: one of them suffices, and the other is not needed."""
    token = torch.tensor([[0, 1], [3, -1], [3, -1]])
    log_ref = torch.tensor([[0.5, 0.5], [1, 0], [1, 0]], dtype=torch.float64).log()
    mdp = TokenMDP(token, torch.tensor([[1, 2], [3, 3], [3, 3]]), log_ref, torch.zeros_like(log_ref))
    for search in (depth_first, best_first):
        proof, asked = run(search, Table(mdp, solve(mdp, 1.0), 1.0, 5))
        assert asked == [(), (0,)] and proof.needed == 2 and proof.proved and proof.response.tokens == [0, 3]


@settings(max_examples=100)
@given(seeds, some_ends, st.integers(1, 4))
def test_depth_first_is_its_naive_twin(seed, ends, limit):
    """By recursion, its children in the order of their probability; its first descent is greedy decoding."""
    assume(seed % 5)
    table, mdp, log_pi = table_of(seed)
    finished, live = everything(mdp, log_pi, ends, limit)
    order, best = [], -math.inf

    def visit(path: Text):
        nonlocal best
        order.append(path)
        best = max([best, *(finished[(*path, end)] for end in ends if (*path, end) in finished)])
        children = [(*path, token) for token in range(4) if (*path, token) in live]
        for child in sorted(children, key=lambda child: -live[child]):
            if live[child] > best:
                visit(child)

    visit(())
    _, asked = run(depth_first, table, ends, limit)
    assert asked == order
    ((first,),) = decode(table, [[]], ends, limit, greedy)
    descent = [path for path in asked if path == tuple(first.tokens[: len(path)])]
    assert asked[: len(descent)] == descent


@settings(max_examples=100)
@given(seeds, st.booleans())
def test_with_the_best_to_go_the_first_descent_is_the_proof(seed, guided):
    """A* with W: the prefixes of the mode, in their order, and no others, which may be fewer than likelihood needs."""
    assume(seed % 5)
    table, mdp, log_pi = table_of(seed, guided)
    finished, _ = everything(mdp, log_pi, (3,), 4)
    mode = max(finished, key=finished.get)
    to_go = table.best_to_go()
    if not guided:
        assert to_go[0, 0] == pytest.approx(table.beta * finished[mode])
    for search in (best_first, depth_first):
        proof, asked = run(search, table.shaped(to_go))
        assert proof.proved and proof.response.tokens == list(mode)
        assert asked == [mode[:length] for length in range(len(mode))]
        assert proof.response.score == pytest.approx(finished[mode])


@given(seeds, st.integers(1, 4))
def test_the_better_the_heuristic_the_less_is_evaluated(seed, limit):
    """Half of W is a looser bound, 0 the loosest; with a length limit W is one too, and every answer is right."""
    assume(seed % 5)
    table, mdp, log_pi = table_of(seed)
    finished, _ = everything(mdp, log_pi, (3,), limit)
    before = None
    for share in (1.0, 0.5, 0.0):
        proof, asked = run(best_first, table.shaped(share * table.best_to_go()), limit=limit)
        assert proof.proved and proof.response.score == pytest.approx(max(finished.values()))
        assert before is None or before <= set(asked)
        before = set(asked)


def test_a_star_on_the_world(world, tokenizer):
    """Sixty posts: its first descent is the proof on each, and uniform-cost search evaluates more."""
    posts = [draw_post(random.Random(seed), "test") for seed in range(60)]
    for _, places, mdp in world.tables(posts):
        table = Table(mdp, solve(mdp, BETA), BETA, tokenizer.n_vocab)
        to_go = table.best_to_go()
        asked = (table, [[]] * len(places), tokenizer.ends, 48)
        deep, best = depth_first(*asked), best_first(*asked)
        guided = best_first(table.shaped(to_go), *asked[1:])
        for row in range(len(places)):
            proofs = deep[row], best[row], guided[row]
            assert all(proof.proved for proof in proofs)
            assert {round(proof.response.score - to_go[row, 0].item() / BETA, 9) for proof in proofs} == {0.0}
            assert len(guided[row].evaluated) == len(guided[row].response.tokens) <= len(best[row].evaluated)
            assert best[row].needed == len(best[row].evaluated) <= len(deep[row].evaluated)


@given(seeds)
def test_with_the_soft_value_at_its_leaves_a_search_is_uniform_cost_search(seed):
    """Eq. 12 = Eq. 13: guided priorities are beta log pi(prefix) + V*(s_0), so the same prefixes in the same order.

    V* never falls short of the best to go, so that A* with it ends with a proof; but it helps no more than nothing.
    """
    assume(seed % 5)
    mdp, beta = flat_tree(seed)
    solution = solve(mdp, beta)
    plain, guided = Table(mdp, solution, beta, 5), Table(mdp, solution, beta, 5, guided=True)
    assert (guided.best_to_go() <= solution.V + 1e-9).all()
    finished, live = everything(mdp, solution.log_pi, (3,), 4)
    for path in (*finished, *live):  # rewards so far and V* where they lead
        state, rewards = 0, 0.0
        for token in path:
            action = mdp.token[state].tolist().index(token)
            rewards += guided.steps[0, state, action].item()
            state = int(mdp.next[state, action])
        likelihood = beta * {**finished, **live}[path]
        assert rewards + guided.values[0, state].item() == pytest.approx(likelihood + solution.V[0].item(), abs=1e-9)
    (one, order), (two, same_order) = run(best_first, plain), run(best_first, guided.shaped(solution.V))
    assert order == same_order and one.response.tokens == two.response.tokens and two.proved


# ---- limits


@given(seeds)
def test_rewards_that_bound_nothing_are_refused(seed):
    """An inconsistent heuristic, a step reward of either sign: an error, and no false proof."""
    assume(seed % 5)
    table, mdp, _ = table_of(seed)
    low = torch.cat((torch.full((1, mdp.num_states), -9.0, dtype=torch.float64), torch.zeros(1, 1)), dim=1)
    implicit = ImplicitReward(Network(random_model(seed)), Network(random_model(seed + 1)), 1.0)
    for evaluator, prompt in ((table.shaped(low), []), (implicit, [1])):
        for search in (depth_first, best_first):
            with pytest.raises(UserError, match="a step pays more than 0"):
                search(evaluator, [prompt], (3,), 4)


@given(seeds, searches, st.integers(1, 4))
def test_what_was_cut_is_not_finished(seed, search, limit):
    """Where no response ends, there is nothing to prove: a prefix of full length comes back, flagged."""
    table, mdp, log_pi = table_of(seed)
    proof, asked = run(search, table, (4,), limit)
    assert set(asked) == set(everything(mdp, log_pi, (4,), limit)[1])  # all there is
    assert proof.response.truncated and not proof.proved and len(proof.response.tokens) == limit
    assert (*proof.response.tokens[:-1],) in asked


@given(seeds, searches, st.integers(1, 12))
def test_a_search_that_is_given_less_proves_nothing(seed, search, most):
    """It stops after so many prefixes; it has a proof just if nothing likelier than its answer is left."""
    table, mdp, log_pi = table_of(seed)
    whole, all_asked = run(search, table)
    part, asked = run(search, table, most=most)
    finished, live = everything(mdp, log_pi, (3,), 4)
    assert asked == all_asked[:most]
    known = [finished[(*path, 3)] for path in asked]
    assert part.response.score == pytest.approx(max(known), abs=1e-12)
    left = [live[path] for path in live if path not in asked and path[:-1] in asked]
    assert part.proved == (max(left, default=-math.inf) <= max(known) + 1e-9)
    assert not part.proved or part.response.score == pytest.approx(whole.response.score)


@pytest.mark.parametrize("search", [depth_first, best_first])
def test_where_there_is_one_way_only(search):
    """A vocabulary of one token, its end; and a chain of sure tokens, all of which are needed."""
    (proof,) = search(Network(random_model(vocab_size=1)), [[0, 0]], (0,), 5)
    assert proof.proved and proof.response.tokens == [0] and proof.evaluated == [0.0] and proof.needed == 1
    token = torch.tensor([[2], [1], [3]])
    sure = torch.zeros(3, 1, dtype=torch.float64)
    mdp = TokenMDP(token, torch.tensor([[1], [2], [3]]), sure, sure)
    proof, asked = run(search, Table(mdp, solve(mdp, 1.0), 1.0, 5))
    assert proof.proved and asked == [(), (2,), (2, 1)] and proof.needed == 3 and proof.response.score == 0
    proof, asked = run(search, Table(mdp, solve(mdp, 1.0), 1.0, 5), limit=2)
    assert proof.response.tokens == [2, 1] and proof.response.truncated and not proof.proved
    for prompts, limit, most, message in (([], 3, 9, "no prompt"), ([[0]], 0, 9, "max_new"), ([[0]], 3, 0, "most")):
        with pytest.raises(UserError, match=message):
            search(Network(random_model(vocab_size=1)), prompts, (0,), limit, most=most)
