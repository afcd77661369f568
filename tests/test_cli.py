"""Where the commands meet a person: what is typed, what is printed, and what ends them."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import typing

import pytest
import tomllib
from conftest import ENVIRONMENT, ROOT, SMALL, command, line_of
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from minqstar.cli import flags_of, parse
from minqstar.console import Console
from minqstar.errors import ending_signals, visible
from minqstar.training import session

MODULES = """pipeline lab.sample bellman evaluate world.tldr training.data lab.searches lab.credit lab.figures
lab.bench.compare lab.bench.levers""".split()
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def commands() -> dict[str, tuple[type, tuple]]:
    """Options and rules of every command."""
    found = {name: importlib.import_module(f"minqstar.{name}") for name in MODULES}
    return {name: (module.Options, getattr(module, "NEEDS", ())) for name, module in found.items()}


def all_flags(options: type) -> dict[str, type]:
    """The flags of a command and the types of their values, nested ones too."""
    kinds, found = typing.get_type_hints(options), {}
    for name, kind in kinds.items():
        if dataclasses.is_dataclass(kind):
            nested, of = flags_of(kind, f"--{name.replace('_', '-')}."), typing.get_type_hints(kind)
            found |= {flag: of[field] for field, flag in nested.items()}
        else:
            found[flags_of(options)[name]] = kind
    return found


def refusal(options: type, words: list[str], needs=()) -> str:
    """What is said when a command line is refused; "" if it is not."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            parse(options, "prog", words, needs)
        except SystemExit as e:
            assert e.code == 2 and said.getvalue().count("\n") == 1
    return said.getvalue()


# ---- what is typed


@pytest.mark.parametrize("name", MODULES)
def test_a_value_that_cannot_be_is_refused_under_the_name_that_was_typed(name):
    options, _ = commands()[name]
    required = ["prefs.jsonl", "--train-vocabulary", "v"] if name == "training.data" else []
    for flag, kind in all_flags(options).items():
        if kind in (int, float):
            said = refusal(options, [*required, flag, {int: "-1", float: "nan"}[kind]])
            assert not said or said.startswith(f"prog: {flag} ") or "vocabulary-size" in flag, said


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("pipeline", "--dpo.lrr 3", "Unrecognized options: --dpo.lrr, 3; perhaps you meant --dpo.lr ("),
        ("pipeline", "--lr 3", "; perhaps you meant --dpo.lr or --sft.lr ("),
        ("pipeline", "--model.n_layers=3", "; perhaps you meant --model.n-layer ("),
        ("lab.sample", "--beam.widht=3", "; perhaps you meant --beam.width ("),
        ("pipeline", "--data", "Missing value for argument '--data'"),
        ("pipeline", "--model.n-head 5", "--model.n-embd (128) must be a multiple of twice --model.n-head (5)"),
        ("pipeline", "--runs r --data " + "folder/" * 30 + "dpo.jsonl --seed x", "--seed: invalid literal"),
        ("training.data", "", "PATH"),
    ],
)
def test_a_mistake_is_one_line_that_helps(name, words, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert said.replace("PATH", "DATA") in refusal(commands()[name][0], words.split()).replace("PATH", "DATA")


def test_a_long_name_stays_whole():
    path = "folder/" * 40 + "dpo.jsonl"
    assert f"prog: {path} would put its runs" in refusal(commands()["pipeline"][0], ["--data", path])


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("pipeline", "--stage sft --dpo.lr 0.0018", "--dpo.lr needs --stage dpo"),
        ("pipeline", "--held_out=0.05", "--held-out needs --data"),
        ("pipeline", "--sft.on all", "--sft.on needs --data"),
        ("pipeline", "--data x --world.pairs 16000", "--world.pairs does not go with --data"),
        ("pipeline", "--model.vocab-size 1024", "--model.vocab-size does not go with --vocabulary"),
        ("lab.sample", "--search greedy --n 8", "--n needs --search best-of-n"),
        ("lab.sample", "--temperature 1.0", "--temperature needs --search sample or best-of-n"),
        ("lab.sample", "--search mcts --beam.width 5", "--beam.width needs --search beam"),
        ("lab.sample", "--search beam --mcts.no-advance", "--mcts.advance needs --search mcts"),
        ("lab.sample", "--step likelihood", "--step needs --search mcts"),
        ("lab.sample", "--proxy-alpha 1", "--proxy-alpha needs --proxy-base"),
        ("lab.sample", "--prompt x --prompt-file -", "--prompt-file does not go with --prompt"),
        ("lab.sample", "--prompt-file - --index 0", "--index does not go with --prompt-file"),
        ("lab.sample", "--json --no-table", "--table does not go with --json"),
        ("bellman", "--data x", "--data needs RUN or --policy"),
        ("bellman", "--pairs 64", "--pairs needs RUN or --policy"),
        ("lab.credit", "--json --table", "--table does not go with --json"),
        ("lab.bench.compare", "train --batch 1", "--batch needs decode or mcts"),
        ("world.tldr", "--vocabulary-size 1024", "--vocabulary-size needs --train-vocabulary"),
        ("world.tldr", "--data.pairs 16000 --train-vocabulary x", "--data.pairs does not go with --train-vocabulary"),
    ],
)
def test_an_option_without_use_is_refused_also_with_its_default(name, words, said):
    assert f"prog: {said} (see prog --help)" in refusal(commands()[name][0], words.split(), commands()[name][1])


def test_options_that_have_their_use_are_taken():
    for name, words in (
        ("pipeline", "--data x --held-out 0.1 --sft.on chosen --dpo.beta 1"),
        ("lab.sample", "--search best-of-n --n 4 --temperature 0.5 --rank-by judge --seed 3 --prompt=--beam.width"),
        ("bellman", "runs/dpo --pairs 3 --data x"),
        ("lab.bench.compare", "mcts --batch 2 --simulations 3"),
    ):
        assert refusal(commands()[name][0], words.split(), commands()[name][1]) == ""


def test_every_rule_names_options_that_are_there():
    for name, (options, needs) in commands().items():
        flags = all_flags(options)
        known = {flag.strip("-") for flag in flags} | {flag.strip("-").split(".")[0] for flag in flags}
        for names, condition in needs:
            asked = {flag.strip("-").lower() for flag in condition.removeprefix("no ").split()[0].split("|")}
            assert {*names.split()} | asked <= known, name


# ---- what is printed


@pytest.mark.parametrize("name", MODULES)
def test_the_help_fits_eighty_columns_and_ends_in_examples(name, capsys):
    options, _ = commands()[name]
    texts = []
    for word in ("--help", "--help-all"):
        assert parse(options, f"python -m minqstar.{name}", [word]) is None
        texts.append(capsys.readouterr().out)
        assert max(map(len, texts[-1].splitlines())) <= 80
        assert "None" not in texts[-1] and str(ROOT) not in texts[-1] and "\n\nexamples:\n" in texts[-1]
    short, long = texts
    own, nested = ([flag for flag in all_flags(options) if ("." in flag) == side] for side in (False, True))
    assert all(f"  {flag}" in short or flag.strip("-").upper() in short for flag in own)
    assert all(f"  {flag}" in long for flag in nested) and not any(f"  {flag}" in short for flag in nested)
    assert ("--help-all" in short) == bool(nested)


def test_the_console_commands_are_train_and_sample(monkeypatch, capsys):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.keys() == {"minqstar-train", "minqstar-sample"}
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name, place in scripts.items():
        monkeypatch.setattr(sys, "argv", [f"/somewhere/bin/{name}", "--help"])
        module, function = place.split(":")
        getattr(importlib.import_module(module), function)()
        said = capsys.readouterr().out
        assert said.startswith(f"usage: {name} ") and f"\n  {name} --" in said
        assert "python train.py" not in said and "python sample.py" not in said


def test_after_training_the_next_commands_are_printed_and_run(trained, tmp_path):
    """With a name that a shell would split, in an encoding without most characters."""
    (tmp_path / "my data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    done = command(tmp_path, "train.py", "--data", "my data.jsonl", *SMALL, encoding="cp1252")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("next: ")[1].splitlines()
    assert first == "python sample.py --run 'runs/my data/dpo'"
    assert second.strip() == "python -m minqstar.bellman 'runs/my data/dpo'"
    for line in (first, f"{second} --cases 2"):
        again = command(tmp_path, *shlex.split(line)[1:], encoding="ascii")
        assert again.returncode == 0 and again.stdout, again.stderr
    assert "SFT: min-steps makes 2 passes over the data, more than the 1.2 asked" in done.stdout
    assert "DPO: min-steps makes 2 passes over the data, more than the 1 asked" in done.stdout
    assert "reference: min-steps" not in done.stdout


ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202eabc\u2066\x9b31m\r\b"
ROWS = [{"prompt": f"Say {i} 中 {ESCAPES}", "chosen": f" {i}!{ESCAPES}", "rejected": " no"} for i in range(40)]


@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_no_text_moves_the_cursor(text):
    """Alone, in a cell, in a title; whatever Unicode holds. Ordinary text stays as it is."""
    for terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, width=60, force_terminal=terminal, color_system=None)
        table = Table("name", text, title=text)
        table.add_row(text, f"x{text}")
        console.print(text, table)
        console.say(f"{text} is said")
        assert not UNSEEN.search(out.getvalue())
    assert not UNSEEN.search(visible(text)) and "\n" not in visible(text)
    assert visible("Grüße 中文 👩‍🔬 a\tb", "\t") == "Grüße 中文 👩‍🔬 a\tb" and visible("\x1b\u202e") == "␛\\u202e"


def test_every_command_prints_through_the_one_console():
    files = set((ROOT / "minqstar").rglob("*.py")) - {ROOT / "minqstar/console.py"}
    assert [file.name for file in files if re.search(r"rich\.console|rich import print", file.read_text())] == []


@pytest.mark.parametrize(
    "words",
    [
        ["sample.py", "--prompt", f"Say {ESCAPES}"],
        ["sample.py", "--prompt", f"Say {ESCAPES}", "--table"],
        ["sample.py", "--run", f"runs/{ESCAPES}"],
        ["sample.py", f"--x{ESCAPES}"],
        ["train.py", "--data", f"{ESCAPES}\n.jsonl"],
        ["-m", "minqstar.lab.credit", "--prompt", f"x{ESCAPES}", "--response", f"y{ESCAPES}"],
        ["-m", "minqstar.world.tldr", "--out", f"w{ESCAPES}", *"--data.pairs 2 --data.sft 4 --data.held-out 2".split()],
    ],
)
def test_escapes_never_reach_the_terminal(trained, words):
    done = command(trained, *words)
    for text in (done.stdout, done.stderr):
        assert not UNSEEN.search(text)
    assert done.stderr.count("\n") == (done.returncode != 0)


PRINTS = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from minqstar.cli import run
from minqstar.console import Console
from minqstar.errors import UserError

@dataclass
class Options:
    fail: bool = False

def main(options):
    for i in range(300):
        print("é中" * 500)
        Console().print("é中" * 500)
    sys.stdout.flush()
    print(sys.stdin.read(), end="")
    Path("finished").touch()
    if options.fail:
        raise UserError("a mistake")

run(main, Options, "prog")
"""


@pytest.mark.parametrize(
    ("redirection", "status", "said", "encoding"),
    [
        ("", 0, "", "ascii"),
        ("", 0, "", "cp1252"),
        (">&-", 0, "", "utf-8"),
        (">&- 2>&- <&-", 0, "", "utf-8"),
        ("2>&-", 0, "", "utf-8"),
        (">/dev/full", 1, "prog: output: No space left on device\n", "utf-8"),
        (">/dev/full 2>/dev/full", 1, "", "utf-8"),
        ("--fail >/dev/full", 1, "prog: a mistake\n", "utf-8"),
        ("| head -c 5", 141, "", "utf-8"),
        ("--nothing >&-", 2, "prog: Unrecognized options: --nothing (see prog --help)\n", "utf-8"),
    ],
)
def test_output_that_fails_breaks_no_run(tmp_path, redirection, status, said, encoding):
    (tmp_path / "prints.py").write_text(PRINTS)
    first, *rest = redirection.partition("|")
    line = f"{sys.executable} prints.py {first}; echo $? >status"
    line = f"({line}) {''.join(rest)}" if rest[0] else line
    env = ENVIRONMENT | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True)
    assert (tmp_path / "status").read_text().strip() == str(status) and done.stderr.decode() == said
    assert (tmp_path / "finished").exists() == ("nothing" not in redirection)


def test_help_into_a_closed_pipe_is_quiet(tmp_path):
    (tmp_path / "prints.py").write_text(PRINTS)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = subprocess.Popen([sys.executable, "prints.py", "--help"], cwd=tmp_path, env=ENVIRONMENT, **pipes)
    started.stdout.close()
    assert started.stderr.read() == b"" and started.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize(("every", "lines"), [(0.0, 30), (60.0, 1)])
def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(every, lines, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(session, "LINE_EVERY", every)
    with session.Session(tokenizer).progress("SFT", 30) as advance:
        for i in range(30):
            advance(note=f"loss {i}")
    said = capsys.readouterr().out.strip().splitlines()
    assert (lines <= len(said) <= lines + 1 and "30/30 loss 29" in said[-1] and "1/30 loss 0" in said[0]) or lines == 1


# ---- what ends them


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", ["train.py", "sample.py", "-m minqstar.bellman", "-m minqstar.lab.bench"])
def test_a_signal_during_the_imports_is_one_line(tmp_path, words, number):
    """A torch that swallows every exception while it is imported, as foreign code may."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('here', flush=True)\n"
        "while True:\n    try:\n        time.sleep(9)\n    except BaseException:\n        pass\n"
    )
    env = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen(line_of(*words.split()), cwd=tmp_path, env=env, **pipes)
    assert started.stdout.readline() == "here\n"
    started.send_signal(number)
    _, said = started.communicate(timeout=20)
    assert started.returncode == 128 + number and said == "stopped\n"


def test_a_library_leaves_signals_alone(tmp_path):
    """Also where it is imported by a package that was started with -m."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/__init__.py").write_text("import minqstar")
    (tmp_path / "other/__main__.py").write_text(
        "import signal\nprint(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    )
    words = [sys.executable, "-m", "other"]
    env = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_nohup_keeps_a_run_alive(monkeypatch):
    assert set(ending_signals()) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert set(ending_signals()) == {signal.SIGINT, signal.SIGTERM}
    finally:
        signal.signal(signal.SIGHUP, before)
    monkeypatch.delattr(signal, "SIGHUP")  # as on Windows
    assert set(ending_signals()) == {signal.SIGINT, signal.SIGTERM}


def test_temperature_0_is_greedy(trained):
    cold, plain = (
        json.loads(command(trained, "sample.py", "--json", "--search", *words.split()).stdout)
        for words in ("sample --temperature 0", "greedy")
    )
    assert cold["token_ids"] == plain["token_ids"] and cold["logps"] == plain["logps"]
