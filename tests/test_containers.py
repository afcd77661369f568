"""Files of every kind that rows come in: lines, arrays, parquet; plain, packed, piped, cut off, damaged, too long."""

import datetime
import gzip
import json
import os
import threading
import tracemalloc
import warnings

import pytest

from minqstar.errors import UserError
from minqstar.training import containers
from minqstar.training.formats import Rows

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
HI, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}
ROWS = [{"prompt": f"Q{i}\u2028é", "chosen": " a\n" * 40, "rejected": " [b], {", "n": i} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()


def zstandard(raw: bytes) -> bytes:
    return pytest.importorskip("pyarrow").compress(raw, codec="zstd", asbytes=True)


def parquet(rows: list[dict], **options) -> bytes:
    arrow, file = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = arrow.BufferOutputStream()
    file.write_table(arrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


CONTAINERS = {
    "lines.jsonl": lambda: LINES,
    "lines.json": lambda: b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"),
    "array.json": lambda: ARRAY,
    "one line.json": lambda: json.dumps(ROWS).encode(),
    "array.jsonl": lambda: b"\xef\xbb\xbf\r\n " + ARRAY.replace(b"\n", b"\r\n") + b"\n\n",
    "lines.jsonl.gz": lambda: gzip.compress(LINES[:200]) + gzip.compress(LINES[200:]),
    "array.json.gz": lambda: gzip.compress(ARRAY),
    "lines.jsonl.zst": lambda: zstandard(LINES[:200]) + zstandard(LINES[200:]),
    "array.json.zst": lambda: zstandard(ARRAY),
    "rows.parquet": lambda: parquet(ROWS, row_group_size=2),
    "no parquet by name": lambda: parquet(ROWS),
    "unpacked.jsonl.gz": lambda: LINES,
}


@pytest.mark.parametrize("piece", [1, 2**16])
@pytest.mark.parametrize("name", CONTAINERS)
def test_the_same_rows_from_every_container(tmp_path, monkeypatch, name, piece):
    monkeypatch.setattr(containers, "PIECE", piece)
    monkeypatch.setattr(containers, "BATCH", 2)
    (tmp_path / name).write_bytes(CONTAINERS[name]())
    rows = Rows(tmp_path / name)
    assert list(rows) == list(rows) == ROWS
    shares = [rows.share for _ in rows]
    assert shares == sorted(shares) and shares[0] > 0 and 0.9 < shares[-1] <= 1
    assert rows.place.startswith(f"{tmp_path / name}") and rows.place.endswith((":3", ", row 3", ":5"))


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "array.json.gz", "lines.jsonl.zst", "rows.parquet"])
def test_a_pipe_is_read_once(tmp_path, name):
    content = CONTAINERS[name]()
    os.mkfifo(tmp_path / name)
    threading.Thread(target=(tmp_path / name).write_bytes, args=(content,), daemon=True).start()
    if name == "rows.parquet":
        with pytest.raises(UserError, match=r"rows.parquet: parquet cannot be read through a pipe"):
            list(Rows(tmp_path / name))
    else:
        rows = Rows(tmp_path / name)
        assert list(rows) == ROWS and rows.share == 0


def test_parquet_holds_what_json_does_not(tmp_path):
    rows = [{"conversations": [HI, ANSWER], "at": datetime.datetime(2024, 1, 2), "raw": b"x"}] * 2
    (tmp_path / "f.parquet").write_bytes(parquet(rows))
    found = list(Rows(tmp_path / "f.parquet"))
    expected = {"prompt": [HI], "completion": [ANSWER], "at": "2024-01-02 00:00:00", "raw": "b'x'"}
    assert found == [expected] * 2 and json.dumps(found)


MANY = [{"prompt": f"Q{i}", "completion": f"{i} " * 500} for i in range(2000)]  # 5 MB


def test_memory_of_parquet_is_bounded_by_a_batch(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    (tmp_path / "f.parquet").write_bytes(parquet(MANY, row_group_size=100))
    before = arrow.total_allocated_bytes()
    peak = max(arrow.total_allocated_bytes() - before for _ in Rows(tmp_path / "f.parquet"))
    assert 0 < peak < 1.5e6


@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.json.gz"])
def test_memory_is_bounded_by_a_row(tmp_path, name):
    raw = json.dumps(MANY).encode()
    if name == "f.jsonl":
        raw = "".join(json.dumps(row) + "\n" for row in MANY).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw, 1) if name.endswith("gz") else raw)
    next(iter(Rows(tmp_path / name)))  # imports and caches
    tracemalloc.start()
    count = sum(1 for _ in Rows(tmp_path / name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000 and peak < 1.2e6 < len(raw) / 3


@pytest.mark.parametrize("array", [False, True])
def test_long_rows(tmp_path, array):
    """A row of 10 MB is a row; one of more than 16 MB is refused before it is held whole."""
    for size, good in ((10 << 20, True), (17 << 20, False)):
        row = json.dumps({"prompt": "p", "completion": "é" * 10 + "x" * size}, ensure_ascii=False)
        (tmp_path / "f").write_text(f"[{row}, {row}]" if array else row)
        if good:
            assert {len(row["completion"]) for row in Rows(tmp_path / "f")} == {size + 10}
        else:
            with pytest.raises(UserError, match=r"f(:1|, row 1): more than 16 MB without an end"):
                list(Rows(tmp_path / "f"))


def line(**row) -> bytes:
    return json.dumps({**GOOD, **row}).encode() + b"\n"


FILES = {  # file name: content, message
    "empty.jsonl": (lambda: b"", "empty.jsonl: holds no rows"),
    "blank.jsonl": (lambda: b"\n \n", "blank.jsonl: holds no rows"),
    "empty.json": (lambda: b" [ ]\n", "empty.json: holds no rows"),
    "empty.jsonl.gz": (lambda: gzip.compress(b""), "empty.jsonl.gz: holds no rows"),
    "empty.parquet": (lambda: parquet(ROWS[:0]), "empty.parquet: holds no rows"),
    "broken.jsonl": (lambda: line() + b"{\n", r"broken.jsonl:2: not JSON"),
    "deep.jsonl": (lambda: b'{"a":' * 100_000, r"deep.jsonl:1: not JSON"),
    "list.jsonl": (lambda: line() + b"[1]\n", r"list.jsonl:2: want an object, got list"),
    "latin.jsonl": (lambda: line() + b"\n" + line()[:-3] + b'\xe9"}', r"latin.jsonl:3: not UTF-8 text"),
    "utf16.json": (lambda: "[]".encode("utf-16"), r"utf16.json:1: not UTF-8 text, but UTF-16"),
    "broken.json": (
        lambda: b"[" + line() + b',{"a" 1}, 2]',
        r"broken.json, row 2: not JSON \(Expecting ':' delimiter\)",
    ),
    "cut.json": (lambda: ARRAY[:-30], r"cut.json, row 3: not JSON \(Unterminated string starting at\)"),
    "no end.json": (
        lambda: ARRAY[:-1],
        r"no end.json, row 3: not JSON \(want , or \] behind this row, got the end of the file\)",
    ),
    "no comma.json": (lambda: b"[" + line() + line(), r"no comma.json, row 1: not JSON \(want , or \] .*, got '\{'\)"),
    "more.json": (lambda: ARRAY + ARRAY, r"more.json, row 3: not JSON \(the array ends here, and more text"),
    "number.json": (lambda: b"[" + line() + b",7]", r"number.json, row 2: want an object, got int"),
    "comma.json": (
        lambda: b"[" + line() + b",]",
        r"comma.json, row 2: not JSON \((Expecting value|Illegal trailing comma)",
    ),
    "deep.json": (lambda: b"[" * 100_000, r"deep.json, row 1: not JSON"),
    "latin.json": (lambda: ARRAY[:-20] + b'\xe9"}]', r"latin.json, row 3: not UTF-8 text"),
    "cut.jsonl.gz": (
        lambda: gzip.compress(LINES)[:-20],
        r"cut.jsonl.gz(:\d)?: behind this place the file is damaged or cut off \(Compressed",
    ),
    "cut.json.gz": (
        lambda: gzip.compress(ARRAY)[:-4],
        r"cut.json.gz(, row \d)?: behind this place the file is damaged",
    ),
    "changed.jsonl.gz": (
        lambda: gzip.compress(LINES)[:-8] + b"\0" * 8,
        r"changed.jsonl.gz:\d: behind this place .*CRC",
    ),
    "no deflate.gz": (lambda: gzip.compress(LINES)[:10] + b"\xff" * 30, r"no deflate.gz: behind .*invalid block type"),
    "early.json": (lambda: b'[{"a" 1}' + b" " * (17 << 20), r"early.json, row 1: not JSON \(Expecting ':'"),
    "hole.jsonl.gz": (
        lambda: gzip.compress(LINES)[:30] + b"\xff" * 30,
        r"hole.jsonl.gz: behind this place .*fetch it again",
    ),
    "cut.jsonl.zst": (
        lambda: zstandard(LINES)[:-20],
        r"cut.jsonl.zst: behind this place .*cut off \(Truncated compressed stream",
    ),
    "cut.parquet": (lambda: parquet(ROWS)[:-20], r"cut.parquet: damaged parquet \(.*\); fetch it again"),
    "no.parquet": (lambda: LINES, r"no.parquet: damaged parquet"),
    "hole.parquet": (
        lambda: parquet(ROWS, compression="NONE")[:4] + b"\xff" * 60 + parquet(ROWS, compression="NONE")[64:],
        r"hole.parquet(, row \d)?: damaged parquet",
    ),
    "columns.parquet": (
        lambda: parquet([{"score": 1, "body": "x"}]),
        r"columns.parquet, row 1: no format fits the columns body, score; want prompt",
    ),
    "latin.parquet": (
        lambda: parquet([GOOD], compression="NONE", use_dictionary=False).replace(b"\x01\0\0\0c", b"\x01\0\0\0\xe9"),
        r"latin.parquet, row 1: not UTF-8 text",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named_in_one_line(tmp_path, name):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(UserError, match=message) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        list(Rows(tmp_path / name))
    assert "\n" not in str(error.value)


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot read .*nowhere.jsonl: No such file"):
        list(Rows(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        list(Rows(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, raw in (("f.parquet", b"PAR1"), ("f.zst", b"\x28\xb5\x2f\xfd")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(
            UserError, match=rf"{name} is .* needs pyarrow, which is not installed: pip install 'minqstar\[hf\]'"
        ):
            list(Rows(tmp_path / name))
