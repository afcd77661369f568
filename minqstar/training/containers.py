"""Files to raw rows: JSON, an object a line or an array of objects, and parquet; plain, gzip or zstandard.

What a file is, its first bytes say. A name may lie: `.jsonl` that holds an array, `.gz` that a browser unpacked.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from minqstar.errors import UserError, first_line, is_text, needs, require
from minqstar.text import LONGEST, open_data, read_lines

PIECE = 2**16  # characters that are read of an array at once
BATCH = 64  # rows of a parquet file that are held at once
SPACE = re.compile(r"[ \t\r\n]*")


def read_raw(path: Path) -> Iterator[tuple[str, float, object]]:
    """Each row's place, which share of the file is read (0 of a pipe), and what stands there, row by row.

    UserError if it is not JSON or not UTF-8; OSError, EOFError or zlib.error if the file cannot be read or unpacked.
    """
    with open_data(path) as (file, share):
        first = file.peek(2**13)
        if first.startswith(b"PAR1") or Path(path).suffix == ".parquet":
            yield from _parquet(file, path)
        elif first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            # a byte that is not UTF-8 becomes half of a surrogate pair, so that the row it stands in can be named
            with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
                for place, row in _Array(text, path):
                    yield place, share(), row
        else:
            for place, line in read_lines(file, path):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise UserError(f"{place}: not JSON ({first_line(e)})") from e
                yield place, share(), row


class _Array:
    """The elements of a JSON array, parsed one by one: the array itself need not fit into memory."""

    def __init__(self, text: io.TextIOBase, path: Path):
        self.text, self.path, self.piece, self.at, self.place = text, path, "", 0, str(path)

    def __iter__(self) -> Iterator[tuple[str, object]]:
        self._take("[")
        number, ended = 0, self._next() == "]" and self._take("]")
        while not ended:
            number += 1
            self.place = f"{self.path}, row {number}"
            yield self.place, self._value()
            ended = self._take(",", "]") == "]"
        require(not self._next(), f"{self.place}: not JSON (the array ends here, and more text stands behind it)")

    def _more(self) -> bool:
        """Read on; twice as much each time, so that a long row is not parsed too often, and never much too much."""
        held = len(self.piece) - self.at
        new = self.text.read(min(max(PIECE, held), LONGEST + 1 - held))
        self.piece, self.at = self.piece[self.at :] + new, 0
        return bool(new)

    def _next(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            self.at = SPACE.match(self.piece, self.at).end()
            if self.at < len(self.piece) or not self._more():
                return self.piece[self.at : self.at + 1]

    def _take(self, *marks: str) -> str:
        """The next character, which must be one of these."""
        mark = self._next()
        got = repr(mark) if mark else "the end of the file"
        require(mark in marks, f"{self.place}: not JSON (want {' or '.join(marks)} behind this row, got {got})")
        self.at += 1
        return mark

    def _value(self) -> object:
        """The next element; more is read for as long as what is there ends too early."""
        self._next()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.piece, self.at)
                break
            except (ValueError, RecursionError) as e:
                message, at = getattr(e, "msg", first_line(e)), getattr(e, "pos", -1)
                early = message.startswith("Unterminated string") or at >= len(self.piece) - len("-Infinity")
                long = early and len(self.piece) - self.at > LONGEST
                require(not long, f"{self.place}: more than {LONGEST >> 20} MB without an end; is this the right file?")
                if not (early and self._more()):
                    raise UserError(f"{self.place}: not JSON ({message})") from e
        require(is_text(self.piece[self.at : end]), f"{self.place}: not UTF-8 text")
        self.at = end
        return value


def _parquet(file: io.BufferedIOBase, path: Path) -> Iterator[tuple[str, float, dict]]:
    """The rows of a parquet file. What JSON cannot hold (times, bytes) becomes a string."""
    needs("pyarrow", "hf", f"{path} is parquet, and to read it")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    require(file.seekable(), f"{path}: parquet cannot be read through a pipe; save it to a file first")
    number, place = 0, f"{path}"
    try:
        parquet = ParquetFile(file, pre_buffer=False)
        for batch in parquet.iter_batches(BATCH):
            for i in range(batch.num_rows):
                number += 1
                place = f"{path}, row {number}"
                row = {name: column[i].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
                yield place, number / parquet.metadata.num_rows, json.loads(json.dumps(row, default=str))
    except UnicodeDecodeError as e:
        raise UserError(f"{place}: not UTF-8 text") from e
    except (ArrowException, OSError) as e:
        raise UserError(f"{place}: damaged parquet ({first_line(e)}); fetch it again") from e
