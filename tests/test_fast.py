"""Whatever is faster says the same: packed weights, compiled graphs, matrices orthogonalised together."""

import itertools
import math

import pytest
import torch
from conftest import random_model
from test_trainer import pairs

from minqstar.lm.fast import can_compile, compiled, has_fast_bf16, packed, twin
from minqstar.lm.model import GPT2
from minqstar.search.beam import BeamConfig, beam_search
from minqstar.search.decode import decode, greedy
from minqstar.search.evaluator import Network
from minqstar.training.optim import Muon
from minqstar.training.scoring import ReferenceCache, token_logps
from minqstar.training.trainer import DPO, DPOConfig, Trainer

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
ENDS = {"ends": (21,), "max_new_tokens": 12}


@pytest.fixture(scope="module")
def compiler():
    if not can_compile(CPU):
        pytest.skip("no C++ compiler")


def test_a_twin_has_the_very_weights():
    model = random_model(0)
    other = twin(model)
    assert [*map(id, model.parameters())] == [*map(id, other.parameters())]
    assert all(a is not b for a, b in zip(model.modules(), other.modules(), strict=True))


@pytest.mark.skipif(not has_fast_bf16(CPU), reason="no bfloat16 instructions")
@pytest.mark.parametrize("config", [{}, GPT2], ids=["default", "gpt2"])
def test_packed_weights_err_no_more_than_bfloat16_does(config):
    """Against float32, in full forwards and in steps; the model itself stays as it was."""
    model = random_model(3, n_embd=64, **config)
    rounded = random_model(3, n_embd=64, **config).bfloat16()
    fast = packed(rounded)
    assert fast is not rounded and rounded.packed_head is None and packed(model) is model
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    with torch.no_grad():
        exact, plain, quick = (m.logits(m(tokens)).float() for m in (model, rounded, fast))
    error = (plain - exact).square().mean().sqrt()
    assert 0 < (quick - exact).square().mean().sqrt() < 1.3 * error
    steps = Network(rounded)
    logps = steps.start([[1, 2, 3]], nodes=4, depth=4).logps
    for i, token in enumerate((4, 5, 6, 7)):
        logps = steps.extend(torch.tensor([[i]]), torch.tensor([[token]])).logps
    assert torch.allclose(logps[0, 0], quick[0, -1].log_softmax(-1), atol=8 * error.item())


def test_compiled_searches_find_what_eager_ones_find(compiler):
    """Greedy and beams, for two batches that share their graphs."""
    model = random_model(5)
    eager, quick = Network(model), Network(model, compiled=True)
    assert quick.compiled
    for prompts in (PROMPTS, PROMPTS[::-1]):
        for search in (
            lambda network, prompts: decode(network, prompts, **ENDS, choose=greedy),
            lambda network, prompts: beam_search(network, prompts, **ENDS, config=BeamConfig(3, n=3)),
        ):
            found, wanted = search(quick, prompts), search(eager, prompts)
            for a, b in zip(itertools.chain(*found), itertools.chain(*wanted), strict=True):
                assert a.tokens == b.tokens and a.logps == pytest.approx(b.logps, abs=1e-5)


def test_compiled_training_begins_at_ln_2_exactly_and_follows_eager_training(compiler):
    """Token rewards of an unchanged policy are exactly 0; the losses of 5 steps are those of eager steps."""
    data = pairs(0, 40)
    losses = []
    for fast in (lambda model: model, compiled):
        model, reference = random_model(9), random_model(9)
        config = DPOConfig(min_steps=5, epochs=0.01, batch_tokens=160, row_length=40)
        trainer = Trainer(fast(model), data, config, None, torch.float32, 0)
        trainer.objective = DPO(ReferenceCache(fast(reference), data, torch.float32, trainer.passes), 0.5)
        rows = trainer.passes[0]
        logps = token_logps(trainer.model, data.batch(rows))
        assert torch.equal(logps.detach(), trainer.objective.cache[rows])
        losses.append([metrics["loss"] for metrics in trainer.run()])
        assert losses[-1][0] == pytest.approx(math.log(2), abs=1e-7)
        assert not torch.equal(model.wte.weight, reference.wte.weight)  # the weights are shared with the twin
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[1][4] < losses[1][0]


def test_without_a_compiler_there_is_one_warning_and_the_same_result(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    can_compile.cache_clear()
    model = random_model(5)
    with pytest.warns(UserWarning, match=r"^torch.compile does not work here \(no C\+\+ compiler\); going on") as said:
        network = Network(model, compiled=True)
        assert compiled(model) is model
    assert len(said) == 1
    can_compile.cache_clear()
    assert decode(network, PROMPTS, **ENDS, choose=greedy) == decode(Network(model), PROMPTS, **ENDS, choose=greedy)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_torchs(decay):
    """Steps on matrices of several shapes, wide, tall and square, some of one shape."""
    shapes = [(6, 4), (4, 6), (4, 4), (6, 4), (4, 4), (3, 8)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([p.clone() for p in start] for _ in range(2))
    sides = ((ours, Muon), (theirs, torch.optim.Muon))
    optimizers = [kind(params, lr=0.1, weight_decay=decay) for params, kind in sides]
    for _ in range(4):
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        for optimizer, (params, _) in zip(optimizers, sides, strict=True):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
    for a, b, first in zip(ours, theirs, start, strict=True):
        assert (a - first).norm() > 0.1
        assert (a - b).norm() < 0.02 * (a - first).norm()  # products in bfloat16
