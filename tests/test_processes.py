"""Two processes at once on one data set or one run: real ones. Each file is consistent with what is said of it."""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, command, line_of, random_model

from minqstar.errors import UserError
from minqstar.lm.model import GPT
from minqstar.lm.tokenizer import Tokenizer
from minqstar.training.checkpoint import load_run, save_tensors
from minqstar.training.writer import RunWriter
from minqstar.world.tldr import DataConfig, dataset

CPU = torch.device("cpu")
SMALL = DataConfig(pairs=40, sft=40, held_out=20)


def start(folder: Path, *args: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    places = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(Path(__file__).parent)])
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    return subprocess.Popen(args, cwd=folder, env=environment, **pipes)


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()


MAKER = """
import sys, time
from test_processes import SMALL, Path, dataset, digest, replace
from minqstar.lm.tokenizer import load_tokenizer
for seed in map(int, sys.argv[1]):
    with dataset(Path("tldr"), replace(SMALL, seed=seed), load_tokenizer(), lambda _: None) as folder:
        time.sleep(0.05)
        print(digest(folder), flush=True)
"""


def test_each_process_reads_its_own_data_set(tmp_path, tokenizer):
    """Two processes in one folder, of one seed and of different ones: nobody reads what the other asked for."""
    expected = {}
    for seed in "01":
        with dataset(tmp_path / seed, replace(SMALL, seed=int(seed)), tokenizer) as folder:
            expected[seed] = digest(folder)
    makers = {seeds: start(tmp_path, sys.executable, "-c", MAKER, seeds) for seeds in ("010110", "110100")}
    for seeds, maker in makers.items():
        said, wrong = maker.communicate(timeout=300)
        assert maker.returncode == 0, wrong
        assert said.split() == [expected[seed] for seed in seeds]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "tldr"}
    assert digest(tmp_path / "tldr") == expected["0"]


TRAIN = shlex.split(
    "train.py --data mine.jsonl --model.n-layer 1 --model.n-embd 32 --model.block-size 64 --sft.row-length 64 "
    "--sft.batch-tokens 256 --sft.min-steps 10 --save-every 1"
)
DPO = shlex.split("--dpo.row-length 64 --dpo.batch-tokens 256 --dpo.min-steps 10")


@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_second_trainer_says_who_has_the_run_and_touches_nothing(tmp_path, stage):
    """The first is halted in the middle of a stage; the second, of another seed, comes in every way that there is."""
    rows = [{"prompt": f"Say {i}.", "chosen": f" {i}!", "rejected": f" {i + 1}?"} for i in range(60)]
    for name in ("both", "alone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = start(tmp_path / "both", *line_of(*TRAIN, *DPO))
    runs = tmp_path / "both/runs/mine"
    try:
        while not (runs / f"{stage}.part/state.safetensors").exists():
            assert first.poll() is None, first.stderr.read()
        first.send_signal(signal.SIGSTOP)
        before = contents(runs)
        for how in ("", "--overwrite", "--resume", "--overwrite --resume", "--stage sft", "--stage sft --overwrite"):
            second = command(tmp_path / "both", *TRAIN, "--seed", "2", *how.split(), *DPO * ("sft" not in how))
            assert second.returncode == 1 and second.stderr.count("\n") == 1
            assert f"runs/mine is in use by process {first.pid} on " in second.stderr
        with pytest.raises(UserError, match=f"{stage} is in use by process {first.pid}"), RunWriter(runs / stage, {}):
            pytest.fail("two owners")
        assert contents(runs) == before
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=300) == 0
    assert command(tmp_path / "alone", *TRAIN, *DPO).returncode == 0
    for stage in ("sft", "dpo"):
        run, alone = (load_run(tmp_path / name / "runs/mine" / stage, CPU) for name in ("both", "alone"))
        assert run.config == alone.config
        steps = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(10))
    assert {path.name for path in runs.iterdir()} == {"sft", "dpo"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pair(which: int) -> list[GPT]:
    """Policy and reference of one of two runs, which differ in everything."""
    return [random_model(10 * which + i, vocab_size=258) for i in range(2)]


def write_run(path: Path, which: int):
    model, reference = pair(which)
    config = {"stage": "dpo", "model": vars(model.config), "dpo": {"beta": 0.5 + which}}
    with RunWriter(path, config, overwrite=True) as writer:
        writer.save_model(model)
        save_tensors(reference.state_dict(), writer.folder / "reference.safetensors")
        Tokenizer({bytes([b]): b for b in range(256)}).save(writer.folder / "vocab.tiktoken")


OVERWRITER = """
import itertools, time
from test_processes import Path, write_run
for i in itertools.count():
    write_run(Path("dpo"), i % 2)
    time.sleep(0.03)  # a reader whose machine has one core gets a turn
"""


def test_a_reader_beside_constant_overwriting_gets_one_run_whole(tmp_path):
    overwriter = start(tmp_path, sys.executable, "-c", OVERWRITER)
    seen, pairs = Counter(), [pair(0), pair(1)]
    try:
        while not (tmp_path / "dpo").exists():
            assert overwriter.poll() is None, overwriter.stderr.read()
        end = time.monotonic() + 120
        while (seen.total() < 10 or not (seen[0] and seen[1])) and time.monotonic() < end:
            try:
                run = load_run(tmp_path / "dpo", CPU)
            except UserError as e:
                assert "is being replaced" in str(e) and "\n" not in str(e)
                seen["one line"] += 1
                continue
            which = int(run.beta - 0.5)
            for read, written in zip((run.model, run.reference), pairs[which], strict=True):
                assert all(map(torch.equal, read.state_dict().values(), written.state_dict().values()))
            seen[which] += 1
    finally:
        overwriter.kill()
        overwriter.wait()
    assert seen[0] and seen[1], seen
    assert tmp_path.joinpath("dpo").exists() or any(p.name.endswith(".old") for p in tmp_path.iterdir())
