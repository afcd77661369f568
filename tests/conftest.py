"""Shared by all tests: fixed Hypothesis profiles, and small things to test with."""

import io
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from hypothesis import settings

from minqstar.lm.model import GPT, GPT2, GPTConfig
from minqstar.lm.tokenizer import Tokenizer, load_tokenizer
from minqstar.theory.mdp import TokenMDP, tree
from minqstar.training.checkpoint import as_json, load_run, sealed
from minqstar.training.data import PackedData
from minqstar.training.writer import RunWriter
from minqstar.world.tldr import DataConfig, World, draw_rows, world_hash

ROOT = Path(__file__).parent.parent

# A job in the background, or under nohup, ignores these, and so would every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared by the workers, and by what they start
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("deep", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="session")
def world(tokenizer) -> World:
    return World(tokenizer)


def random_model(seed: int = 0, vocab_size: int = 23, block_size: int = 48, **config) -> GPT:
    """A small model with no zero left in it: zero-initialised projections would hide most mistakes."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16} | config
    generator = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=block_size, **sizes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return model.eval()


def gpt2_twins(seed: int, vocab_size: int = 61, n_layer: int = 3, n_head: int = 4, n_embd: int = 32):
    """transformers' GPT-2 with random weights, and ours with the same."""
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": vocab_size}
    specials = {"bos_token_id": None, "eos_token_id": None}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=64, **sizes, **specials)).eval()
    ours = GPT(GPTConfig(block_size=64, **sizes, **GPT2)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        source = {name.removeprefix("transformer."): weight for name, weight in theirs.named_parameters()}
        for name, weight in ours.named_parameters():
            given_ = source.pop(name.replace("blocks.", "h."))
            linear = name.endswith(("attn.weight", "proj.weight", "fc.weight"))  # theirs are stored transposed
            weight.copy_(given_.T if linear else given_)
    assert not source
    return theirs, ours


def members(data: PackedData) -> list[list[int]]:
    """For each row the indices of its groups, in order."""
    return [of_row.tolist() for of_row in np.split(data.order, data.stops[1:-1])]


def random_tree(seed: int) -> tuple[TokenMDP, float]:
    """A tree MDP over tokens 0, 1, 2 and EOS 3, at most 4 tokens a response, some actions without mass; and a beta.

    Every fifth is full of ties: all its actions are alike.
    """
    generator = torch.Generator().manual_seed(seed)
    token, next = tree(3, 3)
    spread = 0.0 if seed % 5 == 0 else 1.0
    logits = 2 * spread * torch.randn(token.shape, generator=generator, dtype=torch.float64)
    gone = (torch.rand(token.shape, generator=generator) < 0.15) & (token != 3)
    log_ref = logits.masked_fill(gone | (token < 0), -torch.inf).log_softmax(-1)
    reward = spread * torch.randn(token.shape, generator=generator, dtype=torch.float64)
    return TokenMDP(token, next, log_ref, reward), 0.2 + 2 * torch.rand(1, generator=generator).item()


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}


def line_of(*args: str) -> list[str]:
    """The command line of a command of the project."""
    first = [str(ROOT / args[0])] if args[0].endswith(".py") else list(args[:1])
    return [sys.executable, *first, *args[1:]]


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def command(folder: Path, *args: str, input: bytes = b"", encoding: str = "utf-8") -> Done:
    """Run a command of the project in some folder, in this process: that saves the seconds of a start."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, errors) for errors in ("strict", "backslashreplace"))
    status = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        patch.setattr(sys, "argv", list(args if args[0] != "-m" else args[1:]))
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input), "utf-8"))
        patch.setattr(signal, "signal", lambda *_: None)
        try:
            if args[0] == "-m":
                patch.delitem(sys.modules, args[1], raising=False)  # run as a script, it is another module
                runpy.run_module(args[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / args[0]), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
    return Done(status, *(stream.buffer.getvalue().decode(encoding) for stream in (flushed(out), flushed(err))))


def flushed(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    return stream


def process(folder: Path, *args: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a command of the project in some folder as a process of its own."""
    return subprocess.run(
        line_of(*args), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )


def pytest_terminal_summary(terminalreporter):
    """How many cases the fuzz tests ran, and how many faults were planted in file operations."""
    for title, name in ("fuzz", "test_fuzz"), ("faults", "test_faults"):
        ran = getattr(sys.modules.get(name), "CASES", None)
        if ran:
            each = ", ".join(f"{name} {count:,}" for name, count in ran.items())
            terminalreporter.write_line(f"{title}: {ran.total():,} cases ({each})")


def reseal(folder: Path):
    """Bring a run's hashes up to date after a change, so that what lies behind them is met."""
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_bytes(as_json(sealed(config, folder)))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, tokenizer):
    """A DPO run of random weights."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("sft", "dpo"):
        model = random_model(vocab_size=tokenizer.n_vocab, block_size=96)
        config = {"stage": stage, "model": vars(model.config), "dpo": {"beta": 0.5}}
        with RunWriter(folder / stage, config) as writer:
            writer.save_model(model)
            tokenizer.save(writer.folder / "vocab.tiktoken")
            if stage == "dpo":
                writer.keep_reference(load_run(folder / "sft", torch.device("cpu")))
    return folder / "dpo"


SMALL = shlex.split(
    "--model.n-layer 1 --model.n-embd 32 --sft.batch-tokens 720 --dpo.batch-tokens 720 --sft.min-steps 10 "
    "--dpo.min-steps 10"
)
TINY = [*SMALL, *shlex.split("--world.pairs 64 --world.sft 128 --world.held-out 32")]  # without --data


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder in which `train.py --stage dpo` was run, tiny."""
    folder = tmp_path_factory.mktemp("tiny")
    done = process(folder, "train.py", "--stage", "dpo", *TINY)
    assert done.returncode == 0, done.stderr
    assert "the run is in runs/dpo" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    return folder


def write_run(runs: Path, stage: str, model: GPT, world: World, rows=()):
    """A run of given weights; of DPO with the run sft beside it as its reference, and held-out rows."""
    config = {"stage": stage, "model": vars(model.config), "dpo": {"beta": 0.5}, "world": world_hash()}
    with RunWriter(runs / stage, config, overwrite=True) as writer:
        writer.save_model(model)
        world.tokenizer.save(writer.folder / "vocab.tiktoken")
        if stage == "dpo":
            writer.keep_reference(load_run(runs / "sft", torch.device("cpu")))
            (writer.folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def main_run(tmp_path, world) -> Path:
    """A folder with a DPO run of the TL;DR world, of random weights, and its reference."""
    rows = list(draw_rows(world, DataConfig(held_out=8), "test"))
    for stage, seed in (("sft", 0), ("dpo", 1)):
        write_run(tmp_path, stage, random_model(seed, world.tokenizer.n_vocab, 256, smear=True), world, rows)
    return tmp_path
