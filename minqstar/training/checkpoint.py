"""A run folder: weights, configuration, vocabulary, logs. It holds all that is needed to use it.

    model.safetensors        the policy
    reference.safetensors    the reference (DPO runs): the same bytes as the SFT run's model
    vocab.tiktoken           the vocabulary
    config.json              architecture, training options, what the data were, the reference's hash
    metrics.jsonl            one object a step
    summary.json             the closing figures
    held_out.jsonl           the rows that they were measured on
    state.safetensors        weights, moments, random state and counters of the last save: what --resume reads

A run NAME is made in the folder NAME.part and takes its name when it is complete: a folder with the run's name is a
finished run, and NAME.part one that can be resumed. A file is written aside, synced and renamed, so that a kill at
any moment leaves the old one or the new one. Loading never unpickles.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from minqstar.errors import UserError, first_line, require
from minqstar.lm.model import GPT, GPTConfig
from minqstar.lm.tokenizer import Tokenizer, load_tokenizer

STATE = "state.safetensors"


@dataclass
class Run:
    """A finished run, loaded."""

    path: Path
    config: dict
    tokenizer: Tokenizer
    model: GPT
    reference: GPT | None  # None for an SFT run
    beta: float = 1.0  # reward units a nat; of an SFT run, which has no implicit rewards, 1


def sync(path: Path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, write: Callable[[Path], None]):
    """Write a file aside, then give it its name: at every moment the whole old file is there, or the whole new one."""
    aside = path.with_name(f"{path.name}.part")
    try:
        write(aside)
        sync(aside)
        aside.replace(path)
    except OSError as e:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e
    sync(path.parent)


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Where two nested configurations differ, as `name: old -> new`. A run that names no `world` may be of any."""
    found = []
    for key in (key for key in new if key in old or key != "world"):
        a, b = old.get(key), new[key]
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {str(a)[:12]} -> {str(b)[:12]}")
    return found


def beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)


def claim(path: Path, overwrite: bool, resume: bool):
    """UserError if a finished run, an unfinished one or something else would be lost by making the run `path`."""
    require(not (overwrite and resume), "--resume continues an unfinished run and --overwrite discards it: choose one")
    path, part = Path(path), beside(Path(path), ".part")
    if beside(path, ".old").exists() and not path.exists():  # killed between the two renames of RunWriter.__exit__
        beside(path, ".old").rename(path)
    for folder in (path, part):
        ours = not folder.exists() or (folder / "config.json").is_file()
        require(ours, f"{folder} exists and is not a run; move it away, or choose another folder with --runs")
    unfinished = (part / STATE).exists()
    free = overwrite or not path.exists() or (resume and unfinished)
    require(free, f"{path} exists; replace it with --overwrite, or choose another folder with --runs")
    free = overwrite or resume or not unfinished
    require(free, f"{part} is an unfinished run; continue it with --resume, or discard it with --overwrite")


class RunWriter:
    """Makes a run folder: use it in a `with`, write into `folder`; a clean exit gives the folder its name.

    `config` is what decides the run. With `resume` an unfinished run of the same config is continued: `resumed` is
    then what `save_state` stored last, (tensors, values). UserError if the config is another.
    """

    def __init__(self, path: Path, config: dict, overwrite: bool = False, resume: bool = False):
        claim(path, overwrite, resume)
        self.path, self.config, self.folder = Path(path), config, beside(Path(path), ".part")
        self.resumed = load_state(self.folder / STATE) if resume and (self.folder / STATE).exists() else None
        if self.resumed:
            odd = "; ".join(differences(self.resumed[1]["config"], config)[:3])
            words = (
                f"{self.folder} was begun otherwise ({odd}); repeat all of its options, or discard it with --overwrite"
            )
            require(not odd, words)

    def __enter__(self) -> "RunWriter":
        try:
            if self.resumed is None:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                self.write_json("config.json", self.config)
            else:
                self._keep_lines(self.resumed[1]["step"])
        except OSError as e:
            raise UserError(f"cannot write a run in {self.path.parent}: {e.strerror}") from e
        self._metrics = open(self.folder / "metrics.jsonl", "a", buffering=1, encoding="utf-8")
        return self

    def _keep_lines(self, count: int):
        """Drop from the log what came after the last save."""
        log = self.folder / "metrics.jsonl"
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        require(len(lines) >= count, f"{log} has lost lines; start anew with --overwrite")
        replace_file(log, lambda aside: aside.write_bytes(b"".join(lines[:count])))

    def history(self) -> list[dict]:
        """What was logged so far."""
        log = self.folder / "metrics.jsonl"
        try:
            lines = [json.loads(line) for line in log.read_bytes().splitlines()]
            require(all(isinstance(m, dict) and m.get("step") == i for i, m in enumerate(lines)), "a step is missing")
            return lines
        except ValueError as e:
            raise UserError(f"{log} is damaged ({first_line(e)}); start anew with --overwrite") from e

    def log(self, metrics: dict):
        self._metrics.write(json.dumps(metrics) + "\n")

    def save_state(self, tensors: dict[str, Tensor], values: dict):
        """Make this the point from which --resume goes on; `values` name the `step`."""
        os.fsync(self._metrics.fileno())
        save_tensors(tensors, self.folder / STATE, {**values, "config": self.config})

    def write_json(self, name: str, value: dict):
        (self.folder / name).write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def save_model(self, model: GPT):
        save_tensors(model.state_dict(), self.folder / "model.safetensors")

    def keep_reference(self, run: Run):
        """Bring in the weights of the run that is the reference: by hard link where the file system can."""
        source, target = run.path / "model.safetensors", self.folder / "reference.safetensors"
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    def __exit__(self, kind, *_):
        self._metrics.close()
        if kind is not None:
            if not (self.folder / STATE).exists():
                shutil.rmtree(self.folder, ignore_errors=True)
            return
        for file in (*self.folder.iterdir(), self.folder):
            sync(file)
        old = beside(self.path, ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            self.path.rename(old)
        self.folder.rename(self.path)
        sync(self.path.parent)
        shutil.rmtree(old, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, values: dict | None = None):
    """A safetensors file, plain values as JSON in its header."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(
        whole, {"values": json.dumps(values)}
    )  # as bytes: written by safetensors, only its owner may read it
    replace_file(path, lambda aside: aside.write_bytes(content))


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and values that `save_state` stored; UserError if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {}).get("values", "null"))
        whole = isinstance(values, dict) and type(values.get("step")) is int and isinstance(values.get("config"), dict)
        require(whole and values["step"] >= 0, "it names no step or no config")
        return load_file(path), values
    except (OSError, SafetensorError, ValueError, RecursionError) as e:
        raise UserError(f"cannot resume from {path}: {first_line(e)}; start anew with --overwrite") from e


def read_config(path: Path) -> dict:
    """The config.json of a run; UserError if there is no run."""
    require(Path(path).is_dir(), f"{path} is not a run folder; train one with `python train.py`")
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path} holds no run: cannot read config.json ({e.strerror})") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}/config.json is damaged: {first_line(e)}") from e
    require(isinstance(config, dict), f"{path}/config.json is damaged: not an object")
    return config


def _load_model(config: GPTConfig, file: Path, device: torch.device) -> GPT:
    try:
        weights = load_file(file)
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"cannot load {file}: {first_line(e)}") from e
    with torch.device("meta"):  # compared before memory is asked for
        expected = {name: (tuple(t.shape), t.dtype) for name, t in GPT(config).state_dict().items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in weights.items()}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    require(not odd, f"{file} does not fit its config.json: {odd[:1]}{more}")
    finite = all(tensor.isfinite().all() for tensor in weights.values())
    require(finite, f"{file} is damaged: it holds weights that are not finite")
    model = GPT(config)
    model.load_state_dict(weights)
    return model.to(device).eval()


def _architecture(path: Path, config: dict, tokenizer: Tokenizer) -> GPTConfig:
    try:
        architecture = GPTConfig(**config["model"])
    except (KeyError, TypeError) as e:
        raise UserError(f"{path}/config.json describes no model that this version knows ({first_line(e)})") from e
    except UserError as e:
        raise UserError(f"{path}/config.json: {e}") from e
    require(architecture.vocab_size == tokenizer.n_vocab, f"{path}: vocabulary and model differ in size")
    return architecture


def load_run(path: Path, device: torch.device) -> Run:
    """A finished run, its models on the device in eval mode. UserError if anything is missing or does not fit."""
    path = Path(path)
    config = read_config(path)
    tokenizer = load_tokenizer(path / "vocab.tiktoken")
    gpt = _architecture(path, config, tokenizer)
    stage = config.get("stage")
    require(stage in ("sft", "dpo"), f"{path}/config.json: stage must be sft or dpo, got {stage!r}")
    model = _load_model(gpt, path / "model.safetensors", device)
    if stage == "sft":
        return Run(path, config, tokenizer, model, None)
    dpo = config.get("dpo")
    beta = dpo.get("beta") if isinstance(dpo, dict) else None
    good = isinstance(beta, (int, float)) and 0 < beta < math.inf
    require(good, f"{path}/config.json: dpo.beta must be positive and finite, got {beta!r}")
    return Run(path, config, tokenizer, model, _load_model(gpt, path / "reference.safetensors", device), beta)
