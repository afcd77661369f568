"""Families of architectures: how their models are described and called in Hugging Face folders, as a table.

A family is a row of `FAMILIES`: what all its models share, where its config.json has the sizes, and how its tensors are
called. Several of theirs may make one of ours (queries, keys and values), one after the other. Another family is
another row, not another class.
"""

from dataclasses import dataclass, field, replace

from torch import Tensor

from minqstar.errors import UserError, require
from minqstar.lm.model import GPT2, GPTConfig

ACTIVATIONS = {  # config.json's names of what `GPTConfig.activation` names
    "gelu": ("gelu_new", "gelu_pytorch_tanh"),
    "gelu_exact": ("gelu",),
    "swiglu": ("silu", "swish"),
}


@dataclass(frozen=True)
class Family:
    """How one architecture is called in its own folders."""

    shared: dict  # fields of GPTConfig that all its models have
    sizes: dict[str, str]  # other fields, and their keys in config.json
    activations: tuple[str, ...]
    outside: dict[str, str]  # modules outside of the blocks, ours to theirs
    block: str  # what their names in block i begin with
    inside: dict[str, str]  # modules of a block, ours to theirs, or to several of theirs that make one
    architecture: str  # transformers' class
    tied: bool = False  # where config.json does not say it
    eps: float = 1e-6  # likewise
    columns: tuple[str, ...] = ()  # modules whose matrices are transposed there
    by_head: tuple[str, ...] = ()  # modules in which each head's query, key and value stand together
    only: dict[str, tuple] = field(default_factory=dict)  # keys with values that `GPT` can do; the first is the default


LLAMA = Family(
    shared={"norm": "gain", "qk_norm": False, "smear": False},
    sizes={
        "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads", "n_embd": "hidden_size", "n_inner": "intermediate_size",
        "n_kv_head": "num_key_value_heads", "head_size": "head_dim", "norm_eps": "rms_norm_eps",
    },
    activations=("swiglu",),
    outside={"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"},
    block="model.layers.{}.",
    inside={
        "ln_1": "input_layernorm", "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attn.c_proj": "self_attn.o_proj", "attn.qk_gains": "self_attn.q_norm self_attn.k_norm",
        "ln_2": "post_attention_layernorm", "mlp.c_fc": "mlp.gate_proj mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
    },
    architecture="LlamaForCausalLM",
    only={"attention_bias": (False,), "mlp_bias": (False,)},
)  # fmt: skip


def like_llama(name: str, only: dict, **shared) -> Family:
    return replace(LLAMA, shared=LLAMA.shared | shared, architecture=f"{name}ForCausalLM", only=only)


FAMILIES = {
    "gpt2": Family(
        shared=GPT2,
        sizes={
            "vocab_size": "vocab_size", "block_size": "n_positions", "n_layer": "n_layer", "n_head": "n_head",
            "n_embd": "n_embd", "n_inner": "n_inner", "norm_eps": "layer_norm_epsilon",
        },
        activations=("gelu", "gelu_exact"),
        outside={"wte": "transformer.wte", "wpe": "transformer.wpe", "ln_f": "transformer.ln_f", "lm_head": "lm_head"},
        block="transformer.h.{}.",
        inside={name: name for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")},
        architecture="GPT2LMHeadModel",
        tied=True,
        eps=1e-5,
        columns=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        only={
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)
        },
    ),
    "llama": LLAMA,  # SmolLM2 too
    "mistral": like_llama("Mistral", only={}),
    "qwen2": like_llama("Qwen2", only={}, qkv_bias=True),
    "qwen3": like_llama("Qwen3", only={"attention_bias": (False,)}, qk_norm=True),
    "gpt_neox": Family(  # Pythia
        shared={"norm": "layer", "qk_norm": False, "bias": True, "smear": False, "parallel": True, "rope_share": 0.25},
        sizes={
            "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads", "n_embd": "hidden_size", "n_inner": "intermediate_size",
            "norm_eps": "layer_norm_eps", "parallel": "use_parallel_residual",
        },
        activations=("gelu_exact", "gelu"),
        outside={"wte": "gpt_neox.embed_in", "ln_f": "gpt_neox.final_layer_norm", "lm_head": "embed_out"},
        block="gpt_neox.layers.{}.",
        inside={
            "ln_1": "input_layernorm", "attn.c_attn": "attention.query_key_value", "attn.c_proj": "attention.dense",
            "ln_2": "post_attention_layernorm", "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h",
        },
        architecture="GPTNeoXForCausalLM",
        eps=1e-5,
        by_head=("attn.c_attn",),
        only={"attention_bias": (True,)},
    ),
}  # fmt: skip


def read_architecture(config: dict, where: str) -> tuple[Family, GPTConfig]:
    """The family and the architecture that a config.json describes. UserError if it is none that `GPT` can be."""
    kind = config.get("model_type")
    known = isinstance(kind, str) and kind in FAMILIES
    require(known, f"{where}: model_type {kind!r} is not supported; it may be {', '.join(FAMILIES)}")
    require("auto_map" not in config, f"{where} asks for code of its own (auto_map), which is never run")
    require(
        not config.get("quantization_config"), f"{where}: quantized weights are not supported; dequantize them first"
    )
    family = FAMILIES[kind]
    for key, values in family.only.items():
        value = config.get(key, values[0])
        require(value in values, f"{where}: {key} {value!r} is not supported")
    act = config.get("activation_function" if kind == "gpt2" else "hidden_act")
    activation = next((name for name in family.activations if act in ACTIVATIONS[name]), None)
    require(activation is not None, f"{where}: the activation {act!r} is not supported")
    sizes = {ours: config[theirs] for ours, theirs in family.sizes.items() if config.get(theirs) is not None}
    layers = config.get("layer_types") or []
    require(isinstance(layers, list), f"{where}: layer_types must be a list, got {layers!r}")
    odd = ", ".join(str(layer) for layer in layers if layer not in ("full_attention", "sliding_attention"))
    require(not odd, f"{where}: layers of {odd} are not supported")
    slides = "sliding_attention" in layers or config.get("use_sliding_window") or kind == "mistral"
    wide = config.get("sliding_window") if slides else None
    if type(wide) is int and type(sizes.get("block_size")) is int:
        sizes["block_size"] = min(wide, sizes["block_size"])  # in a longer text some tokens would not be seen
    sizes = {"norm_eps": family.eps, "tied": config.get("tie_word_embeddings", family.tied)} | sizes
    learned, usual = family.shared.get("positions") == "learned", family.shared.get("rope_share", 1.0)
    rotary = {} if learned else read_rotary(config, usual, where)
    for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
        require(name in sizes, f"{where} lacks {family.sizes[name]}")
    try:
        return family, GPTConfig(**family.shared | sizes | rotary | {"activation": activation})
    except UserError as e:
        raise UserError(f"{where}: {e}") from e


def read_rotary(config: dict, usual: float, where: str) -> dict:
    """Rotary positions in both dialects: `rope_parameters`, or `rope_theta` with `rope_scaling`, which transformers
    prefers. `usual` is the family's share of rotated channels; where that is all, no other is known."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    plain = isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values())
    require(plain, f"{where}: rope_parameters must be one object for all layers, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "llama3"), f"{where}: rotary scaling {kind!r} is not supported")
    both = config | rope
    share = both.get("partial_rotary_factor", both.get("rotary_pct", usual))
    require(share == 1 or usual < 1, f"{where}: partial_rotary_factor {share!r} is not supported")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind == "llama3":
        lacks = [name for name in names if type(rope.get(name)) not in (int, float)]
        require(not lacks, f"{where}: llama3 scaling lacks the number {', '.join(lacks)}")
    return {
        "rope_base": both.get("rope_theta", both.get("rotary_emb_base", 1e4)),
        "rope_share": share,
        "rope_scaling": tuple(float(rope[name]) for name in names) if kind == "llama3" else (),
    }


def written_config(kind: str, config: GPTConfig) -> dict:
    """A config.json of a family; `read_architecture` gives the same architecture, if it is of that family at all."""
    family = FAMILIES[kind]
    written = {"model_type": kind, "architectures": [family.architecture], "tie_word_embeddings": config.tied}
    values = {"n_kv_head": config.nkv, "head_size": config.hs, "n_inner": config.inner}
    written |= {theirs: values.get(ours, getattr(config, ours)) for ours, theirs in family.sizes.items()}
    if config.activation in ACTIVATIONS:
        written["activation_function" if kind == "gpt2" else "hidden_act"] = ACTIVATIONS[config.activation][0]
    if config.positions == "rotary":
        rope = {"rope_type": "default", "rope_theta": config.rope_base, "partial_rotary_factor": config.rope_share}
        if config.rope_scaling:
            factor, low, high, context = config.rope_scaling
            rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            rope["original_max_position_embeddings"] = int(context)
        written |= {"rope_parameters": rope, "rope_theta": config.rope_base, "rotary_pct": config.rope_share}
        written |= {"rope_scaling": rope if config.rope_scaling else None}
    return written | {key: values[0] for key, values in family.only.items()}


def their_names(family: Family, name: str) -> tuple[list[str], bool, bool]:
    """Of one of our parameters: the tensors that make it there, whether transposed, and whether by head."""
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        module, kind = name, "weight"
    begin, of = "", family.outside
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        begin, of = family.block.format(layer), family.inside
    theirs = [f"{begin}{part}.{kind}" for part in of[module].split()]
    return theirs, module in family.columns and kind == "weight", module in family.by_head


def part_rows(config: GPTConfig, whole: Tensor, parts: int) -> list[int]:
    """How many rows each part of one of our parameters has: queries, keys and values differ where keys are shared."""
    return [config.n_head * config.hs, *[config.nkv * config.hs] * 2] if parts == 3 else [len(whole) // parts] * parts


def is_of(kind: str, config: GPTConfig) -> bool:
    """Whether an architecture is one of a family."""
    try:
        read = read_architecture(written_config(kind, config), kind)[1]
    except UserError:
        return False
    a, b = (replace(c, n_kv_head=c.nkv, head_size=c.hs, n_inner=c.inner) for c in (read, config))
    return a == b
