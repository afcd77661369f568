"""The n-th write, sync, rename or link fails, or is the last thing before a kill, for every n.

Afterwards the old run, the new one, or one to resume is there, whole; and one command goes on to the very bytes that
an undisturbed one makes.
"""

import builtins
import errno
import hashlib
import io
import itertools
import os
import re
import shutil
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from test_files import windows  # noqa: F401, a fixture

from minqstar import pipeline
from minqstar.console import Console
from minqstar.errors import Stopped, UserError
from minqstar.files import owner
from minqstar.lm.model import GPTConfig
from minqstar.lm.tokenizer import Tokenizer
from minqstar.pipeline import Data, Options, main
from minqstar.training import session
from minqstar.training.checkpoint import load_state, read_config, sealed
from minqstar.training.data import tokenize
from minqstar.training.scoring import tensors_hash
from minqstar.training.session import Session
from minqstar.training.trainer import DPOConfig, SFTConfig, Trainer
from minqstar.training.writer import RunWriter

OPERATIONS = "fsync write rename replace link unlink mkdir rmdir".split()
CASES: Counter[str] = Counter()  # operations that failed or were the last, by scenario; printed at the end


class Writing:
    """A file whose writes are operations too."""

    def __init__(self, file, before):
        self.file, self.before = file, before

    def write(self, data):
        half = len(data) // 2

        def begin():
            self.file.write(data[:half])
            self.file.flush()

        done = self.before("write", begin)
        self.file.write(data[half:] if done else data)
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@contextmanager
def shim(before):
    """Inside, `before(name, begin)` is called ahead of every operation; `begin` writes one half of a write.

    It returns whether it called `begin`.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            real = getattr(os, name)

            def operation(*args, _name=name, _real=real, **kwargs):
                before(_name, None)
                return _real(*args, **kwargs)

            patch.setattr(os, name, operation)
        real_open = io.open

        def opened(file, mode="r", *args, **kwargs):
            found = real_open(file, mode, *args, **kwargs)
            return Writing(found, before) if set(mode) & set("wax+") and not isinstance(file, int) else found

        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        yield


ROWS = [{"prompt": f"Say {i}.", "chosen": f" {i}!", "rejected": f" {i + 1}?"} for i in range(4)]
BYTES = Tokenizer({bytes([b]): b for b in range(256)})


def options(**changes) -> Options:
    """Two steps of each stage, of a model of one layer."""
    steps = {"min_steps": 2, "epochs": 1e-6, "batch_tokens": 64, "row_length": 32}
    model = GPTConfig(vocab_size=BYTES.n_vocab, n_layer=1, n_embd=32, block_size=32)
    stages = {"sft": SFTConfig(**steps), "dpo": DPOConfig(**steps)}
    return Options(runs=Path("runs"), model=model, save_every=1, **stages, **changes)


class Steps(Trainer):
    """Adds one to every weight at each step: what a step computes would take most of the time."""

    def state_dict(self):
        return {name: weight.clone() for name, weight in self.model.state_dict().items()}, {"step": self.step}

    def load_state_dict(self, tensors, values):
        self.model.load_state_dict(tensors)
        self.step = values["step"]

    def run(self):
        while self.step < self.steps:
            for weight in self.model.parameters():
                weight.data += 1
            self.step += 1
            yield {"step": self.step - 1, "loss": 1.0, "tokens_seen": 1, "seconds": 1.0}


@pytest.fixture(params=["", pytest.param("trained", marks=pytest.mark.slow)])
def small(monkeypatch, tmp_path, request):
    """Commands on four rows of text that say nothing, with a trainer in name only, in the long form with a true one."""

    def begin(options):
        silent = Session(BYTES, "cpu", "float32", save_every=options.save_every)
        silent.console = Console(quiet=True)
        return options, silent

    monkeypatch.setattr(pipeline, "begin", begin)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time would go to it
    monkeypatch.setattr(Session, "progress", lambda *_: nullcontext(lambda *_, **__: None))
    groups = lambda session: tokenize(ROWS, session.tokenizer, 64)  # noqa: E731
    monkeypatch.setattr(pipeline, "read_data", lambda _, session: Data(groups(session), groups(session), []))
    if not request.param:
        monkeypatch.setattr(pipeline, "Trainer", Steps)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def bits(run: Path) -> str:
    """A hash of a whole run: its config, which holds the hashes of its files, and the tensors of its state."""
    config, state = read_config(run), load_state(run / "state.safetensors")[0]
    rest = {name: value for name, value in config.items() if name not in ("files", "sha256")}
    assert sealed(rest, run) == config
    return config["sha256"] + tensors_hash(state)


def whole() -> dict[str, str]:
    """The runs that are there once the next owner has put right what was left half done; each whole."""
    for stage in ("sft", "dpo"):
        with owner(Path("runs") / stage):
            pass
    return {stage: bits(Path("runs") / stage) for stage in ("sft", "dpo") if (Path("runs") / stage).exists()}


def tree() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


def stopped(options: Options, saves: int):
    """The command, interrupted after so many saves: SFT makes two, DPO two."""
    made = itertools.count(1)
    real = RunWriter.save_state

    def save_and_stop(*args):
        real(*args)
        if next(made) == saves:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunWriter, "save_state", save_and_stop)
        main(options)


SCENARIOS = {  # what is there before, and the command that is disturbed
    "a short run": (lambda: None, options()),
    "an overwrite": (  # of runs beside which there is an unfinished one
        lambda: [main(options(seed=1)), stopped(options(overwrite=True, seed=1), 1)],
        options(overwrite=True),
    ),
    "a resume": (lambda: stopped(options(), 3), options(resume=True)),
    "a resume of SFT": (lambda: stopped(options(), 1), options(resume=True)),
    "a resume of an overwrite": (
        lambda: [main(options(seed=1)), stopped(options(overwrite=True), 1)],
        options(overwrite=True, resume=True),
    ),
}
of_all = pytest.mark.parametrize(
    "scenario", [name if " of " not in name else pytest.param(name, marks=pytest.mark.slow) for name in SCENARIOS]
)


def prepare(name: str) -> tuple[Options, dict[str, bytes], list[dict[str, str]]]:
    """The command, the files that it finds, and which runs may be there afterwards: the old ones, and the new ones."""
    main(options())
    new = whole()
    shutil.rmtree("runs")
    before, disturbed = SCENARIOS[name]
    before()
    return disturbed, tree(), [whole(), new]


def alike(files: dict[str, bytes]) -> str:
    """The same for states that differ only in what is thrown away, or in the digits of its name."""
    kept = {}
    for name, content in files.items():
        name = re.sub(r"\.\d+-[0-9a-f]{8}\.", "..", name)
        thrown = re.match(r".*\.\.(file|gone|new)|.*\.lock", name)
        kept[thrown[0] if thrown else name] = b"" if thrown else content
    return hashlib.sha256(repr(sorted(kept.items())).encode()).hexdigest()


def restore(files: dict[str, bytes]):
    shutil.rmtree("runs", ignore_errors=True)
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def check(old: dict[str, str], new: dict[str, str]):
    """What is there is whole, nothing old is lost, and the command that the next one names goes on to the new runs."""
    there = whole()
    assert there.keys() >= old.keys() and all(there[stage] in (old.get(stage), new[stage]) for stage in there)
    said, how = [], ""
    while how is not None:
        assert how not in said, f"in a circle: {said}"
        said.append(how)
        try:
            main(options(overwrite="--overwrite" in how, resume="--resume" in how))
            how = None
        except UserError as e:
            assert "\n" not in str(e)
            how = next(
                flags for flags in re.findall(r"--overwrite --resume|--resume|--overwrite", str(e)) if flags != how
            )
    assert len(said) < 4
    assert whole() == new
    assert sorted(path.name for path in Path("runs").iterdir()) == ["dpo", "sft"]
    assert not [path for path in Path("runs").rglob("*") if path.name.startswith(".")]


@of_all
def test_a_kill_after_any_operation_leaves_what_can_be_gone_on_with(small, scenario):
    """What a kill leaves is what is there between two operations, and in the middle of a write."""
    disturbed, files, (old, new) = prepare(scenario)
    states = {}

    def look():
        there = tree()
        states.setdefault(alike(there), there)

    def before(name: str, begin) -> bool:
        CASES[f"kills, {scenario}"] += 1
        look()
        if begin:
            begin()
            look()
        return begin is not None

    restore(files)
    with shim(before):
        main(disturbed)
    look()
    assert whole() == new and len(states) > 20
    for state in states.values():
        restore(state)
        check(old, new)


class Failing:
    """Let the n-th operation fail, a write in its middle; `came` says whether there were so many."""

    def __init__(self, n: int, number: int):
        self.left, self.number, self.came = n, number, False

    def __call__(self, name: str, begin) -> bool:
        self.left -= 1
        if self.left == 0:
            self.came = True
            if begin:
                begin()
            raise OSError(self.number, os.strerror(self.number))
        return False


@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow)])
@of_all
def test_an_operation_that_fails_leaves_what_can_be_gone_on_with(small, scenario, number):
    disturbed, files, (old, new) = prepare(scenario)
    checked = set()
    for n in itertools.count(1):
        restore(files)
        failing = Failing(n, number)
        with shim(failing):
            try:
                main(disturbed)
            except UserError as e:
                assert "\n" not in str(e) and os.strerror(number) in str(e)
        if not failing.came:
            break
        CASES[f"{errno.errorcode[number]}, {scenario}"] += 1
        if (there := alike(tree())) not in checked:
            checked.add(there)
            check(old, new)
    assert n > 20


@pytest.mark.usefixtures("small", "windows")
def test_runs_are_made_where_windows_refuses_what_it_refuses():
    """A shim refuses it: to open folders, to sync what is only read, to rename or remove what is open or mapped."""
    for before, command in SCENARIOS.values():
        before()
        main(command)
        assert whole().keys() == {"sft", "dpo"}
        names = {path.name for path in Path("runs").iterdir()} | {path.name for path in Path().iterdir()}
        assert names - {".runs.lock", ".sft.lock", ".dpo.lock"} == {"runs", "sft", "dpo"}  # open files are not removed
        shutil.rmtree("runs")


def test_the_message_of_a_stop_names_the_command_that_goes_on(small, monkeypatch):
    """An overwrite stopped during SFT went in a circle once: each of three messages named the next."""
    main(options())
    new = whole()
    main(options(overwrite=True, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(session, "signals_wait", lambda: nullcontext([15]))
        with pytest.raises(Stopped, match="continue with --overwrite --resume"):
            main(options(overwrite=True))
    with pytest.raises(UserError, match="dpo exists; replace it with --overwrite --resume, which goes on with"):
        main(options(resume=True))
    main(options(overwrite=True, resume=True))
    assert whole() == new


def test_a_resume_says_how_the_reference_is_another(small, monkeypatch):
    """The DPO run is unfinished and its SFT run finished, with another seed: nothing is lost, and the seed is named."""
    main(options(stage="sft"))
    with monkeypatch.context() as patch:
        patch.setattr(session, "signals_wait", lambda: nullcontext([15]))
        with pytest.raises(Stopped):
            main(options())
    with pytest.raises(UserError, match=r"sft was trained otherwise .*seed: 0 -> 1.*; use --overwrite"):
        main(options(resume=True, seed=1))
    main(options(resume=True))
    assert whole().keys() == {"sft", "dpo"}


def test_data_that_stands_in_a_run_to_be_made_is_refused():
    """The run would be replaced, and the data with it."""
    for run in ("sft", "dpo"):
        with pytest.raises(UserError, match="is a file of a run that would be made anew; copy it elsewhere first"):
            Options(data=Path(f"runs/mine/{run}/held_out.jsonl"), runs=Path("runs/mine"))
    Options(data=Path("runs/mine/dpo/held_out.jsonl"), runs=Path("runs/other"))
