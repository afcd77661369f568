"""A run that is killed and resumed is the run that was never killed, bit for bit."""

import json
import random
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, command, line_of, process
from safetensors.torch import load_file

SFT = shlex.split(
    "train.py --data mine.jsonl --model.n-layer 1 --model.n-embd 32 --model.block-size 64 --sft.row-length 64 "
    "--sft.batch-tokens 256 --sft.min-steps 40 --save-every 1"
)
OPTIONS = [*SFT, *shlex.split("--dpo.row-length 64 --dpo.batch-tokens 256 --dpo.min-steps 40")]
SELDOM = ("--save-every", "1000")  # only the signal, and the end, save


def write_data(folder: Path):
    rows = [{"prompt": f"Say {i}.", "chosen": f" {i}!", "rejected": f" {i + 1}?"} for i in range(60)]
    folder.mkdir()
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def logged(folder: Path) -> int:
    """Steps in the logs of both stages, finished or not."""
    return sum(log.read_bytes().count(b"\n") for log in folder.glob("runs/mine/*/metrics.jsonl"))


def start_and_signal(folder: Path, number: int, rng: random.Random, *more: str) -> subprocess.Popen:
    """Resume, and send a signal at a random moment a few steps on: steps and saves take turns every few ms."""
    target = logged(folder) + rng.randint(1, 8)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen(line_of(*OPTIONS, "--resume", *more), cwd=folder, env=ENVIRONMENT, **quiet)
    while started.poll() is None and logged(folder) < target:
        time.sleep(0.001)
    time.sleep(rng.random() * 0.02)
    started.send_signal(number)
    return started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "work"
    write_data(folder)
    done = process(folder, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_runs(one: Path, two: Path):
    for stage in ("sft", "dpo"):
        a, b = one / "runs/mine" / stage, two / "runs/mine" / stage
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
        states = load_file(a / "state.safetensors"), load_file(b / "state.safetensors")
        assert states[0].keys() == states[1].keys() and any(name.startswith("optimizer/") for name in states[0])
        assert all(states[0][name].equal(states[1][name]) for name in states[0])
        logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (a, b)]
        assert [m | {"seconds": 0} for m in logs[0]] == [m | {"seconds": 0} for m in logs[1]]


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_undisturbed(undisturbed, tmp_path, kills):
    rng = random.Random(kills)
    folder = tmp_path / "work"
    write_data(folder)
    for _ in range(kills):
        started = start_and_signal(folder, signal.SIGKILL, rng)
        assert started.wait() in (0, -signal.SIGKILL), started.stderr.read()
        if (folder / "runs/mine/dpo").exists():  # it came to its end; there is more to kill
            (folder / "runs/mine/dpo").rename(tmp_path / f"finished{rng.random()}")
    done = process(folder, *OPTIONS, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_runs(undisturbed, folder)


@pytest.mark.slow
def test_two_commands_are_the_run_that_one_makes(undisturbed, tmp_path):
    """SFT in one process and DPO in another: weights, moments and random numbers as if one had made both."""
    folder = tmp_path / "work"
    write_data(folder)
    for stage in ("sft", "dpo"):
        done = process(folder, *(SFT if stage == "sft" else OPTIONS), "--stage", stage)
        assert done.returncode == 0, done.stderr
    assert_same_runs(undisturbed, folder)


def test_a_signal_saves_and_says_how_to_go_on(undisturbed, tmp_path):
    folder = tmp_path / "work"
    write_data(folder)
    for number in (signal.SIGINT, signal.SIGHUP):  # test_cli sends SIGTERM
        started = start_and_signal(folder, number, random.Random(number), *SELDOM)
        _, words = started.communicate(timeout=60)
        assert started.returncode == 128 + number and words.count("\n") == 1
        assert "continue with --resume" in words and (folder / "runs/mine/sft.part/state.safetensors").exists()
    refused = command(folder, *OPTIONS)
    assert refused.returncode == 1 and "is an unfinished run" in refused.stderr
    other = command(folder, *OPTIONS, "--resume", "--sft.lr", "0.5")
    assert other.returncode == 1 and "begun otherwise (sft.lr: 0.02 -> 0.5)" in other.stderr
    done = process(folder, *OPTIONS, "--resume", *SELDOM)
    assert done.returncode == 0 and "SFT: resumed at step" in done.stdout, done.stderr
    assert_same_runs(undisturbed, folder)
