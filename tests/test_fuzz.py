"""Whatever bytes or words come in: an answer or one clear line, never a traceback, never a hang."""

import json
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import command, random_model, reseal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from minqstar import pipeline
from minqstar.errors import UserError
from minqstar.evaluate import evaluate
from minqstar.training.checkpoint import load_run
from minqstar.training.data import Group, PackedData, tokenize
from minqstar.training.formats import Rows
from minqstar.training.session import restore
from minqstar.training.trainer import SFT, SFTConfig, Trainer
from minqstar.training.writer import RunWriter

CASES: Counter[str] = Counter()  # how many ran, by test; printed at the end
CPU = torch.device("cpu")


def often(cases: int):
    """The test in the suite's length, and 25 times as long under `-m slow`."""
    return pytest.mark.parametrize("cases", [cases, pytest.param(25 * cases, marks=pytest.mark.slow)])


def fuzz(name: str, cases: int, strategy: st.SearchStrategy, check):
    """Run `check` on drawn cases, ten seconds at most for each; only a UserError of one line may come out."""

    def too_long(*_):
        raise TimeoutError("a case hangs")

    @settings(max_examples=cases, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def one(case):
        CASES[name] += 1
        signal.alarm(10)
        try:
            check(case)
        except UserError as e:
            assert "\n" not in str(e) and str(e).strip()
        finally:
            signal.alarm(0)

    before = signal.signal(signal.SIGALRM, too_long)
    try:
        one()
    finally:
        signal.signal(signal.SIGALRM, before)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """Bytes cut, flipped, doubled, or something else altogether."""
    data = bytearray(whole)
    match draw(st.sampled_from(["cut", "flip", "insert", "other"])):
        case "cut":
            data = data[: draw(st.integers(0, len(data)))]
        case "flip":
            for _ in range(draw(st.integers(1, 4))):
                data[draw(st.integers(0, min(len(data), 2000) - 1))] = draw(st.integers(0, 255))
        case "insert":
            at = draw(st.integers(0, min(len(data), 2000)))
            data[at:at] = draw(st.binary(max_size=20))
        case "other":
            data = draw(st.binary(max_size=200))
    return bytes(data)


texts = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates too
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["prompt", "chosen", "rejected", "completion"])
lines = st.one_of(
    st.dictionaries(names, texts | json_values, max_size=4).map(json.dumps),
    st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}).map(json.dumps),
    json_values.map(json.dumps),
    st.integers(1, 100_000).map(lambda n: "[" * n),
    st.integers(1, 100_000).map(lambda n: '{"prompt": ' + "7" * n + "}"),
    st.sampled_from(["", " ", "\x00", "NaN", "\ufeff{}", '{"prompt": 1e999}', '{"prompt": "\\ud800"}']),
)


@often(1300)
def test_jsonl(cases, tmp_path, tokenizer):
    file = tmp_path / "f.jsonl"

    def check(content: bytes):
        file.write_bytes(content)
        groups, skipped = tokenize(Rows(file), tokenizer, 64)
        assert groups or skipped
        if groups:
            PackedData(groups, tokenizer.pad, 64).batch(torch.arange(1).numpy())

    whole = "\n".join(json.dumps({"prompt": p, "chosen": "c", "rejected": "r"}) for p in "abc").encode()
    contents = st.lists(lines, max_size=4).map(lambda some: "\n".join(some).encode("utf-8", "surrogatepass"))
    fuzz("jsonl", cases, contents | damaged(whole), check)


@often(400)
def test_run_folder(cases, run_folder):
    files = {p.name: p.read_bytes() for p in run_folder.iterdir() if p.name != "metrics.jsonl"}
    config = json.loads(files["config.json"])
    changes = st.dictionaries(st.sampled_from(list(config["model"])), json_values, min_size=1, max_size=2)
    configs = changes.map(lambda change: json.dumps(config | {"model": config["model"] | change}).encode())
    top = st.dictionaries(st.sampled_from(["stage", "model", "dpo"]), json_values, min_size=1)
    configs |= top.map(lambda change: json.dumps(config | change).encode()) | json_values.map(
        lambda value: json.dumps(value).encode()
    )
    spoilt = st.sampled_from(sorted(files)).flatmap(lambda name: st.tuples(st.just(name), damaged(files[name])))

    def check(case: tuple[str, bytes]):
        name, content = case
        target = run_folder / name
        target.unlink()  # the two stages share an inode
        target.write_bytes(content)
        try:
            with suppress(ValueError, RecursionError, TypeError, AttributeError):  # a config that is no config
                reseal(run_folder)
            run = load_run(run_folder, CPU)
            if run.reference:
                evaluate(run, [{"prompt": "Say 1.", "chosen": " 1", "rejected": " 2"}])
        finally:
            target.write_bytes(files[name])
            (run_folder / "config.json").write_bytes(files["config.json"])

    fuzz("run folder", cases, spoilt | st.tuples(st.just("config.json"), configs), check)


@often(150)
def test_training_state(cases, tmp_path):
    data = PackedData([Group([1, 2], ([3, 21],)) for _ in range(8)], 22, 16)

    def fresh() -> Trainer:
        return Trainer(random_model(), data, SFTConfig(min_steps=1, batch_tokens=32), SFT(), torch.float32, 0)

    trainer = fresh()
    next(trainer.run())
    with pytest.raises(KeyboardInterrupt), RunWriter(tmp_path / "sft", {"stage": "sft"}) as writer:
        writer.log({"step": 0})
        writer.save_state(*trainer.state_dict())
        raise KeyboardInterrupt
    state = tmp_path / "sft.part/state.safetensors"
    whole = state.read_bytes()
    session = SimpleNamespace(console=Console(quiet=True), compile=False)

    def check(content: bytes):
        state.write_bytes(content)
        with suppress(KeyboardInterrupt), RunWriter(tmp_path / "sft", {"stage": "sft"}, resume=True) as writer:
            restore(session, "SFT", fresh(), writer)
            raise KeyboardInterrupt

    fuzz("training state", cases, damaged(whole), check)


def ends_well(folder: Path, *args: str):
    """A command of the project ends with status 0, or in one line and status 1 or 2."""
    done = command(folder, *args)
    assert done.returncode in (0, 1, 2), done
    assert done.stderr.count("\n") == (1 if done.returncode else 0), done.stderr


values = st.one_of(
    st.sampled_from(["nan", "inf", "-1", "0", "1", "2", "0.5", "1e309", "9" * 30, "9" * 5000, "", "-", "--", "None"]),
    st.sampled_from(
        ["sft", "dpo", "greedy", "sample", "best-of-n", "cpu", "float32", "\udcff", "p💥", "../x", "x" * 300]
    ),
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=8),
)


def command_lines(flags: str) -> st.SearchStrategy[list[str]]:
    pairs = st.tuples(st.sampled_from(flags.split()), values).map(list)
    return st.lists(pairs | values.map(lambda v: [v]), max_size=3).map(
        lambda parts: [w for part in parts for w in part]
    )


TRAIN = """--stage --data --runs --overwrite --resume --save-every --vocabulary --held-out --seed --device --dtype
    --model.n-layer --model.n-head --model.n-embd --model.block-size --model.norm --model.bias --sft.epochs
    --sft.min-steps --sft.on --sft.batch-tokens --sft.row-length --sft.lr --sft.warmup --dpo.beta --dpo.clip
    --dpo.schedule --world.pairs --world.sft --world.seed --world.length-bias --help --nonsense"""
SAMPLE = """--search --prompt --prompt --prompt-file --index --data --temperature --n --rank-by --max-new-tokens --seed
    --device --json --help --nonsense"""


@often(80)
def test_train_command_line(cases, tmp_path, monkeypatch):
    """Everything up to the data: options, tokenizer, device, memory, folders."""

    def until_data(*_):
        raise UserError("so far, so good")

    monkeypatch.setattr(pipeline, "read_data", until_data)
    fuzz("train.py", cases, command_lines(TRAIN), lambda words: ends_well(tmp_path, "train.py", *words))


@often(150)
def test_sample_command_line(cases, tmp_path, run_folder):
    fixed = ["sample.py", "--run", str(run_folder), "--max-new-tokens", "8"]
    fuzz("sample.py", cases, command_lines(SAMPLE), lambda words: ends_well(tmp_path, *fixed, *words))
