"""Other people's checkpoints: the same numbers as transformers, in and out, and one line for what does not fit."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minqstar.errors import UserError
from minqstar.lm.families import FAMILIES, LLAMA, is_of, read_architecture
from minqstar.lm.fast import PackedLinear, has_fast_bf16, packed
from minqstar.lm.model import GPT, GPTConfig
from minqstar.lm.pretrained import export, is_pretrained, load_pretrained
from minqstar.search.decode import decode, greedy
from minqstar.search.evaluator import Network
from minqstar.training.data import PackedData
from minqstar.training.groups import Group
from minqstar.training.scoring import score_groups, token_logps

CPU, V = torch.device("cpu"), 97
SIZES = {"vocab_size": V, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
SIZES |= {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2_SIZES = {
    "vocab_size": V,
    "n_embd": 48,
    "n_layer": 2,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def heads(n: int, kv: int) -> dict:
    return {"num_attention_heads": n, "num_key_value_heads": kv}


CASES = {
    "gpt2": transformers.GPT2Config(**GPT2_SIZES, n_head=3),
    "gpt2, n_inner and exact GELU": transformers.GPT2Config(
        **GPT2_SIZES, n_head=4, n_inner=100, activation_function="gelu", layer_norm_epsilon=1e-3
    ),
    "llama, tied": transformers.LlamaConfig(**SIZES, **heads(3, 3), tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama, grouped": transformers.LlamaConfig(**SIZES, **heads(6, 2), tie_word_embeddings=False),
    "llama, head_dim, long context": transformers.LlamaConfig(
        **SIZES, **heads(3, 1), head_dim=10, rope_parameters=LLAMA3
    ),
    "mistral": transformers.MistralConfig(**SIZES, **heads(6, 3), sliding_window=40),
    "qwen2": transformers.Qwen2Config(
        **SIZES, **heads(6, 2), rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, **heads(6, 2), head_dim=16, tie_word_embeddings=True),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES, num_attention_heads=3, rotary_pct=0.25),
    "gpt_neox, one after the other": transformers.GPTNeoXConfig(
        **SIZES, num_attention_heads=2, rotary_pct=0.5, use_parallel_residual=False, hidden_act="gelu_new"
    ),
}


def random_twin(config) -> torch.nn.Module:
    """transformers' model with random weights, none of them at its usual beginning."""
    model, generator = transformers.AutoModelForCausalLM.from_config(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.5))
    return model


@pytest.fixture(scope="module", params=CASES)
def twins(request, tmp_path_factory):
    """transformers' model, ours from its folder, and the folder."""
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    theirs = random_twin(CASES[request.param])
    theirs.save_pretrained(folder)
    return theirs, load_pretrained(folder, CPU), folder


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_and_packed_scores_are_those_of_transformers(twins):
    theirs, ours, _ = twins
    tokens = ids(2, 33)
    assert (theirs(tokens).logits - ours.logits(ours(tokens))).abs().max() < 1e-4
    groups = [
        Group(ids(n, seed=n).tolist(), (ids(5, seed=n).tolist(), ids(n, seed=2 * n).tolist())) for n in (3, 11, 7)
    ]
    for group, found in zip(groups, score_groups(ours, groups, V - 1), strict=True):
        for response, logps in zip(group.responses, found, strict=True):
            alone = (
                theirs(torch.tensor([group.prompt + response])).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
            )
            assert torch.allclose(logps, alone.gather(-1, torch.tensor(response)[:, None])[:, 0], atol=1e-4)


@torch.no_grad()
def test_cached_decoding_of_prompts_of_two_lengths_is_that_of_transformers(twins):
    """At each step, in one batch with a longer prompt, log-probs are those of a whole forward of the other side."""
    theirs, ours, _ = twins
    prompts, network = [ids(9).tolist(), ids(4, seed=1).tolist()], Network(ours)
    for prompt, (found,) in zip(prompts, decode(network, prompts, (V,), 20, greedy), strict=True):
        logps = theirs(torch.tensor([prompt + found.tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert logps.argmax(-1).tolist() == found.tokens and found.truncated
        assert torch.allclose(logps.max(-1).values, torch.tensor(found.logps), atol=1e-4)


def test_what_goes_out_comes_back_and_transformers_loads_it(twins, tmp_path):
    theirs, ours, folder = twins
    export(ours, tmp_path / "out")
    again = load_pretrained(tmp_path / "out", CPU)
    assert all(map(torch.equal, again.parameters(), ours.parameters())) and again.config.hs == ours.config.hs
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = ids(2, 30)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)
    was, written = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert all(torch.equal(tensor, written[name]) for name, tensor in was.items())
    with pytest.raises(UserError, match="out exists"):
        export(ours, tmp_path / "out")


def test_gradients_are_those_of_transformers(twins, tmp_path):
    """Through the packed path that training takes. The gradients go out as if they were weights."""
    theirs, ours, _ = twins
    prompt, responses = ids(7).tolist(), [ids(6, seed=1).tolist(), ids(9, seed=2).tolist()]
    batch = PackedData([Group(prompt, tuple(responses))], V - 1, 48).batch(np.array([0]))
    ours.zero_grad()
    token_logps(ours, batch).square().sum().backward()
    theirs.zero_grad()
    for response in responses:
        logps = theirs(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logps.gather(-1, torch.tensor(response)[:, None]).square().sum().backward()
    grads = copy.deepcopy(ours)
    with torch.no_grad():
        for p, of in zip(grads.parameters(), ours.parameters(), strict=True):
            p.copy_(of.grad.to_dense())
    export(grads, tmp_path / "grads")
    written = load_file(tmp_path / "grads/model.safetensors")
    for name, p in theirs.named_parameters():
        name = name if name in written else "embed_out.weight"  # as GPT-NeoX's file calls what transformers does not
        assert torch.allclose(written[name], p.grad, rtol=1e-3, atol=1e-3 * p.grad.abs().max().item()), name


def test_both_dialects_of_rotary_positions_are_read(tmp_path):
    config = {**CASES["llama, head_dim, long context"].to_dict(), "rope_parameters": None}
    new = read_architecture({**config, "rope_parameters": LLAMA3}, "config")[1]
    scaling = {**LLAMA3, "type": LLAMA3["rope_type"]}
    del scaling["rope_type"], scaling["rope_theta"]
    old = read_architecture({**config, "rope_theta": 5e5, "rope_scaling": scaling}, "config")[1]
    assert new == old and new.rope_scaling == (8.0, 1.0, 4.0, 32.0) and new.rope_base == 5e5
    neox = CASES["gpt_neox"].to_dict() | {"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 1234}
    assert read_architecture(neox, "config")[1].rope_share == 0.25
    assert read_architecture(neox, "config")[1].rope_base == 1234


def test_what_a_configuration_leaves_out_or_says_twice_is_read_as_transformers_reads_it():
    neox = CASES["gpt_neox"].to_dict() | {"rope_parameters": None}
    del neox["use_parallel_residual"]
    read = read_architecture(neox, "config")[1]
    assert read.parallel and read.rope_share == 0.25
    gpt2 = CASES["gpt2, n_inner and exact GELU"].to_dict() | {"hidden_act": "gelu_new"}
    assert read_architecture(gpt2, "config")[1].activation == "gelu_exact"
    llama = CASES["llama, grouped"].to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert read_architecture(llama | {"rope_scaling": LLAMA3}, "config")[1].rope_base == 5e5
    odd = {
        "rotary scaling 'yarn'": llama | {"rope_scaling": {"type": "yarn"}},
        "partial_rotary_factor 0.5": llama | {"partial_rotary_factor": 0.5},
        "one object for all layers": llama | {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
        "layer_types must be a list": llama | {"layer_types": 5},
        "layers of \\['full_attention']": llama | {"layer_types": [["full_attention"]]},
        "rotates 5 of 20 channels": neox | {"hidden_size": 60},
    }
    for words, config in odd.items():
        with pytest.raises(UserError, match=words):
            read_architecture(config, "config")
    half = GPTConfig(**LLAMA.shared, activation="swiglu", rope_share=0.5)
    assert not is_of("llama", half)  # transformers' would turn all channels


def test_a_sliding_window_bounds_the_context():
    assert read_architecture(CASES["mistral"].to_dict() | {"use_sliding_window": False}, "config")[1].block_size == 40
    assert read_architecture(CASES["mistral"].to_dict(), "config")[1].block_size == 40
    qwen = CASES["qwen2"].to_dict() | {"sliding_window": 16, "use_sliding_window": True}
    assert read_architecture(qwen, "config")[1].block_size == 16
    assert read_architecture(qwen | {"use_sliding_window": False}, "config")[1].block_size == 64
    some = {"use_sliding_window": False, "layer_types": ["full_attention", "sliding_attention"]}
    assert read_architecture(qwen | some, "config")[1].block_size == 16
    with pytest.raises(UserError, match="layers of linear_attention are not supported"):
        read_architecture(qwen | {"layer_types": ["linear_attention"]}, "config")
    assert read_architecture(qwen | {"quantization_config": None}, "config")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    random_twin(CASES["llama, grouped"]).save_pretrained(folder)
    return folder


def test_shards_bfloat16_and_a_padded_vocabulary(tmp_path, llama):
    whole = load_file(llama / "model.safetensors")
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: whole[name].bfloat16() for name in some}, tmp_path / "model" / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    sharded, plain = load_pretrained(tmp_path / "model", CPU), load_pretrained(llama, CPU)
    for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, q.bfloat16().float())
    half = load_pretrained(llama, CPU, torch.bfloat16)
    tokens = ids(1, 20)
    with torch.no_grad():
        logps = [m.logits(m(tokens)).float().log_softmax(-1) for m in (half, plain)]
    assert half.wte.weight.dtype == torch.bfloat16 and 0 < (logps[0] - logps[1]).abs().mean() < 0.05


@pytest.mark.skipif(not has_fast_bf16(CPU), reason="no fast bfloat16 here")
def test_an_untied_head_is_packed_too(llama):
    half, tokens = load_pretrained(llama, CPU, torch.bfloat16), ids(1, 20)
    fast = packed(half)
    assert isinstance(fast.lm_head, PackedLinear) and fast.packed_head is None and not half.config.tied
    with torch.inference_mode():
        assert torch.allclose(fast.logits(fast(tokens)), half.logits(half(tokens)), atol=0.05, rtol=0.02)


def test_a_bare_model_has_the_same_names_without_their_beginning(tmp_path):
    theirs = random_twin(CASES["gpt2"])
    theirs.transformer.save_pretrained(tmp_path / "bare")
    ours = load_pretrained(tmp_path / "bare", CPU)
    with torch.no_grad():
        assert (ours.logits(ours(ids(1, 9))) - theirs(ids(1, 9)).logits).abs().max() < 1e-4


def test_our_own_default_is_of_no_family_and_gpt2_is(tmp_path):
    with pytest.raises(UserError, match="of no family"):
        export(GPT(GPTConfig(vocab_size=23, n_embd=16, n_layer=1)), tmp_path / "out")
    assert not list(tmp_path.iterdir()) and not is_pretrained(tmp_path)
    assert set(FAMILIES) == {"gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox"}


def broken(folder, what: str):
    """A copy of a good folder with one thing wrong."""
    config, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    weights = load_file(file)
    first = "model.layers.0.mlp.up_proj.weight"
    match what:
        case "scaling":
            config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
        case "activation" | "model_type" | "attention_bias":
            config[{"activation": "hidden_act"}.get(what, what)] = True if what == "attention_bias" else "odd"
        case "code":
            config["auto_map"] = {"AutoModel": "modeling.Odd"}
        case "quantized":
            config["quantization_config"] = {"bits": 4}
        case "heads":
            config["num_key_value_heads"] = 4
        case "size":
            config["num_hidden_layers"] = "2"
        case "lacks":
            del config["hidden_size"]
        case "shape":
            weights[first] = weights[first][:-1].contiguous()
        case "nan":
            weights[first][0, 0] = torch.nan
        case "float8" | "int8":
            weights[first] = weights[first].to(torch.float8_e4m3fn if what == "float8" else torch.int8)
        case "missing":
            del weights[first]
        case "extra":
            weights["model.layers.0.odd"] = torch.ones(1)
        case "layers":
            config["num_hidden_layers"] = 3
    (folder / "config.json").write_text("[1" if what == "json" else json.dumps(config))
    save_file(weights, file)
    if what in ("shard", "outside"):
        file.unlink()
        name = "gone.safetensors" if what == "shard" else "../gone.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {first: name}}))
    if what in ("pickle", "nothing"):
        file.unlink()
        torch.save(weights, folder / "pytorch_model.bin") if what == "pickle" else None
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "what, words",
    {
        "scaling": "rotary scaling 'yarn' is not supported",
        "activation": "the activation 'odd' is not supported",
        "model_type": "model_type 'odd' is not supported; it may be gpt2",
        "attention_bias": "attention_bias True is not supported",
        "code": "code of its own .auto_map., which is never run",
        "quantized": "quantized weights are not supported",
        "heads": "n_head .6. must be a multiple of n_kv_head .4.",
        "size": "n_layer must be a whole number",
        "lacks": "lacks hidden_size",
        "shape": r"up_proj.weight is .79, 48., but config.json asks for .80, 48.",
        "nan": "up_proj.weight holds numbers that are not finite",
        "float8": "up_proj.weight is of torch.float8_e4m3fn: want plain",
        "int8": "up_proj.weight is of torch.int8: want plain",
        "missing": "the weights lack .*up_proj.weight",
        "extra": "1 tensors have no place in this architecture: model.layers.0.odd",
        "layers": "the weights lack model.layers.2",
        "shard": "lacks gone.safetensors, which its model.safetensors.index.json names",
        "outside": "a file lies outside of the folder",
        "pickle": "pickled weights, which can run code; transformers converts them",
        "nothing": "holds no model.safetensors",
        "cut": "cannot read .*model.safetensors",
        "json": "not JSON",
    }.items(),
)
def test_what_does_not_fit_is_one_line(tmp_path, llama, what, words):
    shutil.copytree(llama, tmp_path / "model")
    broken(tmp_path / "model", what)
    with pytest.raises(UserError, match=words) as error:
        load_pretrained(tmp_path / "model", CPU)
    assert "\n" not in str(error.value)


def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path):
    random_twin(CASES["llama, tied"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    equal = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(equal, tmp_path / "model.safetensors")
    assert load_pretrained(tmp_path, CPU).lm_head is None
    save_file(equal | {"lm_head.weight": equal["lm_head.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lm_head is tied, but is not the embedding"):
        load_pretrained(tmp_path, CPU)
