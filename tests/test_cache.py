"""Tokens kept on disk: the same groups as in memory, read once, never damaged, and little memory for much data."""

import gzip
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT
from hypothesis import given
from hypothesis import strategies as st

from minqstar.errors import UserError
from minqstar.lm.tokenizer import Tokenizer
from minqstar.training import cache, groups
from minqstar.training.cache import TokenCache
from minqstar.training.data import Group, PackedData, tokenize
from minqstar.training.formats import Rows
from minqstar.training.groups import Groups, GroupWriter, mapped, prompt_key

ROWS = [{"prompt": f"Q{i // 3}:", "chosen": f" {i}", "rejected": " no", "note": i} for i in range(30)]
ROWS[7]["chosen"] = ""
WORDS = [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "7"}]


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "rows.jsonl"


def opened(file: Path, tokenizer, block_size: int = 64) -> TokenCache:
    return TokenCache(Rows(file), tokenizer, block_size, file.parent / "cache")


def test_what_is_mapped_is_what_was_tokenised(file, tokenizer):
    found, skipped = tokenize(ROWS, tokenizer, 64)
    for again in (False, True):
        kept = opened(file, tokenizer)
        assert list(kept.groups) == list(found) and kept.skipped == skipped == {"empty response": 1}
        assert kept.groups.compared and kept.groups.of_row.tolist() == found.of_row.tolist()
        assert isinstance(kept.groups.tokens, np.memmap) and kept.made != again
        assert kept.form == "prompt" and kept.unused == ["note"]
        held = {0, 4}
        assert kept.held(held) == [row for i, row in enumerate(ROWS) if found.of_row[i] in held]
        assert PackedData(kept.groups, 0, 40).fingerprint == PackedData(found, 0, 40).fingerprint


def test_an_unchanged_file_is_not_read_again(file, tokenizer, monkeypatch):
    read = []
    monkeypatch.setattr(cache, "tokenize", lambda *of, **more: read.append(1) or tokenize(*of, **more))
    first = opened(file, tokenizer)
    first.held({1})
    monkeypatch.setattr(Rows, "__iter__", None)  # the held rows are not looked for again
    assert opened(file, tokenizer).held({1}) == first.held({1}) and len(read) == 1
    monkeypatch.undo()
    monkeypatch.setattr(cache, "tokenize", lambda *of, **more: read.append(1) or tokenize(*of, **more))
    (kept,) = first.folder.glob("rows-*")
    for damage in (b"", b"[[", kept.read_bytes().replace(b'"note": 3', b'"note": 4')):
        kept.write_bytes(damage)
        assert [row["note"] for row in opened(file, tokenizer).held({1})] == [3, 4, 5]
    opened(file, tokenizer, block_size=32)
    small = Tokenizer({bytes([byte]): byte for byte in range(256)})
    assert opened(file, small).groups[0].prompt == list(b"Q0:") and len(read) == 3
    file.write_text(file.read_text().replace("no", "on"))
    os.utime(file, ns=(1, 1))
    changed = opened(file, tokenizer)
    assert len(read) == 4 and changed.groups[0].responses[1] == [*tokenizer.encode(" on"), tokenizer.eos]
    assert len([folder for folder in (file.parent / "cache").iterdir() if not folder.name.startswith(".")]) == 3


def test_a_file_that_changes_meanwhile_is_named(file, tokenizer):
    kept = opened(file, tokenizer)
    with open(file, "a") as more:
        more.write(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(UserError, match="was changed while it was read; repeat the command"):
        kept.held({1})
    assert opened(file, tokenizer).held({1})


def test_a_damaged_cache_is_named(file, tokenizer):
    kept = opened(file, tokenizer)
    for name, change in (
        ("tokens", lambda data: data[:-4]),
        ("tokens", lambda data: bytes([data[0] ^ 1]) + data[1:]),
        ("stops", lambda data: data[:8]),
        ("of_row", lambda data: data + bytes(8)),
        ("meta.json", lambda data: data[:20]),
        ("meta.json", lambda data: data.replace(kept.name.encode(), b"another")),
        ("meta.json", lambda data: b"[]"),
    ):
        whole = (kept.folder / name).read_bytes()
        (kept.folder / name).write_bytes(change(whole))
        with pytest.raises(UserError, match=r"is a damaged cache .*; remove it$") as error:
            opened(file, tokenizer)
        assert "\n" not in str(error.value) and str(kept.folder) in str(error.value)
        (kept.folder / name).write_bytes(whole)
    assert list(opened(file, tokenizer).groups) == list(kept.groups)
    (kept.folder / "tokens").unlink()
    with pytest.raises(UserError, match=r"is a damaged cache .*; remove it$"):
        opened(file, tokenizer)


@pytest.mark.parametrize("damage", ["row", "utf-8", "gzip"])
def test_of_a_file_that_cannot_be_read_nothing_is_kept(file, tokenizer, damage):
    text = file.read_bytes()
    if damage == "gzip":
        file = file.with_suffix(".jsonl.gz")
        file.write_bytes(gzip.compress(text * 99)[:-20])
    else:
        file.write_bytes(text + {"row": b'{"prompt": "Q"}\n', "utf-8": b'{"prompt": "\xff"}\n'}[damage])
    with pytest.raises(UserError, match=f"{file.name}"):
        opened(file, tokenizer)
    assert not [path for path in (file.parent / "cache").glob("*") if path.is_dir()]


texts = st.lists(st.integers(0, 99), min_size=1, max_size=5)
sizes = st.sampled_from([(), (1, 2), (2, 1), (1, 1, 1)])
made = st.lists(st.builds(Group, texts, st.tuples(texts, texts, texts), st.just(()), sizes), min_size=1, max_size=20)


@given(made, st.integers(1, 30), st.sets(st.integers(0, 19)))
def test_columns_on_disk_are_those_in_memory(tmp_path_factory, some, spill, gone):
    folder = tmp_path_factory.mktemp("columns")
    writer = GroupWriter(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "SPILL", spill)
        for group in some:
            first, *others = group.sizes or (3,)
            writer.add(group.prompt, group.responses[:first])
            writer.extend_last(group.responses[first:], sizes=others)
            writer.row()
        writer.row(skipped=True)
        columns = writer.columns()
    found, gone = Groups.of(columns), {i for i in gone if i < len(some)}
    assert list(found) == some and found.of_row.tolist() == [*range(len(some)), -1] and found.used == len(some)
    assert {name: c.tolist() for name, c in columns.items()} == {name: c.tolist() for name, c in mapped(folder).items()}
    assert found.prompt_keys().tolist() == [prompt_key(group.prompt) for group in some]
    rest = found.without(gone).without(set())
    assert list(rest) == [group for i, group in enumerate(some) if i not in gone]
    assert rest.lengths.tolist() == [group.length for group in rest] and rest.used == len(rest)
    if len(rest):
        packed = PackedData(rest, 0, 12)
        assert packed.num_scored == sum(len(r) for group in rest for r in group.responses)
        assert sorted(packed.order.tolist()) == list(range(len(rest)))


MUCH = """
    import json, sys
    from pathlib import Path
    from minqstar.lm.memory import held
    from minqstar.options import Options
    from minqstar.pipeline import main
    from minqstar.training.trainer import SFTConfig
    from minqstar.lm.model import GPTConfig
    pairs, words, most = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    with open("much.jsonl", "w") as file:
        for i in range(pairs):
            say = lambda k: " ".join(f"word{(i * 7 + j * k) % 5003}" for j in range(words))
            row = {"prompt": f"Question {i}: {say(1)}", "chosen": " " + say(2), "rejected": " " + say(3)}
            file.write(json.dumps(row) + "\\n")
    small, before = GPTConfig(n_layer=1, n_embd=32), held()
    stage = SFTConfig(epochs=1e-6, min_steps=2, row_length=1024)
    main(Options(stage="sft", data=Path("much.jsonl"), held_out=1e-6, model=small, sft=stage))
    more = (held() - before) / 1e9
    print(f"of {Path('much.jsonl').stat().st_size / 1e9:.2f} GB {more:.2f} GB were held, in all {held() / 1e9:.2f} GB")
    assert more < most and held() < 2e9
"""


LARGEST = pytest.param(10**6, 70, 0.6, marks=pytest.mark.slow)  # 2 GB


@pytest.mark.parametrize("pairs, words, most", [(50_000, 70, 0.25), LARGEST])
def test_data_larger_than_memory_are_trained_on(tmp_path, pairs, words, most):
    """Read, kept, packed and begun to be trained on; in memory are a few numbers a pair."""
    line = [sys.executable, "-c", textwrap.dedent(MUCH), str(pairs), str(words), str(most)]
    done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    assert (ROOT / "minqstar").is_dir() and "the run is in" in done.stdout
