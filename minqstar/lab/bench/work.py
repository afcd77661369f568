"""What the bench has done: how much of which work, with which model, on which texts."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from minqstar.errors import require
from minqstar.lm.fast import has_fast_bf16
from minqstar.lm.model import GPT, GPT2, GPTConfig
from minqstar.lm.pretrained import load_pretrained, pretrained_config
from minqstar.lm.tokenizer import Tokens
from minqstar.training.data import Group, tokenize
from minqstar.training.formats import read_pairs
from minqstar.training.groups import rows_of

CPU = torch.device("cpu")
CONTEXT = 1024  # tokens
DEPTH = 8  # tokens of the deepest node of a search tree
PAIRS = 16  # real ones of a piece of work
LONGEST = 512  # tokens of a real prompt with one of its responses


@dataclass(frozen=True)
class Size:
    """A model, and the random texts that it is trained on and goes on from."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    prompts: tuple[int, int]  # tokens of the shortest and of the longest
    responses: tuple[int, int]
    pairs: int  # of a training batch
    warm_up: int  # training steps before the first that counts
    row_length: int  # of packed rows
    new_tokens: int  # decoded
    dtype: torch.dtype  # of decoding


SIZES = {
    "tiny": Size(4, 4, 128, 512, (32, 64), (12, 24), 32, 30, 176, 64, torch.float32),
    "gpt2": Size(12, 12, 768, 50257, (96, 192), (32, 64), 4, 3, 512, 32, torch.bfloat16),
}
BOUNDS = {"batch": (1, 10**4), "beams": (0, 10**4), "simulations": (1, 10**4), "length": (1, 20)}


@dataclass(frozen=True)
class Work:
    """What to do, and how much of it at once."""

    what: Annotated[Literal["train", "decode", "mcts"], tyro.conf.Positional] = "train"
    """Train with DPO (measured in pairs), decode (new tokens), or search trees (simulations)."""
    size: Literal["tiny", "gpt2"] = "tiny"
    """4 layers of 128 channels and 512 tokens, or GPT-2's 12 of 768 and 50,257."""
    batch: int = 1
    """Prompts at once, of decode and mcts."""
    beams: int = 0
    """Beams of each prompt, of decode; 0 is greedy."""
    simulations: int = 64
    """Simulations of each tree, of mcts; each makes one leaf."""
    length: int = 1
    """How many times as long the texts are."""
    vocabulary: int = 0
    """Tokens of the vocabulary; 0 is the size's own."""
    model: Path | None = None
    """Of decode and train: a Hugging Face folder in place of random weights, its products in bfloat16 where that is
    fast."""
    data: Path | None = None
    """Of train with a model: a file of real pairs, of any format that train.py reads, in place of random texts."""

    def __post_init__(self):
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            require(least <= value <= most, f"{name} must be between {least} and {most:,}, got {value}")
        both = self.what != "train" or (self.model is None) == (self.data is None)
        require(both, "train takes a model and data together: give --model FOLDER and --data FILE")
        sizes = f"vocabulary must be 0 or between 16 and 100,000, got {self.vocabulary}"
        require(self.vocabulary == 0 or 16 <= self.vocabulary <= 10**5, sizes)
        size = self.scaled()
        new = {"train": size.responses[1] + 1, "decode": size.new_tokens, "mcts": DEPTH}[self.what]
        message = f"length {self.length} makes texts of {size.prompts[1] + new} tokens; the context has {CONTEXT}"
        require(size.prompts[1] + new <= CONTEXT, message)

    @classmethod
    def of(cls, values: dict) -> "Work":
        """From JSON."""
        return cls(**values | {name: values[name] and Path(values[name]) for name in ("model", "data")})

    @property
    def job(self) -> str:
        """What the sides are listed by."""
        return "train on pairs" if self.what == "train" and self.model else self.what

    def scaled(self) -> Size:
        """The size, with texts, vocabulary and model as the options ask."""
        size, n = SIZES[self.size], self.length
        if self.model:
            of = pretrained_config(self.model)
            sizes = {name: getattr(of, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
            size = replace(SIZES["gpt2"], dtype=train_dtype(), **sizes)
        prompts, responses = (tuple(n * tokens for tokens in span) for span in (size.prompts, size.responses))
        rest = {"row_length": n * size.row_length, "vocab_size": self.vocabulary or size.vocab_size}
        warm_up = max(3, size.warm_up // n**2)  # which takes about as long
        return replace(size, prompts=prompts, responses=responses, warm_up=warm_up, **rest)

    def pairs(self, tokenizer: Tokens) -> tuple[list[dict], list[Group]]:
        """PAIRS rows, spread evenly over those of at most LONGEST tokens, and their tokens. UserError if fewer."""
        rows = read_pairs(self.data)
        groups, _ = tokenize(rows, tokenizer, LONGEST, share=False)
        used, count = rows_of(groups, rows), len(groups)
        require(count >= PAIRS, f"{self.data}: {count} pairs have at most {LONGEST} tokens, of {PAIRS} that are needed")
        places = [i * count // PAIRS for i in range(PAIRS)]
        return [used[i] for i in places], [groups[i] for i in places]

    def memory(self) -> int:
        """Bytes that decoding or tree search needs beside the weights: a rough bound for any side."""
        size, beams = self.scaled(), max(1, self.beams)
        if self.what == "mcts":  # room for nodes doubles when it is full; a node has sixteen edges
            kept, place = size.prompts[1] + 2 * (self.simulations + DEPTH), 1000
        else:  # every beam with a prompt of its own; the path to a token, and which beams see it
            kept, place = size.prompts[1] + size.new_tokens, 8 * size.new_tokens + 5 * beams
        keys_and_values = 2 * size.n_layer * size.n_embd * size.dtype.itemsize
        once = self.batch * beams * (kept * (keys_and_values + place) + 24 * size.vocab_size)
        return 3 * once  # transformers copies what it keeps at every step


def texts(size: Size, count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Token ids of random prompts with two responses each. None is EOS or PAD, the last two ids."""
    rng = np.random.default_rng(0)
    draw = lambda bounds: rng.integers(0, size.vocab_size - 2, rng.integers(*bounds, endpoint=True)).tolist()  # noqa: E731
    return [(draw(size.prompts), draw(size.responses), draw(size.responses)) for _ in range(count)]


def prompts(size: Size, count: int) -> list[list[int]]:
    return [prompt for prompt, _, _ in texts(size, count)]


def train_dtype() -> torch.dtype:
    return torch.bfloat16 if has_fast_bf16(CPU) else torch.float32


def config_of(size: Size) -> GPTConfig:
    sizes = {name: getattr(size, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return GPTConfig(block_size=CONTEXT, **sizes, **GPT2)


def decoder(work: Work) -> GPT:
    """The model that decodes: of a folder, or with random weights."""
    size = work.scaled()
    if work.model:
        return load_pretrained(work.model, CPU, size.dtype)
    return random_model(size).to(size.dtype).eval()


def random_model(size: Size) -> GPT:
    """GPT-2 with random weights, none of them zero: with output projections of zero it would repeat one token."""
    model, generator = GPT(config_of(size)), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02, generator=generator)
    return model
