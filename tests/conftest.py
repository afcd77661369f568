"""Shared by all tests: fixed Hypothesis profiles, and small things to test with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from minqstar.model import GPT, GPTConfig
from minqstar.tldr import World
from minqstar.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parent.parent

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


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}


def line_of(*args: str) -> list[str]:
    """The command line of a command of the project."""
    first = [str(ROOT / args[0])] if args[0].endswith(".py") else list(args[:1])
    return [sys.executable, *first, *args[1:]]


def command(folder: Path, *args: str, **kwargs) -> subprocess.CompletedProcess:
    """Run a command of the project in some folder."""
    settings = {"cwd": folder, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(line_of(*args), **settings, **kwargs)
