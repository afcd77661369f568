import pytest
import torch
from conftest import gpt2_twins, random_model
from hypothesis import given
from hypothesis import strategies as st
from naive import hidden_states

from minqstar.errors import UserError
from minqstar.lm.model import GPT, GPTConfig, KVCache, SquaredReLU, rms_norm


def random_tokens(seed: int, rows: int, length: int, vocab: int = 23) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_forward_equals_its_naive_twin(heads):
    model = random_model(n_head=heads).double()
    tokens = random_tokens(0, 1, 9)
    with torch.no_grad():
        # the tables of cosines are kept in fp32, hence not 1e-12
        assert torch.allclose(model(tokens)[0], hidden_states(model, tokens[0].tolist()), atol=2e-6)


configs = st.fixed_dictionaries(
    {
        "positions": st.sampled_from(["rotary", "learned"]),
        "norm": st.sampled_from(["rms", "layer"]),
        "activation": st.sampled_from(["relu2", "gelu"]),
        "qk_norm": st.booleans(),
        "bias": st.booleans(),
        "smear": st.booleans(),
    }
)


@given(configs, st.integers(0, 10**6), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 6))
def test_cached_equals_full(config, seed, lengths, new):
    """Prefill of rows of unequal length, then single steps, for every architecture."""
    model = random_model(seed, **config)
    rows, longest = len(lengths), max(lengths)
    tokens = random_tokens(seed, rows, longest + new)
    cache = KVCache(model.config, rows, longest + new, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        full = model(tokens)
        first = model(tokens[:, :longest], cache=cache.view(torch.arange(longest), longest))
        starts = torch.tensor(lengths)
        for row, length in enumerate(lengths):
            assert torch.allclose(first[row, :length], full[row, :length], atol=1e-5)
        for step in range(new):  # its slot is the next one for all rows, whatever its position
            position = starts + step
            token = tokens[torch.arange(rows), position]
            slots = torch.arange(longest + step + 1)
            seen = (slots < starts[:, None]) | (slots >= longest)
            view = cache.view(torch.tensor([longest + step]), longest + step + 1)
            before = tokens[torch.arange(rows), position - 1][:, None]
            hidden = model(token[:, None], position[:, None], seen[:, None, None], view, before=before)
            assert torch.allclose(hidden[:, 0], full[torch.arange(rows), position], atol=1e-5)


def test_a_fresh_model_is_the_identity_between_embedding_and_head():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=23, n_embd=16, n_layer=2))
    tokens = random_tokens(0, 2, 5)
    unit = torch.nn.functional.rms_norm(model.wte.weight[tokens], (16,))
    unit[:, 1:] += 0.5 * unit[:, :-1].clone()  # the smear's share to begin with
    assert torch.allclose(model(tokens), torch.nn.functional.rms_norm(unit, (16,)), atol=1e-5)


@pytest.mark.parametrize("function", [rms_norm, SquaredReLU.apply])
def test_gradients_written_by_hand(function):
    x = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(function, x)


@pytest.mark.parametrize("n_layer", [1, 3])
def test_what_is_kept_is_as_if_all_were(n_layer):
    """Values and gradients; a token may be kept twice."""
    model, tokens, keep = random_model(n_layer=n_layer), random_tokens(1, 3, 10), torch.tensor([29, 3, 3, 0, 17])
    grads = []
    for hidden in (model(tokens, keep=keep), model(tokens).flatten(0, 1)[keep]):
        loss = model.logits(hidden).square().sum()
        grads.append((hidden, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*grads, strict=True))


def test_later_tokens_change_nothing_before_them():
    model = random_model()
    tokens = random_tokens(1, 1, 10)
    other = tokens.clone()
    other[0, 6] = (other[0, 6] + 1) % 23
    with torch.no_grad():
        a, b = model(tokens), model(other)
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.allclose(a[:, 6:], b[:, 6:])


@pytest.mark.parametrize("seed", range(3))
def test_gpt2_by_config_is_transformers_gpt2(seed):
    """Equal logits, in a full forward, padded, packed and cached."""
    theirs, ours = gpt2_twins(seed)
    lengths = [5, 17, 9]
    rows = [random_tokens(seed + i, 1, length, 61)[0] for i, length in enumerate(lengths)]
    with torch.no_grad():
        expected = [theirs(row[None]).logits[0] for row in rows]
        assert expected[0].std() > 0.5  # a comparison of zeros would prove nothing

        def same(got, want):
            assert torch.allclose(got, want, atol=1e-4, rtol=1e-4)

        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        logits = ours.logits(ours(padded))
        for i, length in enumerate(lengths):
            same(logits[i, :length], expected[i])
        group = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
        positions = torch.cat([torch.arange(length) for length in lengths])
        mask = (group[:, None] == group) & torch.ones(len(group), len(group), dtype=torch.bool).tril()
        packed = ours.logits(ours(torch.cat(rows)[None], positions[None], mask[None, None]))[0]
        for i, piece in enumerate(packed.split(lengths)):
            same(piece, expected[i])
        cache = KVCache(ours.config, 3, 17, torch.device("cpu"), torch.float32)
        ours(padded[:, :4], cache=cache.view(torch.arange(4), 4))
        for t in range(4, 17):
            seen = torch.ones(3, 1, 1, t + 1, dtype=torch.bool)
            view = cache.view(torch.tensor([t]), t + 1)
            logits = ours.logits(ours(padded[:, t : t + 1], torch.full((3, 1), t), seen, view))
            for i, length in enumerate(lengths):
                if t < length:
                    same(logits[i, 0], expected[i][t])


@pytest.mark.parametrize(
    "bad", [{"n_head": 3}, {"n_layer": 0}, {"vocab_size": -1}, {"n_embd": 1.5}, {"norm": "batch"}, {"bias": "no"}]
)
def test_an_impossible_architecture_is_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        GPTConfig(**bad)
