"""softmax(q k^T / sqrt(hs)) v, where each query sees what a mask lets it see: the fastest way on each machine.

Shapes: B rows, nh heads of queries and nkv of keys and values, of size hs, T queries, W keys.
"""

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SPAN = 128  # queries that share their range of keys
ROUND = 64  # the range begins and ends at a multiple of so many


class Seen(NamedTuple):
    """What the queries see, in the form that the machine at hand is fast with."""

    bias: Tensor  # (B, 1, T, W) 0 where seen, -inf elsewhere
    spans: list[tuple[int, int, int, int]]  # (a, b, low, high): no query of a..b sees a key outside of low..high
    blocks: "BlockMask | None" = None  # which blocks of the scores FlexAttention has to compute


def prepare(mask: Tensor, dtype: torch.dtype) -> Seen:
    """From a mask (B, 1, T, W), true where a query sees a key. Done once for all layers of a forward."""
    bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    T, W = mask.shape[-2:]
    whole = Seen(bias, [(0, T, 0, W)])
    if mask.is_cuda:
        return whole._replace(blocks=block_mask(mask)) if T == W and T >= SPAN else whole
    if dtype != torch.bfloat16 or T < 2 * SPAN:
        return whole
    anyone = mask.any(dim=0)[0].byte()  # argmax finds the first of equals
    first, last = anyone.argmax(-1).tolist(), (W - anyone.flip(-1).argmax(-1)).tolist()
    spans = []
    for a, b in itertools.pairwise([*range(0, T, SPAN), T]):
        # rounded outwards: every new shape costs the library of products a new kernel
        low, high = min(first[a:b]) // ROUND * ROUND, -(-max(last[a:b]) // ROUND) * ROUND
        spans.append((a, b, low, min(high, W)))
    return Seen(bias, spans)


def block_mask(mask: Tensor) -> "BlockMask":
    """FlexAttention's view of a mask (B, 1, T, W), arXiv 2412.05496: whole blocks that nobody sees are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask  # seconds to import, for GPUs only

    B, _, T, W = mask.shape
    return create_block_mask(lambda b, h, q, k: mask[b, 0, q, k], B, None, T, W, device=mask.device)


@functools.cache
def flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled: eager, it would write out all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen | None) -> Tensor:
    """The mix (B, nh, T, hs) of values (B, nkv, W, hs) that each query asks for; without `seen` attention is causal."""
    B, nh, T, hs = q.shape
    shared = nh // k.shape[1]  # heads of queries for each of keys and values
    if seen is not None and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        if len(seen.spans) > 1 and not torch.compiler.is_compiling():
            k, v = (t.repeat_interleave(shared, dim=1) if shared > 1 else t for t in (k, v))
            return SpanAttention.apply(q, k, v, seen)
        # the fused kernel's backward takes twice as long in bfloat16
        scores = (q * hs**-0.5).reshape(B, -1, shared * T, hs) @ k.transpose(-2, -1)
        weights = (scores.view(B, nh, T, -1) + seen.bias).softmax(-1)
        return (weights.view(B, -1, shared * T, weights.shape[-1]) @ v).view(B, nh, T, hs)
    if seen is not None and seen.blocks is not None:
        return flex_attention()(q, k, v, block_mask=seen.blocks, enable_gqa=shared > 1)
    bias = seen and seen.bias
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=seen is None, enable_gqa=shared > 1)


class SpanAttention(torch.autograd.Function):
    """The two products span by span, without the keys that nobody there sees: in packed rows about half of them."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
        B, nh, _, hs = q.shape
        q, k, v = (rearrange(t, "B nh T hs -> (B nh) T hs") for t in (q * hs**-0.5, k, v))
        y, weights = torch.empty_like(q), []
        for a, b, low, high in seen.spans:
            scores = q[:, a:b] @ k[:, low:high].mT
            scores.view(B, nh, b - a, high - low).add_(seen.bias[:, :, a:b, low:high])
            weights.append(scores.softmax(-1))
            y[:, a:b] = weights[-1] @ v[:, low:high]
        ctx.save_for_backward(q, k, v, *weights)
        ctx.spans, ctx.rows = seen.spans, B
        return rearrange(y, "(B nh) T hs -> B nh T hs", B=B)

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v, *weights = ctx.saved_tensors
        dy = rearrange(dy, "B nh T hs -> (B nh) T hs")
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for w, (a, b, low, high) in zip(weights, ctx.spans, strict=True):
            dv[:, low:high] += w.mT @ dy[:, a:b]
            dw = dy[:, a:b] @ v[:, low:high].mT
            ds = torch._softmax_backward_data(dw, w, -1, w.dtype)  # w (dw - sum(w dw))
            dq[:, a:b] = ds @ k[:, low:high]
            dk[:, low:high] += ds.mT @ q[:, a:b]
        dq *= q.shape[-1] ** -0.5
        return *(rearrange(t, "(B nh) T hs -> B nh T hs", B=ctx.rows) for t in (dq, dk, dv)), None
