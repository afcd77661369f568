"""The pages that teach: every command and every line of Python in them runs, every number of the logs is defined."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, TINY, command
from test_borrowed import folders  # noqa: F401 (a fixture)
from test_pair import pair  # noqa: F401 (a fixture)

from minqstar.cli import parse
from minqstar.world.tldr import DataConfig, dataset

PAGES = [ROOT / "README.md", *sorted((ROOT / "minqstar").rglob("README.md"))]
WORLD = ROOT / "minqstar/world/README.md"  # its walk-throughs change the code: they have a test of their own
RUN = [page for page in PAGES if page != WORLD]
AT_CI = ["pip install -e .", "python train.py --stage dpo", 'pip install -e ".[test]"', "pytest"]


def blocks(page, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def commands(page, language: str = "bash") -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks(page, language) for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


@pytest.fixture(scope="module")
def clone(trained, pair, tmp_path_factory):  # noqa: F811
    """A folder like a clone in which the main command was run, with preferences and others' models."""
    folder = tmp_path_factory.mktemp("readme") / "clone"
    shutil.copytree(trained, folder, symlinks=True)
    for name in ("train.py", "sample.py"):
        (folder / name).symlink_to(ROOT / name)
    for name, model in zip(("MODEL", "BASE"), pair[:2], strict=True):
        (folder / name).symlink_to(model)
    rows = [{"prompt": f"Say {i}.", "chosen": f" {i}!", "rejected": " no"} for i in range(40)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("page", RUN, ids=[str(page.relative_to(ROOT)) for page in RUN])
def test_every_command_runs_as_printed(clone, page):
    """Except for the main one and the installation, which `.ci/run` runs."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    for line in commands(page):
        if line in AT_CI or line.startswith("pip install "):
            continue
        small = SMALL if "--data" in line else TINY
        line += f" {shlex.join(small)}" if "train.py" in line and "--init MODEL" not in line else ""
        if "|" in line:
            done = subprocess.run(line, shell=True, cwd=clone, env=env, capture_output=True, text=True, timeout=300)
        else:
            assert line.startswith("python "), line
            done = command(clone, *shlex.split(line)[1:])
        assert done.returncode == 0, f"{line}: {done.stderr}"


def walk_through(folder: Path, title: str) -> list[str]:
    """Does all that a section of the world's README says, in its order, on a copy of the project; what it prints.

    A `diff` changes the file that is named before it. So does a block that goes in place of a file's last line. A block
    of Python prints what its last comment says. Commands are run as printed, but for options that make training tiny.
    """
    for name in ("minqstar", "train.py", "sample.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    env = os.environ | {"PYTHONPATH": str(folder), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    section = re.search(rf"^## {title}\n(.*?)(?=^## )", WORLD.read_text(), re.M | re.S)[1]
    printed = []
    for words, kind, block in re.findall(r"(.*?)```(\w+)\n(.*?)```", section, re.S):
        file = (
            folder / re.findall(r"`(minqstar/\S+\.py)`", words)[-1] if kind == "diff" or "last line" in words else None
        )
        if file:
            lines = block.splitlines() if kind == "diff" else ["-" + file.read_text().splitlines()[-1], "+" + block]
            (old,), (new,) = ([line[1:] for line in lines if line[0] == sign] for sign in "-+")
            assert file.read_text().count(old) == 1, f"{file} holds no {old}"
            file.write_text(file.read_text().replace(old, new.rstrip()))
            continue
        block = re.sub(r"^python train\.py [^#\n]*", lambda line: f"{line[0]}{shlex.join(TINY)} ", block, flags=re.M)
        args = ["bash", "-ec", block] if kind == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(args, cwd=folder, env=env | {"COLUMNS": "100"}, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert kind == "bash" or block.rstrip().endswith("# " + done.stdout.strip()), done.stdout
        printed.append(done.stdout)
    return printed


def test_a_reward_is_changed_as_the_page_of_the_world_says(tmp_path, tokenizer):
    with dataset(tmp_path / "data/tldr", DataConfig(pairs=2, sft=4, held_out=1), tokenizer):
        pass
    _, trained, table = walk_through(tmp_path, "Change a reward")
    assert "made anew (its world is not today's" in trained
    any_, mark = (re.search(rf"^{token} +(.*)$", table, re.M)[1].split() for token in (" Any", r"\?"))
    assert any_[0] == "0.00" and any_[3:5] == ["-0.99", "-0.99"] and mark[0] == "-1.00"  # r, r + V(s') - V(s), A*


@pytest.mark.slow
def test_a_scenario_is_added_as_the_page_of_the_world_says(tmp_path):
    *_, table = walk_through(tmp_path, "Add a scenario")
    assert re.search(r"^4 +-1.00 .* -1.36 +-1.36 ", table, re.M)
    file = tmp_path / "minqstar/world/scenarios.py"
    message = re.search(r"without the chatter, for example, `(.*?)`", " ".join(WORLD.read_text().split()))[1]
    file.write_text(re.sub(r"chatter=\(\"The leaves.*", "chatter=(),", file.read_text()))
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"train.py: {message}\n")


def test_the_installation_and_the_main_command_run_in_ci():
    ci, printed = (ROOT / ".ci/run").read_text(), commands(PAGES[0])
    assert set(AT_CI) <= set(printed)
    assert all(line in ci for line in AT_CI[1:2] + AT_CI[3:]) and "pip install" in ci and '-e ".[test]"' in ci


def test_the_vocabulary_that_is_trained_again_is_the_default_one(clone):
    assert (clone / "vocab.tiktoken").read_bytes() == (ROOT / "minqstar/lm/vocab.tiktoken").read_bytes()


@pytest.mark.parametrize("page", RUN, ids=[str(page.relative_to(ROOT)) for page in RUN])
def test_every_line_of_python_runs(clone, page, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), {})
        assert "print" not in code or capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_long_commands_are_understood(clone, page, monkeypatch):
    """Those that take minutes, or packages that few have, stand in `sh` blocks: their options are parsed."""
    monkeypatch.chdir(clone)
    for python, m, module, *args in map(shlex.split, commands(page, "sh")):
        assert (python, m) == ("python", "-m")
        found = importlib.import_module(module)
        found = importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found
        parse(found.Options, module, args, getattr(found, "NEEDS", ()))


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


def test_every_room_has_a_page_that_names_its_files():
    for room in {path.parent for path in (ROOT / "minqstar").rglob("*.py")} - {ROOT / "minqstar"}:
        page = (room / "README.md").read_text()
        files = {path.name for path in room.glob("*.py")} - {"__init__.py", "__main__.py"}
        assert all(f"`{name}`" in page or f"`{name[:-3]}`" in page for name in files), room


def test_the_glossary_defines_every_figure(trained):
    """Each metric of the log and the summary has a row in the glossary."""
    readme = (ROOT / "minqstar/training/README.md").read_text()
    glossary = set(re.findall(r"`(\w+)`", readme[readme.index("## Glossary") :]))
    for stage in ("sft", "dpo"):
        summary = json.loads((trained / f"runs/{stage}/summary.json").read_text())
        metrics = json.loads((trained / f"runs/{stage}/metrics.jsonl").read_text().splitlines()[0])
        assert summary.keys() | summary["eval"].keys() | metrics.keys() <= glossary
