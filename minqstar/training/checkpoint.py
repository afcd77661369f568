"""A run folder: weights, configuration, vocabulary, logs. It holds all that is needed to use it.

    model.safetensors        the policy
    reference.safetensors    the reference (DPO runs): the same bytes as the SFT run's model
    adapter.safetensors      of a run with LoRA the adapter alone, which `model` has merged
    vocab.tiktoken           the vocabulary; or tokenizer.json and its like, where training began from others' models
    config.json              architecture, options, hashes: of the data, the reference, itself and the files above
    metrics.jsonl            one object a step
    summary.json             the closing figures
    held_out.jsonl           the rows that they were measured on
    state.safetensors        weights, moments, random state and counters of the last save: what --resume reads

A run NAME is made in the folder NAME.part and takes its name when it is complete: a folder with the run's name is a
finished run, and NAME.part one that can be resumed. One process at a time owns both (`files.owner`), and a kill at
any moment leaves the old run, the new one, or one to resume. Loading never unpickles.
"""

import hashlib
import json
import math
import re
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minqstar.errors import UserError, first_line, fitting, require
from minqstar.files import asides, file_hash, replace_file
from minqstar.lm.borrowed import CONFIG, ENDS, TEMPLATE, TOKENIZER, load_borrowed
from minqstar.lm.model import GPT, GPTConfig
from minqstar.lm.pretrained import is_pretrained, load_pretrained, pretrained_config
from minqstar.lm.tokenizer import DEFAULT_VOCABULARY, Tokenizer, Tokens, load_tokenizer
from minqstar.training.data import reasons_of, tokenize
from minqstar.training.formats import Rows, as_pairs
from minqstar.training.groups import rows_of
from minqstar.training.scoring import tensors_hash

STATE = "state.safetensors"
VOCABULARY = DEFAULT_VOCABULARY.name
WEIGHTS = ("model.safetensors", "reference.safetensors", "adapter.safetensors")
HELD = (*WEIGHTS, VOCABULARY, TOKENIZER, CONFIG, TEMPLATE, ENDS, "held_out.jsonl")  # files whose hash is kept


@dataclass
class Run:
    """A finished run, loaded."""

    path: Path
    config: dict
    tokenizer: Tokens
    model: GPT
    reference: GPT | None  # None for an SFT run
    beta: float = 1.0  # reward units a nat; of an SFT run, which has no implicit rewards, 1
    files: dict[str, str] = field(default_factory=dict)  # sha256 of the files of HELD, where config.json knows them


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Where two nested configurations differ, as `name: old -> new`. A run that names no `world` may be of any."""
    found = []
    for key in (key for key in new if key not in ("path", "file") and (key in old or key != "world")):
        a, b = old.get(key), new[key]
        b = list(b) if isinstance(b, tuple) else b  # as JSON has it
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {str(a)[:12]} -> {str(b)[:12]}")
    return found


def as_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def config_hash(config: dict) -> str:
    """sha256 of a config but for the hash that it holds."""
    rest = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(config: dict, folder: Path) -> dict:
    """The config of a run that is complete, with the hashes of its files and of itself: `load_run` holds it to them."""
    files = {name: file_hash(folder / name) for name in HELD if (folder / name).exists()}
    config = {**config, "files": files}
    return {**config, "sha256": config_hash(config)}


def save_tensors(tensors: dict[str, Tensor], path: Path, values: dict | None = None):
    """A safetensors file, plain values as JSON in its header."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(new: Path):
        new.touch()
        mode = new.stat().st_mode
        try:
            save_file(whole, new, {"values": json.dumps(values)})
        except SafetensorError as e:
            raise OSError(first_line(e)) from e
        new.chmod(mode)  # of what safetensors writes only the owner reads

    replace_file(path, write)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """Tensors and values that `save_tensors` stored; UserError if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return load_file(path), json.loads((file.metadata() or {}).get("values", "null"))
    except (OSError, SafetensorError, ValueError, RecursionError) as e:
        raise UserError(f"cannot load {path}: {first_line(e)}") from e


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and values that `save_state` stored; UserError if the file is damaged."""
    try:
        tensors, values = load_tensors(path)
        whole = isinstance(values, dict) and type(values.get("step")) is int and isinstance(values.get("config"), dict)
        require(whole and values["step"] >= 0, "it names no step or no config")
        known = values.get("sha256", tensors_hash(tensors))
        require(known == tensors_hash(tensors), "its tensors are not those that were saved")
        return tensors, values
    except ValueError as e:
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


def load_weights(config: GPTConfig, file: Path, device: torch.device) -> GPT:
    """The model whose weights a file of a run holds, in eval mode. UserError if they are not those of `config`."""
    try:
        weights = load_file(file)
    except (OSError, SafetensorError, ValueError, RuntimeError) as e:  # torch's own word for a file that is gone
        raise UserError(f"cannot load {file}: {first_line(e)}") from e
    with torch.device("meta"):  # compared before memory is asked for
        expected = GPT(config).state_dict()
    try:
        fitting(weights, expected)
    except ValueError as e:
        raise UserError(f"{file} does not fit its config.json: {e}") from e
    model = GPT(config)
    model.load_state_dict(weights)
    return model.to(device).eval()


def load_vocabulary(folder: Path) -> Tokens:
    """The tokenizer of a run, or of a Hugging Face folder."""
    return load_borrowed(folder) if (folder / TOKENIZER).is_file() else load_tokenizer(folder / VOCABULARY)


def described(path: Path) -> tuple[Tokens, GPTConfig]:
    """The tokenizer and the architecture of a run or a Hugging Face folder, without its weights."""
    if is_pretrained(path):
        return load_borrowed(path), pretrained_config(path)
    config, tokenizer = read_config(path), load_vocabulary(path)
    if config.get("chat"):
        tokenizer.start_chat()
    return tokenizer, _architecture(path, config, tokenizer)


def _architecture(path: Path, config: dict, tokenizer: Tokens) -> GPTConfig:
    try:
        architecture = GPTConfig(**config["model"])
    except (KeyError, TypeError) as e:
        raise UserError(f"{path}/config.json describes no model that this version knows ({first_line(e)})") from e
    except UserError as e:
        raise UserError(f"{path}/config.json: {e}") from e
    size, known = architecture.vocab_size, tokenizer.n_vocab
    fits = size == known or (size > known and not isinstance(tokenizer, Tokenizer))  # others' models have ids to spare
    require(fits, f"{path}: vocabulary and model differ in size")
    return architecture


def _checked_files(path: Path, config: dict) -> dict[str, str]:
    """The files' hashes. UserError unless config and files are those that the run was finished with."""
    files = config.get("files")
    if files is None and "sha256" not in config:
        warnings.warn(f"{path} was made before runs knew the hashes of their files: nothing shows damage", stacklevel=2)
        return {}
    require(
        isinstance(files, dict) and config_hash(config) == config.get("sha256"),
        f"{path}/config.json is not what the run was finished with; bring it back, or train anew",
    )
    for name, known in files.items():
        try:
            found = file_hash(path / name)
        except OSError as e:
            raise UserError(f"cannot load {path / name}: {e.strerror}") from e
        require(found == known, f"{path / name} is not what the run was finished with; bring it back, or train anew")
    return files


def _load_run(path: Path, device: torch.device) -> Run:
    config = read_config(path)
    files = _checked_files(path, config)
    tokenizer, gpt = described(path)
    stage = config.get("stage")
    require(stage in ("sft", "dpo"), f"{path}/config.json: stage must be sft or dpo, got {stage!r}")
    model = load_weights(gpt, path / "model.safetensors", device)
    if stage == "sft":
        return Run(path, config, tokenizer, model, None, files=files)
    dpo, origin = config.get("dpo"), config.get("reference", {})
    beta = dpo.get("beta") if isinstance(dpo, dict) else None
    good = type(beta) in (int, float) and 1e-6 <= beta <= 1e6
    require(good, f"{path}/config.json: dpo.beta must be a number between 1e-6 and 1e6, got {beta!r:.40}")
    require(isinstance(origin, dict), f"{path}/config.json: reference must be an object, got {origin!r}")
    return Run(path, config, tokenizer, model, load_weights(gpt, path / "reference.safetensors", device), beta, files)


def _moment(path: Path):
    """What tells a run from one that replaces it: None where there is none, NaN, which equals nothing, in between."""
    try:
        of = path.stat()
        return of.st_dev, of.st_ino, of.st_ctime_ns
    except OSError:
        between = path.parent.is_dir() and asides(path.parent, re.escape(path.name), "old")
        return math.nan if between else None


def load_run(path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Run:
    """A finished run, its models on the device in eval mode. UserError if anything is missing or does not fit.

    All of it is of one moment: where the run is replaced meanwhile, it is read again, for some seconds. A Hugging Face
    folder is a run without a reference, its weights in `dtype`; those of a run are float32.
    """
    path = Path(path)
    if is_pretrained(path):
        tokenizer, model = load_borrowed(path), load_pretrained(path, device, dtype)
        fits = tokenizer.n_vocab <= model.config.vocab_size
        require(fits, f"{path}: the tokenizer has {tokenizer.n_vocab} tokens, the model {model.config.vocab_size}")
        return Run(path, {}, tokenizer, model, None)
    patience = time.monotonic() + 5
    while time.monotonic() < patience:
        before = _moment(path)
        try:
            run = _load_run(path, device)
        except UserError:
            if before == _moment(path):
                raise
        else:
            if before == _moment(path):
                return run
    how = "wait, or repeat the command that replaces it with --overwrite --resume"
    raise UserError(f"{path} is being replaced, or was when that was stopped: {how}")


def unchanged(run_: Run, name: str, file: Path):
    """UserError unless a file is what the run's file of that name was when the run was loaded."""
    same = file_hash(file) == run_.files.get(name, file_hash(file))
    require(same, f"{run_.path} was replaced after it was read; repeat the command")


def held_out_rows(run_: Run, data: Path | None, instead: str = "other rows with --data") -> Iterable[dict]:
    """The rows that the run held out, or those of `data`, as they stand; UserError if it held out none."""
    if data is not None:
        return Rows(data)
    file = run_.path / "held_out.jsonl"
    require(not is_pretrained(run_.path), f"{run_.path} has no held-out rows; give {instead}")
    none = file.is_file() and not file.stat().st_size
    require(not none, f"{run_.path} held out no rows when it was trained; give {instead}")
    rows = list(Rows(file))
    unchanged(run_, "held_out.jsonl", file)
    return rows


def held_out(
    run_: Run, data: Path | None = None, most: int | None = None, instead: str = "other rows with --data"
) -> list[dict]:
    """Of these rows those that the run can use, among the first `most`; a warning counts the others."""
    rows = list(islice(held_out_rows(run_, data, instead), most))
    groups, skipped = tokenize(rows, run_.tokenizer, run_.model.config.block_size)
    file = data or run_.path / "held_out.jsonl"
    words = f"{file}: {skipped.total()} of {len(rows)} rows cannot be used: {reasons_of(skipped)}"
    require(bool(groups), words)
    if skipped:
        warnings.warn(words, stacklevel=1)
    return as_pairs(rows_of(groups, rows))
