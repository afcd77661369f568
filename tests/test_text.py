"""Text that comes in: the same characters, however it was written down, typed or piped."""

import io
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from conftest import command, reseal
from hypothesis import given
from hypothesis import strategies as st

from minqstar.errors import UserError
from minqstar.lm.tokenizer import load_tokenizer
from minqstar.text import LONGEST, clean, open_data, read_lines, read_prompt, read_text
from minqstar.training.data import tokenize
from minqstar.training.formats import Rows
from minqstar.world.tldr import world_hash

BOM = "\ufeff"
# any text of a well-behaved system: without carriage returns, and with no byte order mark in front
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\ufeff"), min_size=1, max_size=40)


def ways(text: str) -> dict[str, bytes]:
    """The same text as systems write it."""
    windows = text.replace("\n", "\r\n")
    return {
        "unix": f"{text}\n".encode(),
        "no last newline": text.encode(),
        "windows": f"{windows}\r\n".encode(),
        "byte order mark": f"{BOM}{text}\n".encode(),
        "both": f"{BOM}{windows}\r\n".encode(),
    }


def lines(path: Path) -> list[tuple[str, str]]:
    with open_data(path) as (file, _):
        return list(read_lines(file, path))


@given(texts.map(lambda text: text.rstrip("\n") or "x"))
def test_a_prompt_is_the_same_on_every_system_typed_piped_or_read(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("text") / "prompt.txt"
    for raw in ways(text).values():
        file.write_bytes(raw)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
            assert read_prompt(file) == read_prompt("-") == text
        assert clean(raw.decode()).removesuffix("\n") == text


@given(texts, texts, texts)
def test_rows_are_the_same_on_every_system(tmp_path_factory, prompt, chosen, rejected):
    """Line ends of the file, and those that its texts had on the system that wrote them."""
    file = tmp_path_factory.mktemp("text") / "rows.jsonl"
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    windows = {name: BOM * (name == "prompt") + text.replace("\n", "\r\n") for name, text in row.items()}
    for end in ("\n", "\r\n"):
        for mark in ("", BOM):
            for some in (row, windows):
                file.write_bytes((mark + json.dumps(some) + end + end + json.dumps(some) + end).encode())
                assert list(Rows(file)) == [row, row]


def test_vocabularies_and_vocabulary_training_read_as_all_do(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "unix")
    raw = (tmp_path / "unix").read_bytes()
    (tmp_path / "windows").write_bytes(BOM.encode() + raw.replace(b"\n", b"\r\n"))
    assert load_tokenizer(tmp_path / "windows").fingerprint == tokenizer.fingerprint


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a file without an end")
@pytest.mark.parametrize("read", [read_text, read_prompt, load_tokenizer, lambda path: list(Rows(path))])
def test_a_file_without_an_end_is_refused_in_one_line(read):
    with pytest.raises(UserError, match=r"/dev/zero.*more than 16 MB.*right file") as error:
        read("/dev/zero")
    assert "\n" not in str(error.value)


def test_standard_input_is_read_whole_or_refused(monkeypatch):
    for text, fits in (("0123456789", True), ("0123456789a", False)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        if fits:
            assert read_text(Path("-"), longest=10) == text
        else:
            with pytest.raises(UserError, match="standard input: more than"):
                read_text(Path("-"), longest=10)


def test_a_line_of_the_longest_length_is_read(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * (LONGEST - 1) + b"\n")
    assert [len(line) for _, line in lines(tmp_path / "f")] == [LONGEST]
    (tmp_path / "f").write_bytes(b"x" * LONGEST + b"\n")
    with pytest.raises(UserError, match=r"f:1: more than 16 MB"):
        lines(tmp_path / "f")


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"caf\xe9", "not UTF-8 text$"), ("a\n".encode("utf-16"), "not UTF-8 text, but UTF-16; save it as UTF-8$")],
)
def test_other_encodings_are_refused(tmp_path, raw, message):
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(UserError, match=f"f: {message}"):
        read_text(tmp_path / "f")
    with pytest.raises(UserError, match=f"f:1: {message}"):
        lines(tmp_path / "f")
    with pytest.raises(UserError, match="the prompt is not UTF-8"):
        clean("a\ud800")


def test_rows_are_read_one_at_a_time(tmp_path):
    """A row is there before the next is looked at: a data set need not fit into memory as text."""
    (tmp_path / "f").write_text('{"prompt": "p", "completion": "c"}\n' * 3 + "no JSON\n")
    rows = iter(Rows(tmp_path / "f"))
    assert [next(rows)["prompt"] for _ in range(3)] == ["p"] * 3
    with pytest.raises(UserError, match="f:4: not JSON"):
        next(rows)
    assert tokenize(iter([{"prompt": "p", "completion": "c"}]), load_tokenizer(), 9)[0]


def test_one_prompt_gives_one_answer_and_an_odd_one_a_hint(run_folder, tmp_path, recwarn):
    """Through `sample.py`: in a file of any system, piped or typed. A hint is a warning, which goes to stderr."""

    def hints(prompt: str) -> list[str]:
        recwarn.clear()
        warnings.simplefilter("always")  # as in a process of its own
        done = command(tmp_path, *start, "--prompt", prompt)
        assert done.returncode == 0 and json.loads(done.stdout)["prompt"] == prompt
        return [str(warning.message) for warning in recwarn]

    shutil.copytree(run_folder, tmp_path / "run")
    text = "Some prompt\nof two lines"
    start = ["sample.py", "--run", "run", "--json", "--max-new-tokens", "3"]
    answers = [command(tmp_path, *start, "--prompt", text)]
    for raw in ways(text).values():
        (tmp_path / "p").write_bytes(raw)
        answers.append(command(tmp_path, *start, "--prompt-file", "p"))
        answers.append(command(tmp_path, *start, "--prompt-file", "-", input=raw))
    assert all(done.returncode == 0 and not done.stderr for done in answers) and not len(recwarn)
    assert len({json.dumps(json.loads(done.stdout) | {"seconds": 0}) for done in answers}) == 1
    for odd in ("Some prompt ", "Some prompt\n\n", "Some prompt\t"):
        (hint,) = hints(odd)
        assert "the prompt ends in white space" in hint and "\n" not in hint
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(config | {"world": world_hash()}))
    reseal(tmp_path / "run")
    (hint,) = hints("Some prompt")
    assert "the prompt is no post of the TL;DR world" in hint and "\n" not in hint
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    reseal(tmp_path / "run")
    (tmp_path / "run/held_out.jsonl").write_text(json.dumps({"prompt": "So: ", "completion": "c"}) + "\n")
    assert not hints("Some prompt ")  # the run's own end so
