"""What the figures measure, against closed forms; and the whole set, on models of random weights."""

import json
import random
import warnings

import numpy as np
import pytest
import torch
from conftest import random_model

from minqstar.bellman import plain_logits
from minqstar.checkpoint import RunWriter, load_run
from minqstar.cli import UserError, needs
from minqstar.lab import figures
from minqstar.lab.figures import rounded
from minqstar.lab.findings import FINDINGS, interval, smooth
from minqstar.lab.studies import Scale, log_policies
from minqstar.tldr import DataConfig, draw_rows


def test_log_policies_are_those_of_one_response_alone(monkeypatch):
    monkeypatch.setattr("minqstar.lab.studies.ROWS", 2)
    model, rng = random_model(), random.Random(0)
    draw = lambda: [rng.randrange(23) for _ in range(rng.randint(1, 9))]  # noqa: E731
    pairs = [(draw(), draw()) for _ in range(5)]
    expected = torch.cat([plain_logits(model, *pair).log_softmax(-1) for pair in pairs])
    found = log_policies(model, *map(list, zip(*pairs, strict=True)))
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_intervals_and_means():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * 0.1, rel=0.2)
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [[1.5, 2.0], [3.5, 6.0]] and len(smooth([0.0] * 3)) == 3
    assert rounded({"a": [1.23456789, float("nan")], "b": "x", "c": (3,)}) == {"a": [1.2346, None], "b": "x", "c": [3]}


def test_what_needs_an_extra_says_which():
    needs("torch", "figures", "a picture")
    with pytest.raises(UserError, match=r"a picture needs no_such, .* pip install 'minqstar\[figures\]'"):
        needs("no_such", "figures", "a picture")


@pytest.fixture
def main_run(tmp_path, world):
    """A DPO run of the TL;DR world, of random weights."""
    for stage, seed in (("sft", 0), ("dpo", 1)):
        model = random_model(seed, world.tokenizer.n_vocab, 256, smear=True)
        config = {"stage": stage, "model": vars(model.config), "dpo": {"beta": 0.5}}
        with RunWriter(tmp_path / stage, config) as writer:
            writer.save_model(model)
            world.tokenizer.save(writer.folder / "vocab.tiktoken")
            if stage == "dpo":
                writer.keep_reference(load_run(tmp_path / "sft", torch.device("cpu")))
                rows = draw_rows(world, DataConfig(held_out=8), "test")
                (writer.folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.slow
def test_the_whole_set_without_a_warning_and_again_without_training(main_run, monkeypatch):
    scale = Scale(
        pairs=(16, 32), study_pairs=32, betas=(0.5, 1.0), biased_betas=(0.5,), posts=4, marks=(0.5, 1.0), draws=16,
        steps=2, larger=(1, 1, 16),
    )  # fmt: skip
    monkeypatch.setattr(figures, "FULL", scale)
    options = figures.Options(runs=main_run, out=main_run / "results")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.main(options)
    results = (options.out / "results.json").read_bytes()
    found = json.loads(results)
    assert list(found) == list(FINDINGS)
    for name in FINDINGS:
        assert (options.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert found["likelihoods"]["largest_difference_in_standard_errors"] < 4
    assert found["equivalence"]["identical_trees"]["identical"] == found["equivalence"]["identical_trees"]["trees"]
    assert found["credit"]["auroc_exact"] == 1.0

    for name in ("dpo", "sft", "Trainer"):
        monkeypatch.setattr(f"minqstar.lab.studies.{name}", None)  # whatever trains would fail
    figures.main(options)
    assert (options.out / "results.json").read_bytes() == results
