"""Attention in spans equals attention written out, whatever is masked."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from minqstar.lm.attention import SPAN, attend, block_mask, prepare
from minqstar.training.data import Group, PackedData


def reference(q, k, v, mask):
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def packed_mask(seed: int, length: int) -> torch.Tensor:
    """Of two rows of random groups, padding included."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda most: [1] * int(torch.randint(1, most, (1,), generator=generator))  # noqa: E731
    groups = [Group(draw(90), (draw(40), draw(40))) for _ in range(12)]
    data = PackedData(groups, 0, length)
    return data.batch(torch.arange(2).numpy()).mask()


@given(st.integers(0, 10**6), st.integers(170, 4 * SPAN))
def test_spans_change_neither_values_nor_gradients(seed, length):
    mask = packed_mask(seed, length)
    seen = prepare(mask, torch.bfloat16)
    T = mask.shape[-1]
    assert len(seen.spans) == (1 if T < 2 * SPAN else -(-T // SPAN))
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dy = (torch.randn(2, 3, T, 8, generator=generator) for _ in range(4))
    grads, outs = [], []
    for call, dtype in (
        (lambda *qkv: attend(*qkv, seen), torch.bfloat16),
        (lambda *qkv: reference(*qkv, mask), torch.float64),
    ):
        leaves = [t.detach().bfloat16().to(dtype).requires_grad_() for t in (q, k, v)]
        y = call(*leaves)
        y.backward(dy.bfloat16().to(dtype))
        outs.append(y.double())
        grads.append([leaf.grad.double() for leaf in leaves])
    for ours, exact in [(outs[0], outs[1]), *zip(*grads, strict=True)]:
        assert (ours - exact).norm() < 0.02 * exact.norm()


def test_spans_skip_what_nobody_sees():
    """Two groups of 200 in a row of 400: the second half never looks at the first."""
    group = torch.arange(400) // 200
    mask = ((group[:, None] == group) & torch.ones(400, 400, dtype=torch.bool).tril())[None, None]
    assert prepare(mask, torch.bfloat16).spans == [
        (0, 128, 0, 128),
        (128, 256, 0, 256),
        (256, 384, 192, 384),
        (384, 400, 192, 400),
    ]
    assert prepare(mask, torch.float32).spans == [(0, 400, 0, 400)]  # the fused kernel takes it whole


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attentions_blocks_are_the_mask():
    """On a CPU its uncompiled form; the compiled one is for GPUs."""
    mask = packed_mask(0, 400)
    q, k, v = (torch.randn(2, 3, 400, 16) for _ in range(3))
    blocks = block_mask(mask)
    assert torch.allclose(flex_attention(q, k, v, block_mask=blocks), reference(q, k, v, mask), atol=1e-5)
    assert blocks.sparsity() > 15  # percent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_a_mask_attention_is_causal(dtype):
    q, k, v = (torch.randn(1, 2, 5, 8).to(dtype) for _ in range(3))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    exact = reference(*(t.double() for t in (q, k, v)), causal)
    for seen in (None, prepare(causal[None, None], dtype)):
        assert torch.allclose(attend(q, k, v, seen).double(), exact, atol=1e-6 if dtype == torch.float32 else 0.02)
