"""LoRA: without its adapter a model is the reference, bit for bit; with it, the model of weights W + scale B A."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import random_model
from test_trainer import EOS, PAD, pairs
from torch import nn

from minqstar.errors import UserError
from minqstar.lm.lora import LAYERS, LoRAConfig, adapter_tensors, add_lora, base_model, load_adapter, merged
from minqstar.lm.model import GPT, GPT2
from minqstar.training.data import Group, PackedData
from minqstar.training.scoring import ReferenceCache, autocast, token_logps, weights_hash
from minqstar.training.trainer import DPO, DPOConfig, Trainer

LLAMA = {"norm": "gain", "qk_norm": False, "activation": "swiglu", "n_kv_head": 1, "n_inner": 24, "smear": False}
NEOX = {"norm": "layer", "qk_norm": False, "activation": "gelu_exact", "bias": True, "parallel": True, "smear": False}
FAMILIES = {
    "default": {},
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen3": LLAMA | {"qk_norm": True, "head_size": 12},
    "neox": NEOX | {"rope_share": 0.25, "tied": False},
}
CPU = torch.device("cpu")


def long_rows() -> PackedData:
    """Rows that bfloat16 attends to span by span."""
    rng = np.random.default_rng(0)
    draw = lambda longest: rng.integers(0, 21, rng.integers(longest // 2, longest)).tolist()  # noqa: E731
    return PackedData([Group(draw(90), ([*draw(40), EOS], [*draw(40), EOS])) for _ in range(8)], PAD, 333)


def adapted(family: str = "default", trained: bool = True, seed: int = 1, config: LoRAConfig | None = None) -> GPT:
    """A model with an adapter; a trained one is of random numbers, large enough to matter."""
    model = random_model(seed, block_size=160, **FAMILIES[family])
    add_lora(model, config or LoRAConfig(rank=4), seed)
    if trained:
        generator = torch.Generator().manual_seed(seed + 1)
        for tensor in adapter_tensors(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_block_can_have_an_adapter(family):
    block = random_model(**FAMILIES[family]).blocks[0]
    assert {name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)} == set(LAYERS)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_adapter_the_model_is_the_reference_bit_for_bit(family, dtype, recorded):
    """So is a model with an untrained adapter; a trained one is another model."""
    reference = random_model(1, block_size=160, **FAMILIES[family])
    trained, untrained = adapted(family), adapted(family, trained=False)
    if dtype == torch.float64:
        reference, trained, untrained = (model.double() for model in (reference, trained, untrained))
    with torch.set_grad_enabled(recorded):
        for data in (pairs(0, 12), long_rows()):
            batch = data.batch(np.arange(len(data)))
            with autocast(CPU, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32):
                expected, off, zero, on = (
                    token_logps(model, batch) for model in (reference, base_model(trained), untrained, trained)
                )
            assert torch.equal(off, expected) and torch.equal(zero, expected)
            assert (on - expected).abs().max() > 0.1 and zero.requires_grad == on.requires_grad == recorded


def test_the_base_model_is_a_plain_gpt_that_takes_no_memory():
    reference, model = random_model(1, block_size=160), adapted()
    base = base_model(model)
    assert weights_hash(base) == weights_hash(reference)
    held = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in held and not p.requires_grad for p in base.parameters())
    assert len(adapter_tensors(model)) == 16 and not adapter_tensors(base)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("on", [LAYERS, ("attn.c_attn", "mlp.c_proj")])
def test_an_adapted_model_is_the_model_of_w_plus_scale_b_a(family, dtype, tolerance, on):
    """Both a model whose weights are set by hand, and the merged one, which is a plain GPT that trains."""
    model = adapted(family, config=LoRAConfig(rank=3, alpha=7.5, on=on)).to(dtype)
    by_hand = random_model(1, block_size=160, **FAMILIES[family]).to(dtype)
    tensors = adapter_tensors(model)
    assert len(tensors) == 2 * 2 * len(on)
    with torch.no_grad():
        for name, weight in by_hand.named_parameters():
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_a" in tensors:
                weight += 7.5 / 3 * torch.einsum("or,ri->oi", tensors[f"{layer}.lora_b"], tensors[f"{layer}.lora_a"])
    plain = merged(model)
    assert plain.state_dict().keys() == by_hand.state_dict().keys() and all(p.requires_grad for p in plain.parameters())
    batch = pairs(0, 12).batch(np.array([0, 1]))
    expected = token_logps(model, batch)
    for other in (by_hand, plain):
        assert (token_logps(other, batch) - expected).abs().max() < tolerance
    assert weights_hash(base_model(model)) == weights_hash(
        random_model(1, block_size=160, **FAMILIES[family]).to(dtype)
    )


def test_an_adapter_is_drawn_from_its_own_seed():
    """A is uniform within 1 / sqrt(in), as in a fresh linear layer."""
    one, same, other = (adapted(trained=False, config=LoRAConfig(rank=16), seed=seed) for seed in (1, 1, 2))
    one, same, other = (adapter_tensors(model) for model in (one, same, other))
    assert all(torch.equal(one[name], same[name]) for name in one)
    a = [name for name in one if name.endswith("a")]
    assert not any(torch.equal(one[name], other[name]) for name in a)
    assert len({one[name][0, 0].item() for name in a}) == len(a)
    scaled = torch.cat([(one[name] * one[name].shape[1] ** 0.5).flatten() for name in a])
    assert 0.99 < scaled.abs().max() <= 1 and abs(scaled.std() - 3**-0.5) < 0.02 and abs(scaled.mean()) < 0.05


def test_no_global_random_number_is_drawn():
    model, state = random_model(), torch.get_rng_state()
    add_lora(model, LoRAConfig(rank=2), 5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_dpo_starts_at_ln_2_trains_the_adapter_and_leaves_the_reference(dtype, recompute):
    data, model = pairs(0, 8), adapted(trained=False)
    model.recompute = recompute
    config = DPOConfig(epochs=30, min_steps=0, batch_tokens=160, matrices="adamw", lr=0.02)
    trainer = Trainer(model, data, config, None, dtype, 0)
    trainer.objective = DPO(ReferenceCache(base_model(model), data, dtype, trainer.passes), config.beta)
    log = list(trainer.run())
    assert log[0]["margin"] == log[0]["chosen_reward"] == log[0]["rejected_reward"] == 0.0
    assert abs(log[0]["loss"] - math.log(2)) < 1e-7 and log[-1]["loss"] < 0.2
    assert weights_hash(base_model(model)) == weights_hash(random_model(1, block_size=160))
    trained = {name for name in trainer.state_dict()[0] if name.startswith("model/")}
    assert trained == {f"model/{name}" for name in adapter_tensors(model)}


def test_a_saved_adapter_comes_back():
    model, fresh = adapted(), adapted(trained=False)
    load_adapter(fresh, {name: tensor.clone() for name, tensor in adapter_tensors(model).items()})
    batch = pairs(0, 12).batch(np.array([0]))
    assert torch.equal(token_logps(model, batch), token_logps(fresh, batch))


B = "blocks.0.mlp.c_fc.lora_b"
MISFITS = {
    "another rank": lambda t: adapter_tensors(adapted(config=LoRAConfig(rank=2))),
    "other layers": lambda t: adapter_tensors(adapted(config=LoRAConfig(rank=4, on=("mlp.c_fc",)))),
    "another model": lambda t: adapter_tensors(adapted("llama")),
    "nothing": lambda t: {},
    "a tensor too many": lambda t: t | {"more": torch.zeros(1)},
    "another type": lambda t: t | {B: t[B].double()},
    "not finite": lambda t: t | {B: t[B] * math.nan},
}


@pytest.mark.parametrize("how", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_whole(how):
    model = adapted()
    tensors = MISFITS[how]({name: tensor + 1 for name, tensor in adapter_tensors(model).items()})
    before = weights_hash(model)
    with pytest.raises(UserError, match=r"^the adapter does not fit this model: .+$"):
        load_adapter(model, tensors)
    assert weights_hash(model) == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"on": ("attn.q_proj",)},
            "LoRA on attn.q_proj: there is no such layer; there are attn.c_attn, attn.c_proj, m",
        ),
        ({"on": ()}, "LoRA must be on one of attn.c_attn"),
        ({"rank": -1}, "rank must be a whole number between 0 and 65,536, got -1"),
        ({"rank": 2.0}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0"),
        ({"alpha": math.nan}, "alpha must be"),
    ],
)
def test_a_bad_configuration_is_one_clear_line(bad, message):
    with pytest.raises(UserError, match=message):
        LoRAConfig(**bad)


def test_an_adapter_of_rank_0_and_a_second_one_are_refused():
    with pytest.raises(UserError, match="rank above 0"):
        add_lora(random_model(), LoRAConfig(), 0)
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="has an adapter already"):
        add_lora(model, LoRAConfig(rank=1), 0)
    assert before.keys() == model.state_dict().keys()
