"""The transformer. Its logits are a Q-function: Q(s, a) = beta * logits[a] up to a function of the state.

The default block is built to learn fast while small: RMSNorm without gains, rotary positions, normalised queries
and keys, a squared-ReLU MLP, no biases, one matrix for embedding and head, output projections that start at zero so
that a fresh block is the identity, and a share of the token before in each token's embedding: copying "the number after
`pay`" needs keys that know what stands before them. Other fields of the configuration make it GPT-2 (`GPT2`), Llama,
Qwen or GPT-NeoX: `pretrained.py` has them as a table.
Shapes: B rows, T tokens a row, C channels, nh heads of queries and nkv of keys and values, of size hs; S cache slots,
W slots seen, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minqstar.errors import require
from minqstar.lm.attention import Seen, attend, prepare


@dataclass(frozen=True)
class GPTConfig:
    """The architecture. `block_size` bounds the positions of a prompt with its response and EOS."""

    vocab_size: int = 1024
    """Tokens in the vocabulary, EOS and PAD included; train.py takes it from the vocabulary file."""
    block_size: int = 1024
    """Longest prompt with its response and EOS, in tokens."""
    n_layer: int = 4
    """Blocks."""
    n_head: int = 2
    """Attention heads of each block."""
    n_embd: int = 128
    """Channels of the residual stream."""
    n_kv_head: int = 0
    """Heads of keys and values, each shared by as many heads of queries (Llama); 0 is n_head."""
    head_size: int = 0
    """Channels of a head; 0 is n_embd / n_head."""
    n_inner: int = 0
    """Channels inside the MLP; 0 is 4 n_embd."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotated queries and keys, or an embedding of each position added to the token's (GPT-2)."""
    rope_base: float = 1e4
    """Of rotary positions: the slowest channels turn about once in 2 pi times so many tokens."""
    rope_share: float = 1.0
    """Of rotary positions: the share of a head's channels that is rotated (GPT-NeoX: a quarter)."""
    rope_scaling: tuple[float, ...] = ()
    """Of rotary positions, Llama 3's longer context: factor, slow and fast turns, context before; or nothing."""
    norm: Literal["rms", "gain", "layer"] = "rms"
    """RMSNorm without gains, of the embedding too, and a head scaled to match; in the blocks alone, RMSNorm with gains
    (Llama) or LayerNorm (GPT-2)."""
    norm_eps: float = 1e-6
    """Added to the mean square or variance."""
    qk_norm: bool = True
    """Whether queries and keys are normalised, with gains if the norms have them (GPT-2: not; Qwen3: yes)."""
    activation: Literal["relu2", "gelu", "gelu_exact", "swiglu"] = "relu2"
    """Of the MLP: squared ReLU, GELU in its tanh form (GPT-2) or exact (GPT-NeoX), or a gate of SiLU (Llama)."""
    bias: bool = False
    """Whether the linear layers have biases (GPT-2: yes)."""
    qkv_bias: bool = False
    """Whether the layer of queries, keys and values has biases where the others have none (Qwen2)."""
    parallel: bool = False
    """Whether attention and MLP of a block read the same stream (GPT-NeoX)."""
    tied: bool = True
    """Whether the head is the embedding."""
    smear: bool = True
    """Whether a learned share of the embedding of the token before is added to each token's (GPT-2: not)."""

    def __post_init__(self):
        for name, most in MOST.items():
            value, least = getattr(self, name), int(name not in DEFAULTS)
            good = type(value) is int and least <= value <= most
            require(good, f"{name} must be a whole number between {least} and {most:,}, got {value!r}")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            require(type(value) is type(known[0]) and value in known, f"{name} must be one of {known}, got {value!r}")
        for name, most in {"rope_base": 1e12, "rope_share": 1.0, "norm_eps": 1.0}.items():
            value = getattr(self, name)
            good = type(value) in (int, float) and 0 < value <= most
            require(good, f"{name} must be a number above 0 and at most {most:g}, got {value!r}")
        pairs = self.hs % 2 == 0 and (self.head_size or self.n_embd % self.n_head == 0)
        sizes = f"n_embd ({self.n_embd}) must be a multiple of twice n_head ({self.n_head})"
        require(pairs, f"{sizes}, or head_size be given and even: rotary pairs channels")
        require(self.n_head % self.nkv == 0, f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.nkv})")
        pairs = self.rotated > 0 and self.rotated % 2 == 0
        require(pairs, f"rope_share ({self.rope_share}) rotates {self.rotated} of {self.hs} channels: want pairs")
        scaling = tuple(self.rope_scaling)  # from JSON it comes as a list
        object.__setattr__(self, "rope_scaling", scaling)
        good = not scaling or (len(scaling) == 4 and min(scaling) > 0 and scaling[1] < scaling[2])
        require(good, f"rope_scaling must be empty or four positive numbers, the second below the third, got {scaling}")

    @property
    def hs(self) -> int:
        return self.head_size or self.n_embd // self.n_head

    @property
    def nkv(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def inner(self) -> int:
        return self.n_inner or 4 * self.n_embd

    @property
    def rotated(self) -> int:
        """Channels of a head that rotary positions turn."""
        return int(self.hs * self.rope_share)


MOST = {"vocab_size": 2**20, "block_size": 2**20, "n_layer": 1000, "n_head": 2**10, "n_embd": 2**16}
DEFAULTS = {"n_kv_head": 2**10, "head_size": 2**12, "n_inner": 2**18}  # 0 is the usual size
MOST |= DEFAULTS
CHOICES = {
    "positions": ("rotary", "learned"),
    "norm": ("rms", "gain", "layer"),
    "activation": ("relu2", "gelu", "gelu_exact", "swiglu"),
    **dict.fromkeys(("qk_norm", "bias", "qkv_bias", "parallel", "tied", "smear"), (True, False)),
}
GPT2 = {
    "positions": "learned", "norm": "layer", "norm_eps": 1e-5, "qk_norm": False, "activation": "gelu", "bias": True,
    "smear": False,
}  # fmt: skip


class KVCache:
    """Preallocated keys and values of B rows of S slots. One token a slot; who sees which slots the caller says."""

    def __init__(self, config: GPTConfig, rows: int, slots: int, device: torch.device, dtype: torch.dtype):
        shape = (rows, slots, config.nkv, config.hs)
        self.layers = [  # keys and values of each, (B, S, nkv, hs)
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in "kv") for _ in range(config.n_layer)
        ]

    @property
    def slots(self) -> int:
        return self.layers[0][0].shape[1]

    def add_slots(self, count: int):
        """More slots for every row, behind the others."""
        self.layers = [
            tuple(torch.cat((t, t.new_zeros(len(t), count, *t.shape[2:])), dim=1) for t in layer)
            for layer in self.layers
        ]

    def view(self, slots: Tensor, window: int | Tensor) -> "CacheView":
        """For one forward: its T tokens go to the `slots` (T,), and it looks at the `window`.

        The window is the first so many slots, or a list of slots (B, W) for each row.
        """
        return CacheView(self.layers, slots, window)


class CacheView(NamedTuple):
    """What one forward writes to and reads from."""

    layers: list[tuple[Tensor, Tensor]]
    slots: Tensor
    window: int | Tensor

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the (B, T, nkv, hs) keys and values; return the window's, (B, W, nkv, hs)."""
        stores = self.layers[layer]
        for store, new in zip(stores, (k, v), strict=True):
            store.index_copy_(1, self.slots, new)
        if isinstance(self.window, int):
            return tuple(store[:, : self.window] for store in stores)
        rows = torch.arange(len(k), device=k.device)[:, None]
        return tuple(store[rows, self.window] for store in stores)


def rotary(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each (block_size, half the rotated channels)."""
    half = config.rotated // 2
    frequency = config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    if config.rope_scaling:  # what turned slowly in the context before turns `factor` times more slowly
        factor, slow, fast, context = config.rope_scaling
        kept = ((context * frequency / (2 * math.pi) - slow) / (fast - slow)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = torch.arange(config.block_size, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each channel pair of (B, T, heads, hs) by its position's angle; cos and sin are (B, T, 1, half)."""
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)


class RMSNormFunction(torch.autograd.Function):
    """y = x / rms(x), so dx = (dy - y mean(y dy)) / rms(x).

    On a CPU the backward of F.rms_norm takes four times as long as the chain rule through its parts, and that twice as
    many passes over memory as this.
    """

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(torch.linalg.vecdot(x, x)[..., None] / x.shape[-1] + eps)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        mean = torch.linalg.vecdot(y, dy)[..., None] / y.shape[-1]
        return torch.addcmul(dy, y, mean, value=-1) * scale, None


class SquaredReLU(torch.autograd.Function):
    """y = max(x, 0)^2, so dy/dx = 2 max(x, 0): half the passes of relu and square, each with its own backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = F.relu(x)
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return 2 * dy * ctx.saved_tensors[0]


def rms_norm(x: Tensor, eps: float = 1e-6, gains: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dimension. With gains, as in others' models, bfloat16 squares are summed in fp32."""
    if gains is None:
        return RMSNormFunction.apply(x, eps)
    if not torch.is_grad_enabled():
        return F.rms_norm(x, x.shape[-1:], eps=eps) * gains
    precise = x.float() if x.dtype == torch.bfloat16 else x
    return RMSNormFunction.apply(precise, eps).to(x.dtype) * gains.to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, eps: float, *gains: int):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(gains)) if gains else None

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps, self.weight)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(config.n_embd, config.norm_eps)
    return RMSNorm(config.norm_eps, *[config.n_embd] * (config.norm == "gain"))


Rotation = tuple[Tensor, Tensor]  # cos and sin of every position
Write = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # new keys and values -> all that may be seen


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.nkv = config.n_head, config.nkv
        self.eps = config.norm_eps if config.qk_norm else None
        gains = config.qk_norm and config.norm == "gain"
        self.qk_gains = nn.Parameter(torch.ones(2 * config.hs)) if gains else None  # all queries', all keys'
        heads = config.n_head + 2 * config.nkv
        self.c_attn = nn.Linear(config.n_embd, heads * config.hs, bias=config.bias or config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * config.hs, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rotation: Rotation | None, seen: Seen | None, write: Write | None) -> Tensor:
        nh, nkv = self.n_head, self.nkv
        qk, v = self.c_attn(x).unflatten(-1, (nh + 2 * nkv, -1)).split((nh + nkv, nkv), dim=2)  # (B, T, heads, hs)
        if self.eps:
            gains = self.qk_gains
            if gains is not None:
                of_q, of_k = gains.view(2, -1)
                gains = torch.cat((of_q.expand(nh, -1), of_k.expand(nkv, -1)))
            qk = rms_norm(qk, self.eps, gains)
        q, k = (rotate(qk, *rotation) if rotation else qk).split((nh, nkv), dim=2)
        if write:
            k, v = write(k, v)  # (B, W, nkv, hs): all that may be seen
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).flatten(2))


def swiglu(x: Tensor) -> Tensor:
    """SiLU of the first half of the channels times the second (arXiv 2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS = {
    "relu2": lambda x: SquaredReLU.apply(x),
    "gelu": partial(F.gelu, approximate="tanh"),
    "gelu_exact": F.gelu,
    "swiglu": swiglu,
}


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        gated = 1 + (config.activation == "swiglu")
        self.c_fc = nn.Linear(config.n_embd, gated * config.inner, bias=config.bias)
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = make_norm(config), Attention(config)
        self.ln_2, self.mlp = make_norm(config), MLP(config)
        self.parallel = config.parallel

    def forward(
        self, x: Tensor, rotation: Rotation | None, seen: Seen | None, write: Write | None, keep: Tensor | None
    ) -> Tensor:
        y = x + self.attn(self.ln_1(x), rotation, seen, write)
        if keep is not None:
            x, y = x.flatten(0, 1)[keep] if self.parallel else x, y.flatten(0, 1)[keep]
        return y + self.mlp(self.ln_2(x if self.parallel else y))


class GPT(nn.Module):
    """`model(tokens)` gives hidden states (B, T, C); `model.logits` turns those that matter into logits.

    By default the head is the embedding (tied): a fact that attention copies from the prompt is then already spelled in
    the head's own language, and copying emerges in about half the steps.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.smear = nn.Parameter(torch.empty(config.n_embd)) if config.smear else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.packed_head: nn.Module | None = None  # see fast.packed
        self.recompute = False  # computes a block's activations again in the backward pass rather than keep them
        self.head_scale = config.n_embd**-0.5 if config.norm == "rms" else 1.0
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self.init_positions()
        self.init_weights()

    def init_positions(self, device: torch.device | None = None):
        if self.wpe is None:
            self.cos, self.sin = (table.to(device) for table in rotary(self.config))

    def init_weights(self):
        """Embeddings are of unit size where the head is scaled, and of 0.02 where it is not.

        The tied head so begins by predicting the token that it reads: the first SFT loss is 10.2 nats, not ln V = 6.9.
        With an embedding 0.3 times as large it is 7.0, but the held-out loss after `train.py --stage sft` is 0.419,
        not 0.401; at 0.1 times it is 0.469 (seed 0).
        """
        for name, p in self.named_parameters():
            if name.startswith(("wte", "wpe")):
                nn.init.normal_(p, std=1.0 if self.config.norm == "rms" else 0.02)
            elif name.endswith(("c_attn.weight", "c_fc.weight")):
                nn.init.uniform_(p, -1, 1)
                p.data *= math.sqrt(3 / p.shape[1])
            elif name.endswith(("c_proj.weight", "lm_head.weight", "bias")):
                nn.init.zeros_(p)
            elif name == "smear":
                nn.init.constant_(p, 0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        """(…, C), the norm of the stream's beginning included."""
        sparse = torch.is_grad_enabled() and self.lm_head is None  # the gradient's few rows are added to the head's
        x = F.embedding(tokens, self.wte.weight, sparse=sparse)
        return rms_norm(x, self.config.norm_eps) if self.config.norm == "rms" else x

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | Seen | None = None,
        cache: CacheView | None = None,
        keep: Tensor | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) of tokens (B, T), or (N, C) of those whose flat indices `keep` (N,) holds.

        Without positions (B, T) they count from 0. `before` (B, T) holds the token before each, -1 where there is none;
        without it the tokens of a row follow each other. The mask (B, 1, T, W) says which keys each token sees: of the
        T tokens themselves, or of the cache's window, W slots. Without one attention is causal, and W must be T. The
        last MLP works on what is kept only: the others give keys and values to it and nothing more.
        """
        B, T = tokens.shape
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        x = self.embed(tokens)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        if self.smear is not None:
            before = F.pad(tokens[:, :-1], (1, 0), value=-1) if before is None else before
            x = x + self.smear * self.embed(before.clamp(min=0)).where(before[..., None] >= 0, 0.0)
        if torch.is_autocast_enabled(x.device.type):  # the whole stream in that type: half the bytes to move
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rotation = None
        if self.wpe is None:
            rotation = tuple(table[positions][:, :, None].to(x.dtype) for table in (self.cos, self.sin))
        seen = prepare(mask, x.dtype) if isinstance(mask, Tensor) else mask
        for layer, block in enumerate(self.blocks):
            write = partial(cache.write, layer) if cache else None
            if self.recompute and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            x = block(x, rotation, seen, write, keep if layer == len(self.blocks) - 1 else None)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C): beta times them is Q, up to a function of the state."""
        hidden = hidden * self.head_scale if self.head_scale != 1 else hidden
        head = self.packed_head or self.lm_head
        return head(hidden) if head else F.linear(hidden, self.wte.weight)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())
