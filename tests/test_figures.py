"""The figures: what their command keeps and refuses, the whole set on models of random weights, and how they look."""

import json
import warnings

import pytest
import torch
from conftest import ROOT, random_model, write_run

from minqstar.errors import UserError, needs
from minqstar.lab import credit, figures
from minqstar.lab.figures import FINDINGS, rounded
from minqstar.lab.findings.drawing import save
from minqstar.lab.findings.lab import Scale
from minqstar.training.checkpoint import load_run
from minqstar.world.tldr import DataConfig, draw_rows


def test_numbers_are_rounded():
    assert rounded({"a": [1.23456789, float("nan")], "b": "x", "c": (3,)}) == {"a": [1.2346, None], "b": "x", "c": [3]}


def test_what_needs_an_extra_says_which():
    needs("torch", "figures", "a picture")
    with pytest.raises(UserError, match=r"a picture needs no_such, .* pip install 'minqstar\[figures\]'"):
        needs("no_such", "figures", "a picture")


SMALL = Scale(
    pairs=(16, 32), study_pairs=32, betas=(0.5, 1.0), biased_betas=(0.5,), posts=4, marks=(0.5, 1.0), draws=16,
    steps=2, larger=(1, 1, 16), widths=(1, 3),
)  # fmt: skip


def test_the_credit_of_a_run(main_run, world, capsys):
    credit.main(credit.Options(run=main_run / "dpo"))
    said = capsys.readouterr().out
    assert "exact A*" in said and "held-out summaries edited" in said and "log pi_ref alone" in said
    run_ = load_run(main_run / "dpo", torch.device("cpu"))
    figures_ = credit.figures_of(run_, credit.held_out(run_))
    assert figures_["auroc_exact"] == 1.0 and figures_["later_change_exact"] < 1e-9 < figures_["later_change"]
    assert figures_["first_change_exact"] < -1 and figures_["second_change_exact"] < -1

    rows = list(draw_rows(world, DataConfig(held_out=8), "test"))
    write_run(main_run, "dpo", random_model(0, world.tokenizer.n_vocab, 256, smear=True), world, rows)
    credit.main(credit.Options(run=main_run / "dpo"))
    assert "correlation to A* none" in capsys.readouterr().out  # the reference itself: all rewards are 0
    write_run(main_run, "dpo", random_model(1, world.tokenizer.n_vocab, 64, smear=True), world, rows)
    with pytest.raises(UserError, match="cannot be used"):
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
    results.write_text(json.dumps(kept))
    write_run(main_run, "sft", random_model(2, world.tokenizer.n_vocab, 256, smear=True), world)
    with pytest.raises(UserError, match="is not the reference of"):
        figures.main(options)


def test_diffusion_needs_no_run_and_leaves_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "Lab", None)  # which would train one
    options = figures.Options(only="diffusion", runs=tmp_path / "runs", out=tmp_path / "results")
    options.out.mkdir()
    results = options.out / "results.json"
    results.write_text(json.dumps({"of": "another", "beams": {"old": 1}}))
    figures.main(options)
    found = json.loads(results.read_text())
    assert (
        found["of"] == "another"
        and found["beams"] == {"old": 1}
        and list(found["diffusion"]) == ["schedules", "closed_form"]
    )
    assert (options.out / "diffusion.png").exists() and not options.runs.exists()


@pytest.mark.slow
def test_the_whole_set_without_a_warning_and_again_without_training(main_run, monkeypatch):
    monkeypatch.setattr(figures, "FULL", SMALL)
    options = figures.Options(runs=main_run, out=main_run / "results")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.main(options)
    results = (options.out / "results.json").read_bytes()
    found = json.loads(results)
    names = [name for name in FINDINGS if name != "real"]
    assert list(found) == ["of", *names]
    for name in names:
        assert (options.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert found["likelihoods"]["largest_difference_in_standard_errors"] < 4
    assert found["equivalence"]["identical_trees"]["identical"] == found["equivalence"]["identical_trees"]["trees"]

    for name in ("dpo", "sft", "Trainer"):
        monkeypatch.setattr(f"minqstar.lab.findings.lab.{name}", None)  # whatever trains would fail
    figures.main(options)
    assert (options.out / "results.json").read_bytes() == results


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "data" / "results" / "results.json").read_text())


def readable(figure):
    """Titles, labels, legends and notes lie inside of a figure that was drawn, and apart."""
    texts = list(figure.texts) + ([figure._suptitle] if figure._suptitle not in figure.texts else [])
    for axis in figure.axes:
        texts += [axis._left_title, *axis.texts]
        texts += [axis.xaxis.label, axis.yaxis.label] if axis.axison else []
    for legend in [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]:
        texts += legend.get_texts()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]
    width, height = figure.bbox.size
    for text, box in boxes:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, text
    for i, (text, box) in enumerate(boxes):
        for other, of in boxes[:i]:
            apart = min(box.x1, of.x1) - max(box.x0, of.x0) < 1.5 or min(box.y1, of.y1) - max(box.y0, of.y0) < 1.5
            assert apart, f"{text!r} covers {other!r}"


@pytest.mark.parametrize("name", FINDINGS)
def test_no_text_of_a_figure_is_cut_or_covered(results, name):
    """Of the committed numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = FINDINGS[name].draw(results[name])
        figure.draw_without_rendering()
    readable(figure)


def test_a_figure_is_the_same_file_each_time_and_not_large(results, tmp_path):
    for name in ("a.png", "b.png"):
        save(FINDINGS["proxy"].draw(results["proxy"]), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    for name in FINDINGS:
        assert (ROOT / "data" / "results" / f"{name}.png").stat().st_size < 200_000
