"""A run folder is whole or not there; what does not fit is named."""

import json

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file

from minqstar.checkpoint import RunWriter, load_run
from minqstar.cli import UserError

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, tokenizer):
    """A finished SFT run and its model."""
    model = random_model(vocab_size=tokenizer.n_vocab)
    write(tmp_path / "sft", model, tokenizer)
    return tmp_path / "sft", model


def write(path, model, tokenizer, overwrite=False, stage="sft", reference=None):
    with RunWriter(path, overwrite) as writer:
        writer.log({"step": 0, "loss": 1.0})
        writer.save_model(model)
        if reference:
            writer.keep_reference(load_run(reference, CPU))
        tokenizer.save(writer.folder / "vocab.tiktoken")
        writer.write_json("config.json", {"stage": stage, "model": vars(model.config)})


def test_what_is_saved_is_loaded(run, tokenizer):
    path, model = run
    loaded = load_run(path, CPU)
    assert loaded.reference is None and not loaded.model.training
    assert all(torch.equal(a, loaded.model.state_dict()[name]) for name, a in model.state_dict().items())
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert json.loads((path / "metrics.jsonl").read_text()) == {"step": 0, "loss": 1.0}


def test_a_dpo_run_holds_its_reference(run, tmp_path, tokenizer):
    path, reference = run
    policy = random_model(5, vocab_size=tokenizer.n_vocab)
    write(tmp_path / "dpo", policy, tokenizer, stage="dpo", reference=path)
    write(path, random_model(6, vocab_size=tokenizer.n_vocab), tokenizer, overwrite=True)  # the SFT run changes
    loaded = load_run(tmp_path / "dpo", CPU)
    assert torch.equal(loaded.reference.wte.weight, reference.wte.weight)
    assert torch.equal(loaded.model.wte.weight, policy.wte.weight)


def test_a_failed_run_leaves_nothing_and_an_old_one_stays(run, tokenizer):
    path, _ = run
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(UserError, match="exists"):
        RunWriter(path, overwrite=False)
    with pytest.raises(RuntimeError), RunWriter(path, overwrite=True) as writer:
        writer.log({"step": 0})
        raise RuntimeError
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in path.parent.iterdir()] == ["sft"]


def test_overwriting_replaces_the_whole_folder(run, tokenizer):
    path, _ = run
    (path / "stray").write_text("x")
    write(path, random_model(8, vocab_size=tokenizer.n_vocab), tokenizer, overwrite=True)
    assert not (path / "stray").exists() and [p.name for p in path.parent.iterdir()] == ["sft"]


def damage_weights(path):
    weights = load_file(path / "model.safetensors")
    weights["wte.weight"] = weights["wte.weight"][:-1].clone()
    save_file(weights, path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "holds no run"),
        (lambda p: (p / "config.json").write_text("{"), "damaged"),
        (lambda p: (p / "config.json").write_text("{}"), "describes no model"),
        (lambda p: (p / "model.safetensors").unlink(), "cannot load .*model.safetensors"),
        (
            lambda p: (p / "model.safetensors").write_bytes(b"\x80\x04nothing"),
            "cannot load .*model.safetensors",
        ),
        (lambda p: (p / "vocab.tiktoken").unlink(), "cannot read the vocabulary"),
        (damage_weights, "does not fit its config.json: .*wte"),
    ],
)
def test_a_damaged_run_is_named(run, damage, message):
    path, _ = run
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        load_run(path, CPU)
    assert "\n" not in str(error.value)


def test_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="not a run folder; train one"):
        load_run(tmp_path / "nowhere", CPU)
