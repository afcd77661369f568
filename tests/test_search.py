"""Beam and tree search: exact where exactness can be had, equal to naive twins, to transformers, and to each other."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import gpt2_twins, random_model, random_tree
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from naive import NaiveTree, response_logps

from minqstar.errors import UserError
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import decode, greedy
from minqstar.search.evaluator import ImplicitReward, Network, Proxy, Table
from minqstar.search.mcts import MCTSConfig, Search, mcts
from minqstar.search.tree import NONE, Tree
from minqstar.theory.mdp import TokenMDP, shape, solve
from minqstar.world.tldr import BETA, draw_post

seeds = st.integers(0, 10**6)


# ---- evaluators


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 14))
def test_a_network_sees_each_node_as_a_full_forward_does(seed, lengths, M, calls):
    """Item 16, for random trees: narrow ones are gathered, wide ones masked, and both must see only their path."""
    rng = np.random.default_rng(seed)
    model = random_model(seed)
    prompts = [rng.integers(0, 21, length).tolist() for length in lengths]
    network = Network(model)
    paths = [[prompt] for prompt in prompts]
    evaluation = network.start(prompts, nodes=M * calls, depth=20)
    asked = 0
    for call in range(calls + 1):
        for row in range(len(prompts)):
            for lane in range(evaluation.logps.shape[1]):
                path = paths[row][-evaluation.logps.shape[1] + lane]
                if path is not None:
                    with torch.no_grad():
                        full = model.logits(model(torch.tensor([path])))[0, -1].log_softmax(-1)
                    assert torch.allclose(evaluation.logps[row, lane], full, atol=1e-4)
        if call == calls:
            break
        parents = rng.integers(-1, len(paths[0]), (len(prompts), M))
        tokens = rng.integers(0, 21, (len(prompts), M))
        for row in range(len(prompts)):
            for lane in range(M):
                parent = paths[row][parents[row, lane]] if parents[row, lane] >= 0 else None
                fits = parent is not None and len(parent) - lengths[row] < 20
                parents[row, lane] = parents[row, lane] if fits else -1
                paths[row].append([*parent, int(tokens[row, lane])] if fits else None)
        for lane in range(M):  # the new nodes were appended row by row; they count by lane
            asked += int((parents[:, lane] >= 0).sum())
        evaluation = network.extend(torch.from_numpy(parents), torch.from_numpy(tokens))
    assert network.calls == calls + 1 and network.nodes == len(prompts) + asked
    assert int(network.tokens.sum()) == sum(lengths) + asked


def test_a_prompt_is_stored_once_however_many_beams():
    model = random_model(block_size=600)
    for width in (1, 16):
        network = Network(model)
        beam_search(network, [[1] * 512], (21,), 9, BeamConfig(width))
        assert network.cache.layers[0][0].shape[:2] == (1, 512 + width * 8) and len(network.cache.layers) == 2


@given(seeds, st.floats(-2, 2))
def test_proxy_tuning_is_eq_14(seed, alpha):
    base, policy, reference = (random_model(seed + i) for i in range(3))
    mix = Proxy(Network(base), Network(policy), Network(reference), alpha).start([[1, 2]], 1, 1)
    l_base, l_policy, l_ref = (Network(m).start([[1, 2]], 1, 1).logps for m in (base, policy, reference))
    wanted = l_base.exp() * (l_policy - l_ref).mul(alpha).exp()
    assert torch.allclose(mix.logps.exp(), wanted / wanted.sum(), atol=1e-5)
    assert torch.equal(mix.rewards, mix.logps)


def test_proxy_tuning_at_its_ends():
    """Alpha 0 is the base; alpha 1 with the reference as base is the policy, under every search."""
    policy, reference = random_model(1), random_model(2)
    parts = lambda base, alpha: Proxy(Network(base), Network(policy), Network(reference), alpha)  # noqa: E731
    for search in (
        lambda e: [r.tokens for (r,) in decode(e, PROMPTS, (21,), 9, greedy)],
        lambda e: [r.tokens for (r,) in beam_search(e, PROMPTS, (21,), 9, BeamConfig(3))],
        lambda e: [f.response.tokens for f in mcts(e, PROMPTS, (21,), 9, MCTSConfig(budget=40))[0]],
    ):
        assert search(parts(policy, 0.0)) == search(Network(policy))
        assert search(parts(reference, 1.0)) == search(Network(policy))
    with pytest.raises(UserError, match="vocabularies differ"):
        Proxy(Network(random_model(vocab_size=30)), Network(policy), Network(reference), 1.0)
    with pytest.raises(UserError, match="alpha"):
        parts(policy, math.nan)


PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3]]


def chain(evaluator, tokens: list[int]) -> tuple[float, float, float]:
    """Along a path: the sums of log-probs and of rewards, and the value to go at its end."""
    evaluation = evaluator.start([[]], len(tokens), len(tokens))
    logp = reward = 0.0
    for node, token in enumerate(tokens):
        logp += evaluation.logps[0, 0, token].item()
        reward += evaluation.rewards[0, 0, token].item()
        evaluation = evaluator.extend(torch.tensor([[node]]), torch.tensor([[token]]))
    assert tokens[-1] != 3 or (evaluation.logps == -torch.inf).all()  # nothing follows EOS
    return logp, reward, evaluation.values[0, 0].item()


@given(seeds)
def test_guided_and_likelihood_differ_by_the_start_value(seed):
    """Eq. 12 = Eq. 13: for every prefix, with V* of the terminal state 0."""
    mdp, beta = random_tree(seed)
    solution = solve(mdp, beta)
    for tokens in itertools.product(range(3), repeat=2):
        for path in (list(tokens), [*tokens, 3]):
            logp, steps, zero = chain(Table(mdp, solution, beta, 5), path)
            _, guided, value = chain(Table(mdp, solution, beta, 5, guided=True), path)
            assert zero == 0 and steps == pytest.approx(beta * logp)
            assert guided + value == pytest.approx(solution.V[0].item() + steps, rel=1e-9, abs=1e-9)
            assert path[-1] != 3 or value == 0


# ---- exactness


def brute_force(model, prompt: list[int], ends: tuple[int, ...], limit: int) -> dict[tuple[int, ...], float]:
    """log pi of every finished response of at most `limit` tokens."""
    others = [token for token in range(model.config.vocab_size) if token not in ends]
    bodies = [body for length in range(limit) for body in itertools.product(others, repeat=length)]
    responses = [[*body, end] for body in bodies for end in ends]
    padded = torch.tensor([[*prompt, *r, *[0] * (limit - len(r))] for r in responses])
    with torch.no_grad():
        logps = model.logits(model(padded)).double().log_softmax(-1)[:, len(prompt) - 1 : -1]
    scores = logps.gather(-1, padded[:, len(prompt) :, None])[..., 0]
    real = torch.arange(limit) < torch.tensor([[len(r)] for r in responses])
    return dict(zip(map(tuple, responses), (scores * real).sum(-1).tolist(), strict=True))


def small_model(seed: int, vocab: int):
    return random_model(seed, vocab_size=vocab, block_size=16, n_layer=1, n_embd=8)


@settings(max_examples=200)
@given(
    seeds, st.integers(2, 4), st.integers(1, 3), st.integers(1, 4), st.sampled_from(["mean", "max", "soft"]),
    st.booleans(),
)  # fmt: skip
def test_full_beam_and_closed_tree_equal_brute_force(seed, vocab, ends, limit, backup, rollout):
    """Item 15, sequence and score, up to ties, with one to three end tokens. Item 16: the score is a fresh re-score."""
    model, ends = small_model(seed, vocab), tuple((seed + i) % vocab for i in range(min(ends, vocab)))
    prompt = np.random.default_rng(seed).integers(0, vocab, 1 + seed % 3).tolist()
    truth = brute_force(model, prompt, ends, limit)
    best = max(truth.values())
    (beams,) = beam_search(Network(model), [prompt], ends, limit, BeamConfig((vocab - 1) ** limit, n=1))
    config = MCTSConfig(10**4, vocab, backup=backup, leaf="rollout" if rollout else "value", advance=seed % 5 == 0)
    (found,), _ = mcts(Network(model), [prompt], ends, limit, config)
    assert found.proved or config.advance
    assert not found.completed or limit == 1
    for response in (beams[0], found.response):
        assert not response.truncated
        assert response.score == pytest.approx(best, abs=1e-5, rel=1e-5)
        assert truth[tuple(response.tokens)] == pytest.approx(best, abs=1e-5, rel=1e-5)
        assert response.score == pytest.approx(response_logps(model, prompt, response.tokens).sum().item(), abs=1e-4)


@given(seeds, st.integers(2, 8), st.sampled_from([(0,), (2, 0)]))
def test_a_beam_returns_its_n_best(seed, n, ends):
    model = small_model(seed, 3)
    truth = sorted(brute_force(model, [1], ends, 4).values(), reverse=True)
    (found,) = beam_search(Network(model), [[1]], ends, 4, BeamConfig(8, n=n))
    assert [r.score for r in found] == pytest.approx(truth[:n], abs=1e-4)
    assert len({tuple(r.tokens) for r in found}) == n


@given(seeds, st.floats(0, 3))
def test_length_normalisation_and_its_bound(seed, alpha):
    """Stopping early must not change what a full-width beam finds for any alpha."""
    model = small_model(seed, 3)
    truth = {r: score / len(r) ** alpha for r, score in brute_force(model, [1, 2], (0,), 5).items()}
    ((found,),) = beam_search(Network(model), [[1, 2]], (0,), 5, BeamConfig(16, alpha=alpha))
    assert truth[tuple(found.tokens)] == pytest.approx(max(truth.values()), abs=1e-5)


@pytest.mark.parametrize("ends", [(12,), (12, 11)], ids=["one end", "two ends"])
def test_beam_search_is_transformers_beam_search(ends):
    """The same sequences on the same GPT-2, where all of them end: at least 200 prompts, fifteen models."""
    same = compared = 0
    for seed in range(5, 20):
        theirs, ours = gpt2_twins(seed, vocab_size=13, n_layer=2, n_head=2, n_embd=16)
        prompts = torch.randint(0, 12, (40, 6), generator=torch.Generator().manual_seed(seed))
        out = theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), num_beams=5, length_penalty=0.0, early_stopping="never",
            do_sample=False, max_new_tokens=50, eos_token_id=list(ends), pad_token_id=0,
        )[:, 6:].tolist()  # fmt: skip
        mine = beam_search(Network(ours), prompts.tolist(), ends, 50, BeamConfig(5, compete=True))
        for row, (found,) in zip(out, mine, strict=True):
            if set(ends) & set(row):
                compared += 1
                same += found.tokens == row[: min(row.index(end) for end in ends if end in row) + 1]
    assert compared >= 200 and same >= 0.99 * compared


@given(seeds)
def test_ends_that_need_not_compete_only_find_more(seed):
    model = small_model(seed, 6)
    for width in (1, 2, 4):
        free, strict = (
            beam_search(Network(model), PROMPTS_6, (5,), 7, BeamConfig(width, compete=c)) for c in (False, True)
        )
        for (a,), (b,) in zip(free, strict, strict=True):
            assert b.truncated or a.score >= b.score - 1e-5


PROMPTS_6 = [[3, 1, 4], [1, 5], [2, 0, 5, 3]]


# ---- the tree


def asker(mdp: TokenMDP, steps: torch.Tensor, log_pi: torch.Tensor, values: torch.Tensor):
    """What `NaiveTree` asks of a table."""

    def ask(prefix):
        state = 0
        for token in prefix:
            (action,) = torch.nonzero(mdp.token[state] == token)[0].tolist()
            state = int(mdp.next[state, action])
        kept = [a for a in range(mdp.token.shape[1]) if mdp.token[state, a] >= 0 and log_pi[state, a] > -math.inf]
        edges = {int(mdp.token[state, a]): (log_pi[state, a].item(), steps[state, a].item()) for a in kept}
        return edges, values[state].item()

    return ask


def prefixes(tree_: Tree, row: int) -> list[tuple[int, ...]]:
    """The nodes of a tree as token sequences, in the order they were made."""
    paths = {0: ()}
    for node in np.flatnonzero(tree_.parent[row] != NONE):
        parent = tree_.parent[row, node]
        paths[node] = (*paths[parent], int(tree_.token[row, parent, tree_.action[row, node]]))
    return list(paths.values())


configs = st.builds(
    MCTSConfig,
    budget=st.integers(1, 40),
    c_puct=st.sampled_from([0.01, 0.3, 1.0, 5.0]),
    backup=st.sampled_from(["mean", "max", "soft"]),
    leaf=st.sampled_from(["rollout", "value"]),
)


@settings(max_examples=60)
@given(seeds, configs, st.booleans(), st.integers(1, 4), st.sampled_from([(3,), (3, 1), (3, 0, 2)]))
def test_a_tree_equals_its_naive_twin(seed, config, guided, limit, ends):
    """Expansion order, visits, values, the best response, and a proof just where the root has closed."""
    mdp, beta = random_tree(seed)
    solution = solve(mdp, beta)
    table = Table(mdp, solution, beta, 5, guided)
    (found,), grown = mcts(table, [[]], ends, limit, config)
    twin = NaiveTree(asker(mdp, table.steps[0], solution.log_pi, table.values[0]), ends, limit, config, beta)
    made = prefixes(grown, 0)
    assert made[: config.budget + 1] == twin.order
    for node, prefix in enumerate(twin.order):
        if not found.completed:
            assert grown.visits[0, node] == twin.visits(prefix)
            assert grown.value[0, node] == pytest.approx(twin.value(prefix), rel=1e-9, abs=1e-9)
    if twin.ended:
        assert found.response.score == pytest.approx(max(twin.ended.values())) and not found.completed
        assert found.proved == twin.closed(())  # a tree that is still open proves nothing


def same_trees(a: Tree, b: Tree):
    for name in ("parent", "action", "token", "child", "visits", "edge_visits", "closed", "best_node", "best_edge"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


@settings(max_examples=100)
@given(seeds, configs, st.integers(1, 3), st.sampled_from([7.0, 1e-9]))
def test_guided_and_likelihood_search_are_one(seed, config, leaves, scale):
    """Item 19: the same trees, node for node and visit for visit; and item 18: shaping and scaling change nothing."""
    mdp, beta = random_tree(seed)
    config = replace(config, leaves=leaves)
    phi = torch.randn(mdp.num_states + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    phi[-1] = 0
    scaled = replace(mdp, reward=scale * mdp.reward)
    shaped = shape(mdp, phi)
    (found,), first = mcts(Table(mdp, solve(mdp, beta), beta, 5), [[]], (3,), 4, config)
    for other, b in ((mdp, beta), (shaped, beta), (scaled, scale * beta)):
        (again,), grown = mcts(Table(other, solve(other, b), b, 5, guided=True), [[]], (3,), 4, config)
        same_trees(first, grown)
        assert again.response.tokens == found.response.tokens and again.proved == found.proved


@pytest.mark.parametrize("backup", ["mean", "max", "soft"])
@pytest.mark.parametrize("leaf", ["rollout", "value"])
def test_guided_and_likelihood_search_are_one_on_the_world(world, tokenizer, backup, leaf):
    posts = [draw_post(random.Random(seed), "test") for seed in range(24)]
    for _, places, mdp in world.tables(posts):
        solution = solve(mdp, BETA)
        trees = [
            mcts(
                Table(mdp, solution, BETA, tokenizer.n_vocab, guided), [[]] * len(places), tokenizer.ends, 48,
                MCTSConfig(budget=60, backup=backup, leaf=leaf),
            )[1]
            for guided in (False, True)
        ]  # fmt: skip
        same_trees(*trees)


@given(seeds, configs, st.integers(1, 4), st.booleans())
def test_batched_trees_equal_one_by_one(seed, config, leaves, advance):
    """Item 17; in float64, so that no near-tie falls the other way."""
    model = random_model(seed).double()
    config = replace(config, leaves=leaves, advance=advance, budget=min(config.budget, 12))
    together, _ = mcts(Network(model), PROMPTS, (21,), 6, config)
    for prompt, found in zip(PROMPTS, together, strict=True):
        (alone,), _ = mcts(Network(model), [prompt], (21,), 6, config)
        assert alone.response.tokens == found.response.tokens and alone.response.truncated == found.response.truncated
        assert alone.response.logps == pytest.approx(found.response.logps)
        assert alone[1:] == pytest.approx(found[1:])


@given(seeds, st.sampled_from([1, 3, 7]))
def test_batched_beams_equal_one_by_one(seed, width):
    model = random_model(seed).double()
    together = beam_search(Network(model), PROMPTS, (21,), 8, BeamConfig(width))
    for prompt, (found,) in zip(PROMPTS, together, strict=True):
        ((alone,),) = beam_search(Network(model), [prompt], (21,), 8, BeamConfig(width))
        assert alone.tokens == found.tokens and alone.logps == pytest.approx(found.logps)


def test_a_beam_stops_as_soon_as_nothing_can_beat_what_it_has():
    """Per prompt, and no sooner: the tokens asked for are those of the steps at which a prefix could still win."""
    mdp, beta = random_tree(3)
    solution = solve(mdp, beta)
    for n in (1, 3):
        table = Table(mdp, solution, beta, 5)
        (found,) = beam_search(table, [[]], (3,), 4, BeamConfig(3, n=n))
        live, kept, asked = [(0.0, 0)], [], 0
        for _ in range(4):
            steps = [
                (score + solution.log_pi[s, a].item(), int(mdp.token[s, a]), int(mdp.next[s, a]))
                for score, s in live
                for a in range(4)
                if mdp.token[s, a] >= 0
            ]
            kept = sorted([*kept, *(score for score, token, _ in steps if token == 3)], reverse=True)[:n]
            live = sorted([(score, s) for score, token, s in steps if token != 3], reverse=True)[:3]
            live = [(score, s) for score, s in live if score > -math.inf]
            if not live or (len(kept) == n and live[0][0] <= kept[-1]):
                break
            asked += len(live)
        assert [r.score for r in found] == pytest.approx(kept) and table.tokens.item() == asked < 9


@given(seeds)
def test_a_beam_of_one_is_greedy_until_it_ends(seed):
    model = random_model(seed).double()
    for (a,), (b,) in zip(
        beam_search(Network(model), PROMPTS, (21,), 8, BeamConfig(1)),
        decode(Network(model), PROMPTS, (21,), 8, greedy),
        strict=True,
    ):  # fmt: skip
        assert a.tokens == b.tokens or a.score > b.score or b.truncated


@given(seeds, configs, st.integers(2, 5))
def test_several_leaves_find_what_one_does_when_the_budget_is_large(seed, config, leaves):
    """Virtual loss changes the order of the search, not what is true at its end; who is back is counted off."""
    mdp, beta = random_tree(seed)
    table = Table(mdp, solve(mdp, beta), beta, 5)
    (one,), _ = mcts(table, [[]], (3,), 4, replace(config, budget=400))
    (many,), _ = mcts(table, [[]], (3,), 4, replace(config, budget=400, leaves=leaves))
    assert one.proved == many.proved and one.response.score == pytest.approx(many.response.score)


@settings(max_examples=100)
@given(seeds, configs, st.integers(2, 6))
def test_several_leaves_are_counted_while_they_are_under_way(seed, config, leaves):
    """Every edge's count is of the lanes that stand below it, and every node of the budget is made."""
    model = random_model(seed)
    search = Search(Network(model), PROMPTS, (21,), 7, replace(config, leaves=leaves, budget=60))
    search.grow(np.ones(3, bool))
    grown = search.tree
    for row in range(3):
        below = np.zeros_like(grown.flying[row])
        for node in search.cursor[row][search.cursor[row] != NONE]:
            while node:
                below[grown.parent[row, node], grown.action[row, node]] += 1
                node = grown.parent[row, node]
        assert np.array_equal(below, grown.flying[row])
        made = prefixes(grown, row)
        assert len(set(made)) == len(made)  # no two lanes took one edge
        assert len(made) == 61 or grown.closed[row, 0].all()


def test_kept_actions_and_the_proof():
    """With few actions kept the root still closes, but a proof needs that no left-out action could have mattered."""
    mdp, beta = random_tree(1)
    solution = solve(mdp, beta)
    likelihood = Table(mdp, solution, beta, 5)
    (all_,), _ = mcts(likelihood, [[]], (3,), 4, MCTSConfig(budget=400, actions=4))
    (one,), grown = mcts(likelihood, [[]], (3,), 4, MCTSConfig(budget=400, actions=1))
    assert all_.proved and grown.closed[0, 0].all()
    assert one.proved == (one.response.score == all_.response.score and grown.dropped[0] <= one.response.score)
    assert not one.proved


@given(seeds, st.integers(8, 60))
def test_a_tree_that_is_still_open_proves_nothing(seed, budget):
    """And one is open while some way out of it, to a longer prefix or to an end, is likelier than its answer."""
    (found,), grown = mcts(Network(random_model(seed, vocab_size=9)), [[3, 1]], (5, 2), 8, MCTSConfig(budget))
    leads_on = np.isin(grown.token[0], (5, 2)) | (grown.depth[0, :, None] < 8 - 1)
    way_out = (grown.score[0, :, None] + grown.logp[0])[(grown.child[0] == NONE) & leads_on]
    assert found.proved == (way_out.max() <= found.response.score + 1e-9 and not found.response.truncated)


def test_virtual_loss_is_a_loss():
    """Who is under way counts as a visit that came back with the lowest value: 1 becomes 1/2, which is below 0.6."""
    mdp, beta = random_tree(1)
    config = MCTSConfig(leaves=2, c_puct=0.001)
    search = Search(Table(mdp, solve(mdp, beta), beta, 5), [[]], (3,), 4, config)
    root, rows = search.tree, np.zeros(1, int)
    root.low[0], root.high[0] = 0.0, 1.0
    root.closed[0, 0], root.child[0, 0], root.edge_visits[0, 0] = [False, False, True, True, True], 1, 1
    root.edge_value[0, 0, :2] = 1.0, 0.6
    for flying, edge in ((0, 0), (1, 1)):
        root.flying[0, 0, 0] = flying
        assert search._puct(rows, rows)[0] == edge


def test_trees_that_outgrow_their_room_are_the_same(monkeypatch):
    """Arrays and caches double when they are full; nothing in them changes."""
    config = MCTSConfig(budget=90, leaves=2)
    roomy, a = mcts(Network(random_model(3).double()), PROMPTS, (21,), 9, config)
    monkeypatch.setattr("minqstar.search.mcts.ROOM", 2)
    tight, b = mcts(Network(random_model(3).double()), PROMPTS, (21,), 9, config)
    assert [f.response.tokens for f in roomy] == [f.response.tokens for f in tight] and a.made == b.made > 60
    for name in ("parent", "token", "edge_visits"):
        assert np.array_equal(getattr(a, name)[:, : a.made], getattr(b, name)[:, : a.made])


@given(seeds, st.sampled_from([(21,), (21, 4)]))
def test_at_the_length_limit_the_tree_ends_its_response(seed, ends):
    """With one action kept a tree is a single path, and an end is kept where nothing else fits, likely or not."""
    ((found,), _), limit = mcts(Network(random_model(seed)), [[3, 1]], ends, 4, MCTSConfig(actions=1)), 4
    ((plain,),) = decode(Network(random_model(seed)), [[3, 1]], ends, limit, greedy)
    assert not found.response.truncated and len(found.response.tokens) <= limit
    assert found.response.tokens[:-1] == plain.tokens[: len(found.response.tokens) - 1]


def test_more_leaves_at_once_than_there_is_room_for(monkeypatch):
    """One call may make more nodes than all before it: room doubles until they fit."""
    monkeypatch.setattr("minqstar.search.mcts.ROOM", 1)
    config = MCTSConfig(budget=200, leaves=60, leaf="value", actions=23, c_puct=100.0)
    unbounded = ImplicitReward(Network(random_model(1)), Network(random_model(2)), 1.0)  # nothing closes early
    (found,), grown = mcts(unbounded, [[3, 1, 4]], (21,), 9, config)
    assert found.nodes > 100 and len(set(prefixes(grown, 0))) == found.nodes


def test_an_advanced_root_starts_with_nobody_under_way():
    """Roll-outs that the last budget left in the air are begun anew below the new root, and count for nothing."""
    search = Search(Network(random_model(3)), [[3, 1, 4]], (21,), 8, MCTSConfig(budget=6, leaves=3, advance=True))
    search.grow(np.ones(1, bool))
    search.grow(np.ones(1, bool))
    assert search.tree.flying.sum() > 0 and (search.cursor != NONE).any()
    search.commit(np.ones(1, bool))
    assert search.root[0] > 0 and search.tree.flying.sum() == 0 and (search.cursor == NONE).all()


def test_a_roll_out_that_another_lane_has_closed_begins_anew_at_once():
    search = Search(Network(random_model(3)), [[3, 1, 4]], (21,), 8, MCTSConfig(budget=6, leaves=3))
    search.grow(np.ones(1, bool))
    lane = int((search.cursor[0] != NONE).argmax())
    tree_, at = search.tree, search.cursor[0, lane]
    tree_.closed[0, at] = tree_.closed[0, tree_.parent[0, at], tree_.action[0, at]] = True
    node, edge = np.full((2, 1, 3), NONE)
    search._select(np.zeros(1, int), lane, node, edge)
    assert search.cursor[0, lane] == NONE and node[0, lane] != NONE


@given(seeds)
def test_a_proof_with_left_out_actions_is_true(seed):
    mdp, beta = random_tree(seed)
    table = Table(mdp, solve(mdp, beta), beta, 5)
    (whole,), _ = mcts(table, [[]], (3,), 4, MCTSConfig(budget=400))
    for actions in (1, 2, 3):
        (part,), _ = mcts(table, [[]], (3,), 4, MCTSConfig(budget=400, actions=actions))
        assert not part.proved or part.response.score == pytest.approx(whole.response.score)


@given(seeds, st.sampled_from([(0,), (0, 2)]))
def test_the_implicit_reward_is_searched_as_its_sum(seed, ends):
    """Run to closure, the response with the largest sum of beta log(pi/pi_ref); likelihood bounds nothing here."""
    policy, reference = small_model(seed, 3), small_model(seed + 1, 3)
    both = [brute_force(model, [1], ends, 4) for model in (policy, reference)]
    returns = {r: 0.3 * (both[0][r] - both[1][r]) for r in both[0]}
    evaluator = ImplicitReward(Network(policy), Network(reference), 0.3)
    (found,), _ = mcts(evaluator, [[1]], ends, 4, MCTSConfig(budget=1000))
    assert found.proved and found.value == pytest.approx(max(returns.values()), abs=1e-5)
    assert returns[tuple(found.response.tokens)] == pytest.approx(max(returns.values()), abs=1e-5)
    (part,), _ = mcts(evaluator, [[1]], ends, 4, MCTSConfig(budget=1000, actions=2))
    assert not part.proved  # what was left out may pay anything


# ---- work and limits


def test_reuse_saves_tokens():
    """No prefix is read twice: neither within a search nor when the root advances."""
    model, read = random_model(3), []
    model.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    for config in (MCTSConfig(budget=30), MCTSConfig(budget=8, advance=True)):
        read.clear()
        network = Network(model)
        (found,), grown = mcts(network, [[3, 1, 4]], (21,), 8, config)
        made = prefixes(grown, 0)
        assert len(set(made)) == len(made) == found.nodes
        assert sum(read) == 3 + len(made) - 1 == network.tokens.item()
        assert len(read) == network.calls == len(made) == network.nodes  # the prompt, then one call a node
    # an advanced root starts with the visits it had: eight budgets of six are spent, none of it twice
    (_,), grown = mcts(Network(model), [[3, 1, 4]], (21,), 8, MCTSConfig(budget=6, advance=True, leaf="value"))
    assert 3 * 6 < len(prefixes(grown, 0)) <= 1 + 8 * 6 and grown.visits[0].max() > 6


@given(seeds, configs, st.booleans())
def test_a_response_at_the_length_limit_is_flagged(seed, config, advance):
    """EOS out of reach: every search returns a full-length response, flagged, and proves nothing."""
    mdp, beta = random_tree(seed)
    early = (mdp.token == 3) & (mdp.token[:, :1] >= 0)  # EOS before the last state
    log_ref = mdp.log_ref.masked_fill(early, -torch.inf)
    log_ref = log_ref.where((log_ref > -torch.inf).any(-1, keepdim=True), (~early).double().log()).log_softmax(-1)
    endless = replace(mdp, log_ref=log_ref)
    solution = solve(endless, beta)
    (found,), _ = mcts(Table(endless, solution, beta, 5), [[]], (3,), 3, replace(config, advance=advance))
    ((beam,),) = beam_search(Table(endless, solution, beta, 5), [[]], (3,), 3, BeamConfig(2))
    ((plain,),) = decode(Table(endless, solution, beta, 5), [[]], (3,), 3, greedy)
    assert not found.proved and not found.completed  # there is no EOS to come to
    for response in (found.response, beam, plain):
        assert response.truncated and len(response.tokens) == 3
        logp, _, _ = chain(Table(endless, solution, beta, 5), response.tokens)
        assert response.score == pytest.approx(logp)
    assert found.response.tokens == plain.tokens


@settings(max_examples=200)
@given(seeds, configs, st.integers(1, 20), st.booleans())
def test_no_answer_is_worse_than_greedy(seed, config, leaves, advance):
    """Whatever the leaves, the budget or the commitment: the first simulation is the greedy response.

    Where actions are alike the two may choose apart: the tree takes what differs by less than 1e-9 for equal.
    """
    assume(seed % 5 > 0)
    mdp, beta = random_tree(seed)
    table = Table(mdp, solve(mdp, beta), beta, 5)
    (answer,), _ = mcts(table, [[]], (3,), 4, replace(config, leaves=leaves, advance=advance))
    ((plain,),) = decode(table, [[]], (3,), 4, greedy)
    assert not answer.response.truncated and answer.response.score >= plain.score - 1e-9


@given(seeds, st.integers(1, 4))
def test_a_small_budget_is_completed_greedily(seed, budget):
    model = random_model(seed)
    (found,), _ = mcts(Network(model), [[3, 1]], (21,), 12, MCTSConfig(budget=budget))
    ((plain,),) = decode(Network(model), [[3, 1]], (21,), 12, greedy)
    if len(plain.tokens) > budget + 1:
        assert found.completed != found.response.truncated and found.response.tokens[:-1] == plain.tokens[:-1]
        assert found.response.tokens == plain.tokens or plain.truncated  # with one place left the tree takes EOS
    assert found.response.truncated or found.response.tokens[-1] == 21


def test_bad_input_is_one_clear_line():
    model = random_model()
    for bad, word in (
        ({"width": 0}, "width"), ({"n": 0}, "n must"), ({"n": 6}, "n must"),
        ({"alpha": math.nan}, "alpha"), ({"alpha": -1.0}, "alpha"), ({"alpha": math.inf}, "alpha"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=word):
            BeamConfig(**bad)
    for bad, word in (
        ({"budget": 0}, "budget"), ({"actions": 0}, "actions"), ({"leaves": 0}, "leaves"),
        ({"c_puct": math.nan}, "c_puct"), ({"c_puct": 0.0}, "c_puct"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=word):
            MCTSConfig(**bad)
    with pytest.raises(UserError, match="likelihood"):
        beam_search(ImplicitReward(Network(model), Network(model), 1.0), [[1]], (21,), 4, BeamConfig(2))
    searches = (
        lambda e, p, t: beam_search(e, p, (21,), t, BeamConfig(2)),
        lambda e, p, t: mcts(e, p, (21,), t, MCTSConfig(budget=4)),
        lambda e, p, t: decode(e, p, (21,), t, greedy),
    )
    with torch.no_grad():
        spoilt = random_model()
        spoilt.blocks[0].mlp.c_fc.weight[0, 0] = math.nan
    for search in searches:
        for prompts, limit, word in (([[1] * 9], 40, "no room"), ([[]], 4, "empty"), ([[1, 99]], 4, "99")):
            with pytest.raises(UserError, match=word):
                search(Network(model), prompts, limit)
        with pytest.raises(UserError, match="max_new_tokens"):
            search(Network(model), [[1]], 0)
        with pytest.raises(UserError, match="no prompt"):
            search(Network(model), [], 4)
        with pytest.raises(UserError, match="NaN"):
            search(Network(spoilt), [[1]], 4)


def test_a_table_in_which_there_is_no_one_to_ask_is_refused():
    """A chance state's token is the environment's; several temperatures order responses by more than likelihood."""
    mdp, beta = random_tree(1)
    solution, each = solve(mdp, beta), torch.full((mdp.num_states,), beta)
    for other, temperature in ((replace(mdp, chance=torch.arange(mdp.num_states) == 2), beta), (mdp, each)):
        with pytest.raises(UserError, match="a search needs one beta, and no state in which the environment draws"):
            Table(other, solution, temperature, 5)
