"""One log-prob path: equal alone, padded, packed and prefix-shared; exact at policy == reference."""

import math

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from naive import group_logps

from minqstar.errors import UserError
from minqstar.theory.losses import dpo_loss
from minqstar.training import scoring
from minqstar.training.data import Group, PackedData
from minqstar.training.scoring import ReferenceCache, autocast, score_groups, tensors_hash, token_logps, weights_hash

EOS, PAD = 21, 22
CPU = torch.device("cpu")
ids = st.integers(0, 20)
response = st.lists(ids, min_size=1, max_size=8).map(lambda r: [*r, EOS])
pairs = st.lists(
    st.builds(Group, st.lists(ids, min_size=1, max_size=10), st.tuples(response, response), st.just(()), st.just(())),
    min_size=1,
    max_size=6,
)


def all_rows(data: PackedData) -> np.ndarray:
    return np.arange(len(data))


def by_response(data: PackedData, logps: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    """(group, branch) -> its log-probs, from the scored tokens of all rows."""
    batch = data.batch(all_rows(data))
    members = data.order.tolist()
    counts = dict.fromkeys(members, 2)
    keys = [(m, branch) for m in members for branch in range(counts[m])]
    return {key: logps[batch.response == r] for r, key in enumerate(keys)}


@given(pairs, st.integers(1, 90), st.integers(0, 10**6))
def test_packed_equals_alone(some, row_length, seed):
    """Item 4: random contents, lengths and packings, in fp64 to 1e-12 and in fp32 to 1e-5."""
    data = PackedData(some, PAD, row_length)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = random_model(seed).to(dtype)
        with torch.no_grad():
            packed = by_response(data, token_logps(model, data.batch(all_rows(data))))
            alone = group_logps(model, some)
        for (member, branch), logps in packed.items():
            scale = max(1.0, alone[member][branch].abs().max().item())
            assert torch.allclose(logps, alone[member][branch], atol=tolerance * scale, rtol=0)


@given(pairs, st.integers(0, 10**6), ids)
def test_a_sibling_of_equal_length_changes_nothing(some, seed, token):
    """Item 4: another response of the same length leaves the first one's log-probs bit-equal."""
    model = random_model(seed)
    other = [g._replace(responses=(g.responses[0], [token] * (len(g.responses[1]) - 1) + [EOS])) for g in some]
    scores = []
    for groups in (some, other):
        data = PackedData(groups, PAD, 60)
        with torch.no_grad():
            scores.append(by_response(data, token_logps(model, data.batch(all_rows(data)))))
    for key, logps in scores[0].items():
        if key[1] == 0:
            assert torch.equal(logps, scores[1][key])


def test_the_first_response_token_has_a_gradient():
    """Item 3: a pair that differs only there still teaches."""
    model = random_model()
    data = PackedData([Group([1, 2, 3], ([4, 6, EOS], [5, 6, EOS]))], PAD, 12)
    batch = data.batch(all_rows(data))
    logps = token_logps(model, batch)
    logps.retain_grad()
    dpo_loss(logps, logps.detach() + 0.1, batch.response, batch.sizes, 0.5).loss.sum().backward()
    assert (batch.target[[0, 3]] == torch.tensor([4, 5])).all()
    assert (logps.grad[[0, 3]].abs() > 1e-3).all()
    assert model.wte.weight.grad[[4, 5]].abs().min(dim=-1).values.max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(some=pairs, seed=st.integers(0, 10**6))
def test_policy_equal_to_reference_is_ln_2_exactly(dtype, some, seed):
    """Item 5, plain and autocast, cached and live: every token reward is 0.0, not nearly so."""
    model = random_model(seed)
    data = PackedData(some, PAD, 40)
    rows = all_rows(data)
    cache = ReferenceCache(model, data, dtype, [rows])
    with autocast(CPU, dtype):
        logps = token_logps(model, data.batch(rows))
    assert logps.dtype == torch.float32  # item 8
    assert torch.equal(logps.detach(), cache[rows])
    batch = data.batch(rows)
    terms = dpo_loss(logps, cache[rows], batch.response, batch.sizes, 0.5)
    assert (terms.chosen_reward == 0).all() and (terms.rejected_reward == 0).all()
    assert torch.equal(terms.loss, torch.full_like(terms.loss, math.log(2)))


def test_log_softmax_sums_in_fp32_under_autocast():
    """Item 8: with many small terms a bf16 sum is off by percents; the log-probs of a row must sum to one."""
    model = random_model(vocab_size=5000, block_size=8)
    with torch.no_grad():
        model.wte.weight.mul_(0.02)
    groups = [Group([1], ([token, EOS],)) for token in range(1, 5000)]
    data = PackedData(groups, 0, 3)
    with torch.no_grad(), autocast(CPU, torch.bfloat16):
        batch = data.batch(all_rows(data))
        first = token_logps(model, batch)[batch.source % 3 == 0]
    assert abs(first.double().exp().sum().item() + first[0].exp().item() - 1) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_target_log_probs_and_their_gradient(monkeypatch, dtype):
    """Those of autograd through log_softmax, in parts of three rows; a bf16 gradient is rounded once, at its end."""
    monkeypatch.setattr(scoring, "SOFTMAX_AT_ONCE", 3 * 11 + 2)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(8, 11, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    target, d = torch.arange(8), torch.randn(8, generator=generator, dtype=torch.float64)
    logps = scoring.TargetLogps.apply(logits, target)
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = logits.detach().double().requires_grad_()
    expected = exact.log_softmax(-1)[target, target]
    assert torch.allclose(logps.double(), expected, atol=1e-6)
    (logps * d).sum().backward()
    (expected * d).sum().backward()
    step = 2**-8 if dtype == torch.bfloat16 else 1e-12  # half a unit in the last place
    assert ((logits.grad.double() - exact.grad).abs() <= 1.01 * step * exact.grad.abs() + 1e-7 * step).all()


def test_the_head_in_chunks_gives_the_same(monkeypatch):
    model = random_model()
    data = PackedData([Group([1, 2], ([3, 4, 5, EOS], [6, EOS])) for _ in range(5)], PAD, 30)
    batch = data.batch(all_rows(data))
    whole = token_logps(model, batch)
    whole.sum().backward()
    gradient = model.wte.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 7 * 23)
    sizes, head = [], model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: sizes.append(len(hidden)) or head(hidden))
    chunked = token_logps(model, batch)
    assert sum(sizes) == len(batch.target) and max(sizes) == 7
    chunked.sum().backward()
    assert torch.allclose(whole, chunked, atol=1e-6)
    assert torch.allclose(gradient, model.wte.weight.grad, rtol=1e-4, atol=1e-4)


def test_the_cache_leaves_random_states_alone_and_checks_its_key():
    """Item 6."""
    model, other = random_model(0), random_model(1)
    data = PackedData([Group([1, 2], ([3, EOS], [4, EOS]))], PAD, 10)
    moved = PackedData([Group([1, 2], ([3, EOS], [5, EOS]))], PAD, 10)
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    cache = ReferenceCache(model, data, torch.float32, [all_rows(data)])
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    cache.check(weights_hash(model), data)
    with pytest.raises(UserError, match="another reference"):
        cache.check(weights_hash(other), data)
    with pytest.raises(UserError, match="other data"):
        cache.check(weights_hash(model), moved)


def test_the_cache_is_per_row_in_any_order():
    model = random_model()
    data = PackedData([Group([i, 1], ([i, 2, EOS][i % 2 :], [3, EOS])) for i in range(1, 9)], PAD, 8)
    cache = ReferenceCache(model, data, torch.float32, np.array_split(all_rows(data)[::-1], 3))
    for rows in (np.array([5, 0, 3]), np.array([1])):
        with torch.no_grad():
            assert torch.allclose(cache[rows], token_logps(model, data.batch(rows)), atol=1e-5)


def test_the_hash_sees_every_weight():
    model = random_model()
    prints = {weights_hash(model)}
    for weight in model.parameters():
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        prints.add(weights_hash(model))
    assert len(prints) == 1 + len(list(model.parameters()))


def test_the_hash_sees_names_shapes_and_types():
    states = [
        {"a": torch.zeros(2, 3)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
    ]
    assert len({tensors_hash(state) for state in states}) == 4


def test_autocast_makes_products_in_the_type_asked_for():
    ones = torch.ones(2, 2)
    for dtype in (torch.bfloat16, torch.float32):
        with autocast(CPU, dtype):
            assert (ones @ ones).dtype == dtype


@pytest.mark.parametrize("how", ["scores", "cache"])
def test_weights_that_are_finite_but_huge_are_one_line(how):
    """Their logits overflow, and the log-probs are NaN."""
    model = random_model()
    with torch.no_grad():  # the logit of a token that does not occur is about 1e39
        model.wte.weight[10] = 3e38 * model(torch.tensor([[1, 2]]))[0, -1].sign()
    groups = [Group([1, 2], ([3, 21],))]
    with pytest.raises(UserError, match="log-probabilities overflow: the model's weights are too large") as error:
        if how == "scores":
            score_groups(model, groups, 22)
        else:
            ReferenceCache(model, PackedData(groups, 22, 16), torch.float32, [np.array([0])])
    assert "\n" not in str(error.value)
