"""Where a stage starts, what it is held to, and going on with a finished run."""

import json
import shutil

import pytest
import torch
from conftest import command

from minqstar.training.checkpoint import load_run
from minqstar.training.formats import Rows
from minqstar.training.scoring import weights_hash

CPU = torch.device("cpu")
MODEL = "--model.n-layer 1 --model.n-embd 32 --model.block-size 64".split()
STEPS = "--sft.min-steps 6 --sft.epochs 0.1".split()
PAIRS = "--dpo.min-steps 6 --dpo.epochs 0.1".split()


def write(file, rows: list[dict]):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files, and a run on the first."""
    folder = tmp_path_factory.mktemp("options")
    write(folder / "mine.jsonl", [{"prompt": f"Q{i}:", "chosen": f" {i}", "rejected": " no"} for i in range(20)])
    write(folder / "answers.jsonl", [{"prompt": f"Q{i}:", "completion": f" {i}!"} for i in range(5, 15)])
    train(folder, "--data", "mine.jsonl", *MODEL, *STEPS, *PAIRS)
    return folder


def train(folder, *args: str):
    done = command(folder, "train.py", *args)
    assert done.returncode == 0, done.stderr
    return done


def refused(folder, *args: str) -> str:
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and ".lock" not in file.name}
    done = command(folder, "train.py", *args)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1, done.stderr
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file() and ".lock" not in f.name} == before
    return done.stderr


def of(run) -> tuple[dict, dict]:
    return tuple(json.loads((run / f"{name}.json").read_text()) for name in ("config", "summary"))


def test_sft_on_one_file_and_dpo_on_another(folder):
    """No prompt that is held out is imitated, whichever file it is in."""
    done = train(folder, "--data", "mine.jsonl", "--sft-data", "answers.jsonl", "--runs", "two", *MODEL, *STEPS, *PAIRS)
    held_out = {row["prompt"] for row in Rows(folder / "two/dpo/held_out.jsonl")}
    assert held_out == {"Q10:"} and "answers.jsonl: skipped 1 of 10 rows: 1 prompt held out" in done.stdout
    config, summary = of(folder / "two/sft")
    assert (summary["rows_used"], summary["rows_skipped"]) == (9, {"prompt held out": 1})
    assert config["file"] == "answers.jsonl" and config["data"] != of(folder / "runs/mine/sft")[0]["data"]
    config, summary = of(folder / "two/dpo")
    assert config["file"] == "mine.jsonl" and summary["rows_used"] == 19
    again = command(folder, "train.py", "--data", "mine.jsonl", "--runs", "two", "--overwrite", *MODEL, *STEPS, *PAIRS)
    assert again.returncode == 0 and "trained before" not in again.stdout


def test_sft_starts_from_a_given_run(folder):
    train(folder, "--stage", "sft", "--data", "mine.jsonl", "--init", "runs/mine/dpo", "--runs", "on", *STEPS)
    start = load_run(folder / "runs/mine/dpo", CPU)
    config, _ = of(folder / "on/sft")
    assert config["init"] == {"path": "runs/mine/dpo", "hash": weights_hash(start.model)}
    first = json.loads((folder / "on/sft/metrics.jsonl").read_text().splitlines()[0])["loss"]
    fresh = json.loads((folder / "runs/mine/sft/metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first < fresh - 0.5 and of(folder / "runs/mine/sft")[0]["init"] is None
    line = refused(folder, "--data", "mine.jsonl", "--runs", "on", *MODEL, *STEPS, *PAIRS)  # SFT without it
    assert "on/sft was trained otherwise (init: " in line


def test_dpo_against_a_given_run(folder):
    args = ["--data", "mine.jsonl", "--reference", "runs/mine/dpo", "--runs", "second", *PAIRS]
    train(folder, *args)
    first, second = (load_run(folder / run, CPU) for run in ("runs/mine/dpo", "second/dpo"))
    assert not (folder / "second/sft").exists()
    assert weights_hash(second.reference) == weights_hash(first.model) == second.config["reference"]["hash"]
    loss = json.loads((folder / "second/dpo/metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert loss == pytest.approx(0.693147, abs=1e-4)
    train(folder, *args[:-6], "--runs", "third", "--init", "runs/mine/sft", *PAIRS)
    third = load_run(folder / "third/dpo", CPU)
    assert third.config["init"]["path"] == "runs/mine/sft" and third.config["reference"] == second.config["reference"]
    loss = json.loads((folder / "third/dpo/metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert abs(loss - 0.693147) > 1e-4  # the policy is not its reference to begin with


def test_a_finished_run_goes_on(folder):
    """Its own reference stays, though the SFT run beside it is gone; a stop in the middle can be resumed."""
    shutil.copytree(folder / "runs/mine", folder / "longer")
    shutil.rmtree(folder / "longer/sft")
    args = ["--data", "mine.jsonl", "--runs", "longer", *MODEL, *PAIRS, "--extend"]
    before = load_run(folder / "longer/dpo", CPU)
    train(folder, *args, "5")
    after = load_run(folder / "longer/dpo", CPU)
    log = [json.loads(line) for line in (folder / "longer/dpo/metrics.jsonl").read_text().splitlines()]
    old = [json.loads(line) for line in (folder / "runs/mine/dpo/metrics.jsonl").read_text().splitlines()]
    assert len(old) == 6 and log[:6] == old and [m["step"] for m in log] == list(range(11)) and log[-1]["steps"] == 11
    assert after.config["extended"] == [5] and after.config["reference"] == before.config["reference"]
    assert weights_hash(after.reference) == weights_hash(before.reference) == after.config["reference"]["hash"]
    assert weights_hash(after.model) != weights_hash(before.model) and of(folder / "longer/dpo")[1]["steps"] == 11
    train(folder, *args, "2")
    assert of(folder / "longer/dpo")[0]["extended"] == [5, 2] and of(folder / "longer/dpo")[1]["steps"] == 13


def test_sft_goes_on_and_dpo_takes_it(folder):
    args = ["--data", "mine.jsonl", "--runs", "more", *MODEL, *STEPS]
    train(folder, "--stage", "sft", *args)
    train(folder, "--stage", "sft", *args, "--extend", "4")
    assert of(folder / "more/sft")[1]["steps"] == 10
    done = train(folder, *args, *PAIRS)
    assert "trained before with these very options" in done.stdout
    assert of(folder / "more/dpo")[0]["reference"]["hash"] == weights_hash(load_run(folder / "more/sft", CPU).model)


def test_an_extension_that_is_stopped_is_resumed(folder, monkeypatch):
    """Step for step as if it had not been."""
    from minqstar.training import session

    for name in ("stopped", "whole"):
        shutil.copytree(folder / "runs/mine", folder / name)
    args = ["--data", "mine.jsonl", *MODEL, *PAIRS, "--save-every", "2", "--extend", "6", "--runs"]
    train(folder, *args, "whole")
    with monkeypatch.context() as patch:
        saved = session.RunWriter.save_state

        def stop(self, tensors, values):
            saved(self, tensors, values)
            if values["step"] == 8:
                raise KeyboardInterrupt

        patch.setattr(session.RunWriter, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            command(folder, "train.py", *args, "stopped")
    assert of(folder / "stopped/dpo")[1]["steps"] == 6  # the finished run is there as it was
    line = refused(folder, *args, "stopped")
    assert "stopped/dpo.part is an unfinished run; continue it with --resume" in line
    line = refused(folder, *args[:-3], *STEPS, "--runs", "stopped", "--resume")
    assert "was begun otherwise (extended: [6] -> [])" in line
    train(folder, *args, "stopped", "--resume")
    one, two = (load_run(folder / name / "dpo", CPU) for name in ("stopped", "whole"))
    assert weights_hash(one.model) == weights_hash(two.model) and one.config["extended"] == [6]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--data mine.jsonl --extend 5 --runs nowhere", "nowhere/dpo is no finished run with its training state"),
        ("--data mine.jsonl --extend 5 --overwrite", "--overwrite does not go with --extend"),
        ("--data mine.jsonl --save-every 0", "--save-every must be positive, got 0"),
        ("--data mine.jsonl --extend -1", "--extend must be between 0 and a billion"),
        ("--data mine.jsonl --extend 5 --dpo.beta 0.1", "runs/mine/dpo was trained otherwise (dpo.beta: 0.5 -> 0.1)"),
        ("--data mine.jsonl --extend 5 --reference changed", "(reference.hash: "),
        ("--data mine.jsonl --extend 5 --resume", "runs/mine/dpo exists"),
        ("--data mine.jsonl --stage sft --reference runs/mine/dpo", "--reference needs --stage dpo"),
        ("--data mine.jsonl --reference runs/mine/sft --sft.lr 0.1", "--sft.lr does not go with --reference"),
        ("--data mine.jsonl --reference runs/mine/sft --sft-data answers.jsonl", "does not go with --reference"),
        ("--data mine.jsonl --init changed --model.n-layer 2", "--model.n-layer does not go with --init"),
        ("--data mine.jsonl --reference runs/mine/dpo --overwrite", "runs/mine/dpo would be made anew from itself"),
        ("--data mine.jsonl --reference nowhere --runs new", "nowhere is not a run folder"),
        ("--data mine.jsonl --init nowhere --runs new", "nowhere is not a run folder"),
        ("--data mine.jsonl --sft-data nowhere.jsonl --runs new", "cannot read nowhere.jsonl"),
    ],
)
def test_what_does_not_fit_together_is_refused_and_nothing_is_changed(folder, args, message):
    if not (folder / "changed").exists():
        train(folder, "--stage", "sft", "--data", "mine.jsonl", "--runs", "c", "--seed", "1", *MODEL, *STEPS)
        (folder / "c/sft").rename(folder / "changed")
    words = args.split() + (MODEL if "--init" not in args and "--reference" not in args else [])
    assert message in refused(folder, *words, *PAIRS[: 0 if "--stage sft" in args else None])
