"""From text to packed batches: nothing cut, nothing lost, one EOS, and the mask that the layout promises."""

import tracemalloc

import numpy as np
import pytest
import torch
from conftest import members
from hypothesis import given
from hypothesis import strategies as st

from minqstar.datasets import every_kth_prompt
from minqstar.errors import UserError
from minqstar.training.data import Group, PackedData, tokenize
from minqstar.training.groups import Groups, fit, rows_of
from minqstar.training.trainer import StageConfig
from minqstar.world.tldr import DataConfig, draw_rows

EOS, PAD = 21, 22
ids = st.integers(0, 20)
response = st.lists(ids, min_size=1, max_size=9).map(lambda r: [*r, EOS])


@st.composite
def made(draw) -> Group:
    """A group of rankings; in some of its responses the environment wrote some tokens, never the last one."""
    responses = draw(st.lists(response, min_size=1, max_size=3))
    given = tuple(tuple(sorted(draw(st.sets(st.integers(0, len(r) - 2), max_size=2)))) for r in responses)
    first = draw(st.integers(1, len(responses)))
    sizes = () if first == len(responses) else (first, len(responses) - first)
    return Group(draw(st.lists(ids, min_size=1, max_size=12)), tuple(responses), given if any(given) else (), sizes)


groups = st.lists(made(), min_size=1, max_size=12)
row_lengths = st.integers(1, 80)


def paths(data: PackedData, batch):
    """For each response of a batch: its scored (source, target) pairs, as the batch lists them."""
    for r in range(sum(batch.sizes)):
        mine = batch.response == r
        yield batch.source[mine].tolist(), batch.target[mine].tolist()


@given(groups, row_lengths, st.randoms())
def test_packing_loses_and_cuts_nothing(some, row_length, random):
    data = PackedData(some, PAD, row_length)
    assert sorted(data.order.tolist()) == list(range(len(some)))
    order = list(range(len(data)))
    random.shuffle(order)
    batch = data.batch(np.array(order))
    tokens, positions = batch.tokens.flatten(), batch.positions.flatten()
    placed = [m for r in order for m in members(data)[r]]
    expected = [
        (some[m].prompt, response, set(others))
        for m in placed
        for response, others in zip(some[m].responses, some[m].given or [()] * 3, strict=False)
    ]
    found = list(paths(data, batch))
    assert len(found) == len(expected) == sum(batch.sizes)
    assert batch.sizes == tuple(size for m in placed for size in some[m].rankings)
    for (source, target), (prompt, response, others) in zip(found, expected, strict=True):
        own = [place for place in range(len(response)) if place not in others]
        assert target == [response[place] for place in own]  # every token is scored, the only EOS too
        assert response.count(EOS) == 1 and target[-1] == EOS
        assert tokens[source].tolist() == [[prompt[-1], *response][place] for place in own]
        assert positions[source].tolist() == [len(prompt) - 1 + place for place in own]
    assert (batch.tokens == PAD).logical_and(batch.group >= 0).sum() == 0
    assert int((batch.group >= 0).sum()) == sum(group.length for group in some)


@given(groups, row_lengths)
def test_the_mask_is_the_path(some, row_length):
    """A query sees exactly the tokens of its own prompt and branch up to itself."""
    data = PackedData(some, PAD, row_length)
    batch = data.batch(np.arange(len(data)))
    mask = batch.mask()[:, 0]
    for row in range(len(data)):
        for q in range(data.row_length):
            group, branch = batch.group[row, q].item(), batch.branch[row, q].item()
            for k in range(data.row_length):
                same = batch.group[row, k].item() == group
                visible = same and k <= q and batch.branch[row, k].item() in (0, branch)
                assert mask[row, q, k].item() == visible
            if group >= 0:  # what a query sees is one unbroken path of positions
                seen = batch.positions[row, mask[row, q]].tolist()
                assert seen == list(range(batch.positions[row, q].item() + 1))
                path = [-1, *batch.tokens[row, mask[row, q]].tolist()]
                assert batch.before[row, q].item() == path[-2]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120))
def test_rows_are_never_overfull(lengths, row_length):
    order, stops = fit(np.array(lengths), row_length)
    assert sorted(order.tolist()) == list(range(len(lengths))) and stops[0] == 0 and stops[-1] == len(order)
    assert all(0 < sum(lengths[i] for i in row) <= row_length for row in np.split(order, stops[1:-1]))


def test_the_world_packs_with_less_than_five_percent_waste(world):
    rows = list(draw_rows(world, DataConfig(pairs=2000), "train"))
    some, _ = tokenize(rows, world.tokenizer, 512)
    data = PackedData(some, world.tokenizer.pad, StageConfig().row_length)
    assert sum(group.length for group in some) / (len(data) * data.row_length) > 0.95


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_prompt_ids_are_a_prefix_by_construction(tokenizer, prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    some, skipped = tokenize([row], tokenizer, 512)
    assert len(some) + skipped.total() == 1
    for group in some:
        assert group.prompt == tokenizer.encode(prompt)
        assert [tokenizer.decode(r) for r in group.responses] == [chosen, rejected]


def test_rankings_of_a_prompt_share_its_group(tokenizer):
    pair, ranking = {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "ranked": ["c", "d", "e"]}
    some, skipped = tokenize([pair, ranking, ranking | {"ranked": ["a", "b", "a"]}, pair], tokenizer, 60)
    assert skipped == {"a response is ranked twice": 1} and some.compared
    (group,) = some
    assert group.sizes == (2, 3, 2) and [tokenizer.decode(r) for r in group.responses] == list("abcdeab")
    best = group.best()
    assert [tokenizer.decode(r) for r in best.responses] == list("aca") and best.sizes == (1, 1, 1)
    assert not Groups([best]).compared and list(Groups([best])) == [best]
    given = group._replace(given=tuple((i,) for i in range(7)))
    assert given.best().given == ((0,), (2,), (5,))


def test_what_does_not_fit_is_skipped_and_counted(tokenizer):
    fine = {"prompt": "p q", "chosen": "yes", "rejected": "no"}
    rows = [
        fine,
        fine | {"prompt": ""},
        fine | {"chosen": ""},
        fine | {"rejected": "yes"},
        fine | {"rejected": "no " * 40},
    ]
    some, skipped = tokenize(rows, tokenizer, 30)
    assert len(some) == 1
    assert skipped == {
        "empty prompt": 1, "empty response": 1, "chosen equals rejected": 1, "longer than 30 tokens": 1,
    }  # fmt: skip


def test_a_response_may_fill_the_context_to_the_last_position(tokenizer):
    row = {"prompt": "a", "completion": "a" * 1}
    length = len(tokenizer.encode("a")) * 2 + 1
    assert len(tokenize([row], tokenizer, length)[0]) == 1
    assert len(tokenize([row], tokenizer, length - 1)[0]) == 0


def test_completions_of_one_prompt_share_it(tokenizer):
    rows = [{"prompt": "p", "completion": c} for c in ("a", "b")] + [{"prompt": "q", "completion": "c"}]
    some, _ = tokenize(rows, tokenizer, 30)
    assert [len(group.responses) for group in some] == [2, 1]


@given(groups)
def test_groups_in_one_array_are_the_groups(some):
    one = Groups(some)
    assert list(one) == some and len(one) == len(some)
    assert one[-1] == some[-1] and one[1:3] == some[1:3]
    assert PackedData(one, PAD, 30).fingerprint == PackedData(some, PAD, 30).fingerprint
    with pytest.raises(IndexError):
        one[len(some)]


def test_a_data_set_takes_the_memory_of_its_tokens(world):
    """Read and tokenised: 4 bytes a token and 48 a row; Python's objects would be twenty times as much."""
    rows = list(draw_rows(world, DataConfig(pairs=1000), "train"))
    tracemalloc.start()
    some, _ = tokenize((dict(row) for row in rows), world.tokenizer, 512)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 1.3 * (4 * sum(group.length for group in some) + 48 * len(rows)) + 20_000


prompts = st.sampled_from(["a", "b", "a b", "c", "", "too long " * 20])
some_rows = st.lists(
    st.fixed_dictionaries({"prompt": prompts, "chosen": st.sampled_from(["", "x", "y"]), "rejected": st.just("x")}),
    max_size=30,
)


@given(some_rows, st.booleans())
def test_every_row_is_in_its_group_or_skipped(tokenizer, rows, share):
    some, skipped = tokenize(rows, tokenizer, 20, share)
    assert len(some.of_row) == len(rows) and list(some.of_row).count(-1) == skipped.total()
    for i, group in enumerate(some):
        mine = [row for row, of in zip(rows, some.of_row, strict=True) if of == i]
        texts = [tokenizer.decode(response) for response in group.responses]
        assert texts == [row[side] for row in mine for side in ("chosen", "rejected")] and (share or len(mine) == 1)
        assert {row["prompt"] for row in mine} == {tokenizer.decode(group.prompt)}
        assert (group.sizes or (2,)) == (2,) * len(mine)


@given(some_rows, st.floats(0.01, 0.99))
def test_usable_rows_are_held_out_and_never_a_prompt_on_both_sides(tokenizer, rows, share):
    some, _ = tokenize(rows, tokenizer, 20)
    held = every_kth_prompt(some, share)
    sides = [{tuple(group.prompt) for i, group in enumerate(some) if (i in held) == side} for side in (True, False)]
    assert not sides[0] & sides[1]
    kept, rest = rows_of(some, rows, held), some.without(held)
    assert {row["prompt"] for row in kept} == {tokenizer.decode(prompt) for prompt in sides[0]}
    assert list(rest) == [group for i, group in enumerate(some) if i not in held] and rest.compared == some.compared
    assert rows_of(rest, rows) == [row for row in rows_of(some, rows) if row not in kept]
    assert rest.used + len(kept) == some.used
    distinct = len(sides[0]) + len(sides[1])
    if distinct > 1:
        assert len(sides[0]) == min(distinct - 1, max(1, round(share * distinct)))
    else:
        assert not held  # a prompt that is trained on is not held out


def test_pairs_and_completions_in_one_file_are_refused(tokenizer):
    pair, other = {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "completion": "c"}
    ranked = {"prompt": "p", "ranked": ["a", "b"]}
    for rows in ([pair, other], [other, pair], [pair | {"chosen": ""}, other], [ranked, other], [other, ranked]):
        with pytest.raises(UserError, match=r"^row 2: .*split them into two files"):
            tokenize(rows, tokenizer, 20)


def test_no_rows_no_data():
    with pytest.raises(UserError, match="no usable rows"):
        PackedData([], PAD, 10)


def test_the_fingerprint_sees_every_token():
    one = [Group([1, 2], ([3, EOS], [4, EOS]))]
    two = [Group([1, 2], ([3, EOS], [5, EOS]))]
    moved = [Group([1], ([2, 3, EOS], [4, EOS]))]
    prints = {PackedData(some, PAD, 16).fingerprint for some in (one, two, moved)}
    assert len(prints) == 3
    assert PackedData(one, PAD, 16).fingerprint in prints


def test_batches_cover_the_order():
    data = PackedData([Group([i], ([i, EOS],)) for i in range(7)], PAD, 3)
    batches = list(data.batches(range(len(data)), 3))
    assert [len(batch.tokens) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), data.batch(np.arange(7)).tokens)


def test_a_group_never_outgrows_the_context(tokenizer):
    """However many rows share a prompt."""
    rows = [{"prompt": "p q", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(200)]
    some, _ = tokenize(rows, tokenizer, 64)
    assert max(group.length for group in some) <= 64 and sum(len(group.responses) for group in some) == 400


def test_plain_texts_are_trained_on_from_their_first_token(tokenizer):
    """Each is told from others as a whole, so that a share of them can be held out."""
    rows = [{"text": f"the same words, and {i}"} for i in range(10)] + [{"text": ""}, {"text": "a"}]
    some, skipped = tokenize(rows, tokenizer, 64)
    assert skipped == {"empty prompt": 1} or skipped == {"empty prompt": 1, "empty response": 1}
    for group, row in zip(some, rows, strict=False):
        assert group.prompt + group.responses[0] == [*tokenizer.encode(row["text"]), tokenizer.eos]
        assert len(group.prompt) == 1
    assert len(every_kth_prompt(some, 0.2)) == 2 and len(set(some.prompt_keys())) == len(some)


def test_a_turn_of_others_is_seen_and_not_scored(tokenizer):
    """Without a chat template: Human, Assistant; every turn of the assistant's ends in EOS."""
    talk = [{"role": "user", "content": "Hi"}]
    answer = [
        {"role": "assistant", "content": "look", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    short = [{"role": "assistant", "content": ""}]
    (group,), skipped = tokenize(
        [{"prompt": talk, "completion": answer}, {"prompt": talk, "completion": short}], tokenizer, 99
    )
    assert skipped == {"empty response": 1}
    assert tokenizer.decode(group.prompt) == "\n\nHuman: Hi\n\nAssistant:"
    (ids,), (given,) = group.responses, group.given
    assert tokenizer.decode(ids[i] for i in given) == "\n\nTool: 42\n\nAssistant:"
    own = [i for place, i in enumerate(ids) if place not in given]
    assert own.count(tokenizer.eos) == 2 and own[-1] == tokenizer.eos
    assert tokenizer.decode(own) == ' look[{"name": "f"}] It is 42.'
    data = PackedData([group], tokenizer.pad, 64)
    assert data.num_scored == len(own) and data.batch(np.arange(1)).target.tolist() == own
