import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from naive import hidden_states

from minqstar.cli import UserError
from minqstar.model import GPT, GPTConfig, KVCache


def random_tokens(seed: int, rows: int, length: int, vocab: int = 23) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_forward_equals_its_naive_twin(heads):
    model = random_model(n_head=heads).double()
    tokens = random_tokens(0, 1, 9)
    with torch.no_grad():
        # the tables of cosines are kept in fp32, hence not 1e-12
        assert torch.allclose(model(tokens)[0], hidden_states(model, tokens[0].tolist()), atol=2e-6)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 6))
def test_cached_equals_full(seed, lengths, new):
    """Prefill of rows of unequal length, then single steps, then a step of several tokens."""
    model = random_model(seed)
    rows, longest = len(lengths), max(lengths)
    tokens = random_tokens(seed, rows, longest + new)
    cache = KVCache(model.config, rows, longest + new, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        full = model(tokens)
        first = model(tokens[:, :longest], cache=cache)
        starts = torch.tensor(lengths)
        for row, length in enumerate(lengths):
            assert torch.allclose(first[row, :length], full[row, :length], atol=1e-5)
        for step in range(new):
            position = starts + step
            token = tokens[torch.arange(rows), position]
            hidden = model(token[:, None], position[:, None], cache=cache)
            assert torch.allclose(hidden[:, 0], full[torch.arange(rows), position], atol=1e-5)


def test_a_fresh_model_is_the_identity_between_embedding_and_head():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=23, n_embd=16, n_layer=2))
    tokens = random_tokens(0, 2, 5)
    unit = torch.nn.functional.rms_norm(model.wte.weight[tokens], (16,))
    assert torch.allclose(model(tokens), torch.nn.functional.rms_norm(unit, (16,)), atol=1e-5)


def test_later_tokens_change_nothing_before_them():
    model = random_model()
    tokens = random_tokens(1, 1, 10)
    other = tokens.clone()
    other[0, 6] = (other[0, 6] + 1) % 23
    with torch.no_grad():
        a, b = model(tokens), model(other)
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.allclose(a[:, 6:], b[:, 6:])


@pytest.mark.parametrize("bad", [{"n_head": 3}, {"n_layer": 0}, {"vocab_size": -1}, {"n_embd": 1.5}])
def test_an_impossible_architecture_is_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        GPTConfig(**bad)
