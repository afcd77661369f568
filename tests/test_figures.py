"""What the figures measure, against closed forms; and the whole set, on models of random weights."""

import json
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model

from minqstar.errors import UserError, needs
from minqstar.lab import credit, figures
from minqstar.lab.courses import log_policies
from minqstar.lab.figures import rounded
from minqstar.lab.findings import FINDINGS, interval, smooth
from minqstar.lab.studies import Lab, Scale
from minqstar.runchecks import plain_logits
from minqstar.theory.mdp import implicit_rewards, solve
from minqstar.training.checkpoint import RunWriter, load_run
from minqstar.world.tldr import DataConfig, draw_rows


def test_log_policies_are_those_of_one_response_alone(monkeypatch):
    monkeypatch.setattr("minqstar.lab.courses.ROWS", 2)
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
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [[0.5, 2.0], [2.5, 6.0]] and len(smooth([0.0] * 3)) == 3
    assert rounded({"a": [1.23456789, float("nan")], "b": "x", "c": (3,)}) == {"a": [1.2346, None], "b": "x", "c": [3]}


def test_what_needs_an_extra_says_which():
    needs("torch", "figures", "a picture")
    with pytest.raises(UserError, match=r"a picture needs no_such, .* pip install 'minqstar\[figures\]'"):
        needs("no_such", "figures", "a picture")


def write_run(runs, stage, model, world, rows=()):
    config = {"stage": stage, "model": vars(model.config), "dpo": {"beta": 0.5}}
    with RunWriter(runs / stage, config, overwrite=True) as writer:
        writer.save_model(model)
        world.tokenizer.save(writer.folder / "vocab.tiktoken")
        if stage == "dpo":
            writer.keep_reference(load_run(runs / "sft", torch.device("cpu")))
            (writer.folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def main_run(tmp_path, world):
    """A DPO run of the TL;DR world, of random weights."""
    rows = list(draw_rows(world, DataConfig(held_out=8), "test"))
    for stage, seed in (("sft", 0), ("dpo", 1)):
        write_run(tmp_path, stage, random_model(seed, world.tokenizer.n_vocab, 256, smear=True), world, rows)
    return tmp_path


SMALL = Scale(
    pairs=(16, 32), study_pairs=32, betas=(0.5, 1.0), biased_betas=(0.5,), posts=4, marks=(0.5, 1.0), draws=16,
    steps=2, larger=(1, 1, 16), widths=(1, 3),
)  # fmt: skip


def test_learned_returns_are_true_ones_in_the_gauge_of_the_exact_value(main_run, world):
    """sum A* + V*(s_0) = sum r, for the labeller's reward, a bias for each token, too."""
    lab = Lab(main_run, main_run / "work", SMALL)
    for beta, bias in ((0.5, 0.0), (1.0, 0.3)):
        values = lab.values(beta, bias)
        for automaton, places, mdp in world.tables(lab.posts):
            biased = replace(mdp, reward=torch.where(mdp.token >= 0, mdp.reward + bias, 0.0))
            A_star = implicit_rewards(biased, solve(biased, beta), beta)
            for row, i in enumerate(places):
                response = lab.groups[i].responses[0]
                learned = A_star[row][automaton.walk(response)].sum().item() + values[i]
                true = world.judge(lab.posts[i], world.tokenizer.decode(response)).total
                assert learned == pytest.approx(true + bias * len(response))


def test_the_credit_of_a_run(main_run, world, capsys):
    credit.main(credit.Options(run=main_run / "dpo"))
    said = capsys.readouterr().out
    assert "exact A*" in said and "held-out summaries edited" in said and "log pi_ref alone" in said
    figures_ = credit.of_the_run(load_run(main_run / "dpo", torch.device("cpu")))[2]
    assert figures_["auroc_exact"] == 1.0 and figures_["later_change_exact"] < 1e-9 < figures_["later_change"]
    assert figures_["first_change_exact"] < -1 and figures_["second_change_exact"] < -1

    rows = list(draw_rows(world, DataConfig(held_out=8), "test"))
    write_run(main_run, "dpo", random_model(0, world.tokenizer.n_vocab, 256, smear=True), world, rows)
    credit.main(credit.Options(run=main_run / "dpo"))
    assert "correlation to A* none" in capsys.readouterr().out  # the reference itself: all rewards are 0
    write_run(main_run, "dpo", random_model(1, world.tokenizer.n_vocab, 64, smear=True), world, rows)
    with pytest.raises(UserError, match="do not fit the run"):
        credit.main(credit.Options(run=main_run / "dpo"))


def test_what_does_not_belong_together_is_refused(main_run, world):
    options = figures.Options(only="credit", runs=main_run, out=main_run / "results")
    figures.main(options)
    results = options.out / "results.json"
    kept = json.loads(results.read_text())
    results.write_text(json.dumps(kept | {"beams": {"old": 1}}))
    figures.main(options)
    assert json.loads(results.read_text())["beams"] == {"old": 1}
    results.write_text(json.dumps(kept | {"beams": {"old": 1}, "of": "another"}))
    with pytest.raises(UserError, match="is of another main run or scale"):
        figures.main(options)
    results.write_text("{")
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        figures.main(options)
    write_run(main_run, "sft", random_model(2, world.tokenizer.n_vocab, 256, smear=True), world)
    with pytest.raises(UserError, match="is not the reference of"):
        figures.main(options)


@pytest.mark.slow
def test_the_whole_set_without_a_warning_and_again_without_training(main_run, monkeypatch):
    monkeypatch.setattr(figures, "FULL", SMALL)
    options = figures.Options(runs=main_run, out=main_run / "results")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.main(options)
    results = (options.out / "results.json").read_bytes()
    found = json.loads(results)
    assert list(found) == ["of", *FINDINGS]
    for name in FINDINGS:
        assert (options.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert found["likelihoods"]["largest_difference_in_standard_errors"] < 4
    assert found["equivalence"]["identical_trees"]["identical"] == found["equivalence"]["identical_trees"]["trees"]

    for name in ("studies.dpo", "studies.sft", "studies.Trainer", "courses.Trainer"):
        monkeypatch.setattr(f"minqstar.lab.{name}", None)  # whatever trains would fail
    figures.main(options)
    assert (options.out / "results.json").read_bytes() == results
