"""A run folder: weights, configuration, vocabulary, logs. It holds all that is needed to use it.

    model.safetensors        the policy
    reference.safetensors    the reference (DPO runs): the same bytes as the SFT run's model
    vocab.tiktoken           the vocabulary
    config.json              architecture, training options, what the data were, the reference's hash
    metrics.jsonl            one object a step
    summary.json             the closing figures

A run is made in a folder beside its own and takes its name when it is complete: a folder with the run's name
is a finished run. Loading never unpickles.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minqstar.cli import UserError, require
from minqstar.model import GPT, GPTConfig
from minqstar.tokenizer import Tokenizer, load_tokenizer


@dataclass
class Run:
    """A finished run, loaded."""

    path: Path
    config: dict
    tokenizer: Tokenizer
    model: GPT
    reference: GPT | None  # None for an SFT run


class RunWriter:
    """Makes a run folder: use it in a `with`, write into `folder`; a clean exit gives the folder its name."""

    def __init__(self, path: Path, overwrite: bool):
        self.path = Path(path)
        if self.path.exists() and not overwrite:
            raise UserError(f"{path} exists; choose another --out, or replace it with --overwrite")
        self.folder = self.path.with_name(f".{self.path.name}.part")

    def __enter__(self) -> "RunWriter":
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
        except OSError as e:
            raise UserError(f"cannot write a run in {self.path.parent}: {e.strerror}") from e
        self._metrics = open(self.folder / "metrics.jsonl", "w", buffering=1, encoding="utf-8")
        return self

    def log(self, metrics: dict):
        self._metrics.write(json.dumps(metrics) + "\n")

    def write_json(self, name: str, value: dict):
        (self.folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def save_model(self, model: GPT):
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, self.folder / "model.safetensors")

    def keep_reference(self, run: Run):
        """Bring in the weights of the run that is the reference: by hard link where the file system can."""
        source, target = run.path / "model.safetensors", self.folder / "reference.safetensors"
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    def __exit__(self, kind, *_):
        self._metrics.close()
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        if self.path.exists():
            old = self.path.with_name(f".{self.path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.path.rename(old)
            self.folder.rename(self.path)
            shutil.rmtree(old)
        else:
            self.folder.rename(self.path)


def read_config(path: Path) -> dict:
    """The config.json of a run; UserError if there is no run."""
    require(Path(path).is_dir(), f"{path} is not a run folder; train one with `python train.py`")
    try:
        return json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path} holds no run: cannot read config.json ({e.strerror})") from e
    except ValueError as e:
        raise UserError(f"{path}/config.json is damaged: {e}") from e


def _load_weights(model: GPT, file: Path) -> GPT:
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot load {file}: {e}") from e
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    require(
        not odd,
        f"{file} does not fit its config.json: {odd[:1]} and {max(0, len(odd) - 1)} more weights differ",
    )
    model.load_state_dict(weights)
    return model.eval()


def load_run(path: Path, device: torch.device) -> Run:
    """A finished run, its models on the device in eval mode. UserError if anything is missing or does not fit."""
    path = Path(path)
    config = read_config(path)
    tokenizer = load_tokenizer(path / "vocab.tiktoken")
    known = {f.name for f in fields(GPTConfig)}
    architecture = config.get("model")
    ok = isinstance(architecture, dict) and set(architecture) == known
    require(ok, f"{path}/config.json describes no model that this version knows")
    gpt = GPTConfig(**architecture)
    require(gpt.vocab_size == tokenizer.n_vocab, f"{path}: vocabulary and model differ in size")
    model = _load_weights(GPT(gpt), path / "model.safetensors").to(device)
    reference = None
    if config.get("stage") == "dpo":
        reference = _load_weights(GPT(gpt), path / "reference.safetensors").to(device)
    return Run(path, config, tokenizer, model, reference)


def model_config(model: GPT) -> dict:
    return asdict(model.config)
