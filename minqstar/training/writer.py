"""A run folder is made, or made anew, by one process at a time.

A stop at any moment leaves the old run, the new one, or one to resume. `checkpoint` lists the folder's files.
"""

import json
import os
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path

from torch import Tensor

from minqstar.errors import UserError, first_line, require
from minqstar.files import aside, asides, discard, in_words, owner, replace_file, replace_folder, sync
from minqstar.lm.model import GPT
from minqstar.lm.pretrained import is_pretrained
from minqstar.training.checkpoint import (
    STATE,
    Run,
    as_json,
    differences,
    load_state,
    read_config,
    save_tensors,
    sealed,
    unchanged,
)
from minqstar.training.scoring import tensors_hash


def otherwise(old: dict, new: dict, source: str) -> str:
    """How a run of the config `old` was begun or trained, if not as `new` says; `source` names its data."""
    odd = differences(old, new)
    if any(words.startswith("world: ") for words in odd):
        return "on another world than today's: its scenarios, eps or rewards were changed since"
    if odd and all(words.startswith("data: ") for words in odd):
        hashes = odd[0].removeprefix("data: ")
        return f"on other data than {source} holds now, or another version read it (sha256 {hashes})"
    return f"otherwise ({'; '.join(odd[:3])})" if odd else ""


def beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)


def unfinished(path: Path) -> bool:
    """Whether a run was begun there that --resume goes on with."""
    return (beside(path, ".part") / STATE).exists()


def claim(path: Path, overwrite: bool, resume: bool, first: Path | None = None, extend: int = 0):
    """UserError if a finished run, an unfinished one or something else would be lost by making the run `path`.

    `first` is a run that comes before it, and may be unfinished. To `extend` a run it must be there.
    """
    path, part = Path(path), beside(Path(path), ".part")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    good = there.is_dir() and os.access(there, os.W_OK)
    require(good, f"cannot write a run in {path.parent}: {there} is no folder that can be written to")
    for folder in (path, part):
        require(not folder.is_symlink(), f"{folder} is a link, and no run is made through one; give another --runs")
        empty = folder.is_dir() and not any(folder.iterdir())
        ours = not folder.exists() or empty or (folder / "config.json").is_file()
        require(ours, f"{folder} exists and is not a run; move it away, or choose another folder with --runs")
    begun = unfinished(path)
    discards = f"{part} is an unfinished run; continue it with --resume, or discard it with --overwrite"
    require(overwrite or resume or not begun, discards)
    goes_on = first is not None and unfinished(first)
    how = f"--overwrite --resume, which goes on with {first}.part," if goes_on else "--overwrite"
    whole = not extend or (path / STATE).is_file()
    require(whole, f"{path} is no finished run with its training state; --extend goes on with one")
    free = overwrite or not path.exists() or (resume and begun) or (extend and not resume)
    require(free, f"{path} exists; replace it with {how} or choose another folder with --runs")


def abandon(path: Path):
    """Discard what was begun of a run."""
    with owner(path):
        claim(path, overwrite=True, resume=False)
        if beside(path, ".part").exists():
            discard(beside(path, ".part"), path)


class RunWriter:
    """Makes a run folder: use it in a `with`, write into `folder`; a clean exit gives the folder its name.

    `config` is what decides the run, `source` names its data. With `resume` an unfinished run of the same config is
    continued: `resumed` is then what `save_state` stored last, (tensors, values). With `extend` steps a finished run
    is. UserError if the config is another, if another process makes this run, or if a run that is there would be lost.
    """

    def __init__(self, path: Path, config: dict, overwrite=False, resume=False, source: str = "the data", extend=0):
        self.path, self.config, self.source = Path(path), config, source
        self.overwrite, self.resume, self.extend = overwrite, resume, extend
        self.folder = beside(self.path, ".part")
        self.resumed: tuple[dict[str, Tensor], dict] | None = None

    @property
    def go_on(self) -> str:
        """The options that continue this run when it was stopped."""
        return "--overwrite --resume" if self.overwrite else "--resume"

    @property
    def more(self) -> int:
        """Steps by which the run was or is to be extended, all in all."""
        return sum(self.config.get("extended", []))

    def __enter__(self) -> "RunWriter":
        with ExitStack() as owned:
            owned.enter_context(owner(self.path))
            claim(self.path, self.overwrite, self.resume, extend=self.extend)
            with in_words(f"cannot write a run in {self.path.parent}"):
                self._lengthen()
                if self.resume and unfinished(self.path):
                    self._go_on()
                else:
                    self._begin()
                self._metrics = open(self.folder / "metrics.jsonl", "a", buffering=1, encoding="utf-8")
            self._owned = owned.pop_all()
        return self

    def _begin(self):
        if self.folder.exists():
            discard(self.folder, self.path)
        new = aside(self.path, "new")
        new.mkdir()
        (new / "config.json").write_bytes(as_json(self.config))
        new.rename(self.folder)
        if self.extend:
            for file in (*self.path.glob("metrics.jsonl"), *self.path.glob("reference.*")):
                shutil.copyfile(file, self.folder / file.name)
            self.resumed = load_state(self.path / STATE)
            self._keep_lines(self.resumed[1]["step"])
            self.save_state(*self.resumed)

    def _lengthen(self):
        """The config says by how many steps a finished run is extended, each time that it is."""
        if self.extend:
            before = read_config(self.path)
            odd = otherwise(before, self.config, self.source)
            require(not odd, f"{self.path} was trained {odd}; to extend it, repeat all of its options")
            self.config = {**self.config, "extended": [*before.get("extended", []), self.extend]}

    def _go_on(self):
        self.resumed = load_state(self.folder / STATE)
        before, now = ({"extended": []} | config for config in (self.resumed[1]["config"], self.config))
        odd = otherwise(before, now, self.source)
        words = f"{self.folder} was begun {odd}; repeat all of its options, or discard it with --overwrite"
        require(not odd, f"{words} alone" if self.overwrite else words)
        self._keep_lines(self.resumed[1]["step"])

    def _keep_lines(self, count: int):
        """Drop from the log what came after the last save."""
        log = self.folder / "metrics.jsonl"
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        require(len(lines) >= count, f"{log} has lost lines; start anew with --overwrite")
        replace_file(log, lambda new: new.write_bytes(b"".join(lines[:count])))

    def history(self) -> list[dict]:
        """What was logged so far."""
        log = self.folder / "metrics.jsonl"
        try:
            lines = [json.loads(line) for line in log.read_bytes().splitlines()]
            require(all(isinstance(m, dict) and m.get("step") == i for i, m in enumerate(lines)), "a step is missing")
            return lines
        except (ValueError, RecursionError) as e:
            raise UserError(f"{log} is damaged ({first_line(e)}); start anew with --overwrite") from e

    def log(self, metrics: dict):
        with in_words(f"cannot write {self.folder / 'metrics.jsonl'}"):
            self._metrics.write(json.dumps(metrics) + "\n")

    def save_state(self, tensors: dict[str, Tensor], values: dict):
        """Make this the point from which --resume goes on; `values` name the `step`."""
        with in_words(f"cannot write {self.folder / 'metrics.jsonl'}"):
            sync(self.folder / "metrics.jsonl")
        values = {**values, "config": self.config, "sha256": tensors_hash(tensors)}
        save_tensors(tensors, self.folder / STATE, values)

    def write(self, name: str, content: bytes):
        replace_file(self.folder / name, lambda new: new.write_bytes(content))

    def save_model(self, model: GPT):
        save_tensors(model.state_dict(), self.folder / "model.safetensors")

    def keep_reference(self, run: Run):
        """Bring in the weights of the model that is the reference: of a run by hard link where the file system can."""
        source, target = (run.path / "model.safetensors").resolve(), self.folder / "reference.safetensors"
        if is_pretrained(run.path):  # other names, other shapes
            save_tensors(run.model.state_dict(), target)
            return

        def bring(new: Path):
            try:
                os.link(source, new)
            except OSError:
                shutil.copyfile(source, new)

        replace_file(target, bring)
        unchanged(run, "model.safetensors", target)

    def __exit__(self, kind, *_):
        with self._owned:
            if kind is None:
                with in_words(f"cannot finish {self.path}, go on with {self.go_on}"):
                    self._metrics.close()
                    self._finish()
            with suppress(OSError):
                self._metrics.close()
                if self.folder.exists() and not (self.folder / STATE).exists():
                    discard(self.folder, self.path)

    def _finish(self):
        for left in asides(self.folder, ".+", "file"):  # of a process that was killed
            left.unlink()
        self.write("config.json", as_json(sealed(self.config, self.folder)))
        sync(self.folder / "metrics.jsonl")
        sync(self.folder)
        replace_folder(self.folder, self.path)
