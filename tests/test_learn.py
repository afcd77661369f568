"""The lesson: each chapter runs, its exercise fails unsolved and passes solved, and each symptom shows."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, process
from test_borrowed import folders  # noqa: F401 (a fixture)
from test_pair import pair  # noqa: F401 (a fixture)

import minqstar
from minqstar.lab.learn import solutions

LEARN = ROOT / "minqstar/lab/learn"
CHAPTERS = sorted(LEARN.glob("[0-9]_*.py"))
README = (LEARN / "README.md").read_text()


def cells(path: Path) -> list[tuple[str, str]]:
    """Title and source of each cell of a percent-format script; the title of text is [markdown]."""
    parts = re.split(r"^# %%(.*)\n", path.read_text(), flags=re.M)
    assert not parts[0]
    return [(title.strip(), source) for title, source in zip(parts[1::2], parts[2::2], strict=True)]


def code(path: Path) -> dict[str, str]:
    """The code of a chapter: before its exercise, the exercise, its check."""
    of = {"": "", "exercise": "", "check": ""}
    for title, source in cells(path):
        if title != "[markdown]":
            of[title] += source
    return of


def run(source: str, space: dict):
    exec(compile(source, "chapter", "exec"), space)


def learn(path: Path, **changed: str) -> dict:
    """Runs a chapter as its reader does: the check fails for the exercise as printed, and passes when it is solved.

    `changed` are assignments of its first cells that a reader has changed.
    """
    parts, space = code(path), {"__name__": "chapter"}
    for name, value in changed.items():
        line = rf"^{name} = (\((\n    .*)*\n\)|.*)$"
        parts[""], count = re.subn(line, lambda _, new=f"{name} = {value}": new, parts[""], flags=re.M)
        assert count == 1, name
    run(parts[""], space)
    before = set(space)
    run(parts["exercise"], space)
    (left_open,) = set(space) - before
    with pytest.raises(AssertionError):
        run(parts["check"], space)
    space[left_open] = getattr(solutions, left_open)
    run(parts["check"], space)
    return space


def numbers(text: str) -> set[float]:
    """Those with a decimal point."""
    return {float(number) for number in re.findall(r"\d+\.\d+", text)}


@pytest.fixture
def clone(trained, monkeypatch):
    """As if the package lay beside the runs of the tiny training."""
    monkeypatch.setattr(minqstar, "__file__", str(trained / "minqstar/__init__.py"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_runs_and_its_exercise_fails_until_it_is_solved(path, clone, capsys):
    learn(path)
    printed = capsys.readouterr().out
    assert printed.count("\nright") == 1 and "Traceback" not in printed
    if path.stem[0] in "1234":  # of an exact world: what the text says of it must be what the code finds
        text = "".join(source for title, source in cells(path) if title == "[markdown]")
        quoted = numbers(re.sub(r"Eq\. [\d, ]+|^# # .*", "", text, flags=re.M))
        known = numbers(printed + "".join(code(path).values()))
        assert quoted <= known, quoted - known


@pytest.mark.slow
def test_what_the_chapters_say_of_a_run_of_the_defaults_holds(tmp_path, monkeypatch):
    done = process(tmp_path, "train.py", "--stage", "dpo", timeout=3000)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(minqstar, "__file__", str(tmp_path / "minqstar/__init__.py"))
    five, six, seven = (learn(path) for path in CHAPTERS[4:7])

    error, texts = five["learned"] - five["exact"], five["texts"]
    of_kind = {kind: five["rms"](error[torch.tensor([k == kind for k in five["kinds"]])]) for kind in five["kinds"]}
    assert max(of_kind, key=of_kind.get) == "fact"
    assert (error[five["exact"] < -0.5] > 0).double().mean() > 0.5  # charged too little
    worst = error.abs().argsort(descending=True)[:8].tolist()
    assert all(five["kinds"][i] == "fact" for i in worst)
    assert sum(texts[i].isdigit() and texts[i - 1].isdigit() for i in worst) > 4  # the second digit of a number

    assert (six["E"] < 1e-6).all() and six["of_rejected"] < six["of_chosen"] < 0
    assert seven["better"] > 0 and seven["proved"] > 6


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_step_asks_one_question_before_its_cell(path):
    assert len(path.read_text().splitlines()) < 150
    titles = [title for title, _ in cells(path)]
    assert titles.count("exercise") == titles.count("check") == 1 and titles[-2:] == ["exercise", "check"]
    asked = 0
    for i, (title, source) in enumerate(cells(path)):
        assert source.count("**Question.**") <= 1
        if "**Question.**" in source or "**Exercise.**" in source:
            asked += 1
            assert title == "[markdown]" and titles[i + 1] != "[markdown]"
    assert asked >= 4 and asked >= titles.count("[markdown]") - 1  # the first may be an introduction


def test_your_own_pair_may_be_two_hugging_face_folders(pair, capsys):  # noqa: F811
    """The cell that the last chapter asks its reader to change is changed."""
    policy, reference, _ = map(str, pair)
    texts = {"PROMPT": "the lazy dog", "BETTER": " is quick", "WORSE": " is brown 2024"}
    texts = {name: repr(text) for name, text in texts.items()}
    space = learn(CHAPTERS[-1], POLICY=repr(policy), REFERENCE=repr(reference), BETA="0.1", **texts)
    assert space["q"].beta == 0.1 and "right: this pair prefers ' is quick'" in capsys.readouterr().out


def test_a_chapter_run_as_a_script_stops_at_its_exercise(tmp_path):
    done = process(tmp_path, "minqstar/lab/learn/1_three_states.py")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "AssertionError: beta 0.1, state 0: you have"
    )


def test_the_solutions_are_those_of_the_chapters():
    left_open = {re.search(r"^def (\w+)", code(path)["exercise"], re.M)[1]: path.stem[0] for path in CHAPTERS}
    assert len(left_open) == 8
    for name, chapter in left_open.items():
        assert f"Chapter {chapter}." in getattr(solutions, name).__doc__


def test_the_page_has_a_row_for_each_chapter_and_each_symptom():
    commands = re.findall(r"^\| \[`(\w+)`\]\(\1\.py\) \| `python (\S+)` \|", README, re.M)
    assert [(name, ROOT / path) for name, path in commands] == [(path.stem, path) for path in CHAPTERS]
    rows = README[README.index("| symptom |") :].splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(SYMPTOMS)
    assert list(SYMPTOMS) == [title for title, _ in cells(LEARN / "symptoms.py")][2:]


def falls(of: dict):
    figures = of["figures"]
    assert of["steps"][-1]["accuracy"] == 1 and of["steps"][-1]["margin"] > 0.3
    assert figures["chosen_reward"] < -0.05 and figures["chosen_expected_reward"] < -0.05


def never_stops(of: dict):
    """Where the longer answer is preferred EOS is charged and draws are longer; else the other way round."""
    longer, shorter = of["found"]["longer"], of["found"]["shorter"]
    assert max(longer["chosen_eos_reward"], longer["rejected_eos_reward"]) < 0
    assert min(shorter["chosen_eos_reward"], shorter["rejected_eos_reward"]) > 0
    assert shorter["mean_length"] < shorter["ref_mean_length"] == longer["ref_mean_length"]
    assert longer["mean_length"] > 1.3 * longer["ref_mean_length"]


def stuck(of: dict):
    by_coin, slow, ranked = (of[name] for name in ("by_coin", "slow", "ranked"))
    assert all(abs(steps[-1]["loss"] - 0.6931) < 0.02 for steps in (by_coin, slow))
    assert 0.35 < sum(m["accuracy"] for m in by_coin[-20:]) / 20 < 0.65 and abs(slow[-1]["margin"]) < 5e-4
    assert abs(ranked[0]["loss"] - 3.178) < 1e-3 and ranked[-1]["loss"] < 3


def bad_text(of: dict):
    """The second of the two trainings is the one at a sound rate."""
    assert of["written"][0.002] == " cat, and it sleeps." != of["written"][0.05]
    assert of["last"][0.002]["accuracy"] == 1 and of["last"][0.002]["chosen_reward"] > -0.5
    assert (
        of["last"][0.05]["accuracy"] == 1 and of["last"][0.05]["loss"] < 1e-3 and of["last"][0.05]["chosen_reward"] < -5
    )


def truncated(of: dict):
    R, A, V, cut = (of[name] for name in ("R", "A", "V", "cut"))
    assert torch.isclose(V[0] + A - R, V[cut]) and V[cut].abs() > 0.5
    assert not len(of["kept"]) and sum(of["skipped"].values()) == 24


def not_a_number(of: dict):
    assert re.match(r"step \d+: the weights overflow", of["stopped"])
    assert of["ratio"].isnan() and of["on_support"] == 0


SYMPTOMS = {
    "chosen rewards fall": falls, "it repeats or never stops": never_stops, "loss stuck at ln 2": stuck,
    "accuracy 1 and bad text": bad_text, "truncated responses": truncated, "NaN": not_a_number,
}  # fmt: skip


@pytest.mark.parametrize("name", SYMPTOMS)
def test_a_symptom_shows_and_is_where_the_page_says(name, capsys):
    """Each cell runs alone after the first."""
    of = dict(cells(LEARN / "symptoms.py"))
    space = {}
    run(of["to train something small"] + of[name], space)
    assert capsys.readouterr().out
    SYMPTOMS[name](space)
