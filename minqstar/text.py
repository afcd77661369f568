r"""Text that comes in: the same text is the same characters, whether typed, piped or read, and on whatever system.

Windows ends lines in \r\n and may begin a file with a byte order mark. A model would read both as tokens of their own.
"""

import gzip
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from minqstar.errors import UserError, is_text, needs, require

LONGEST = 2**24  # bytes of a prompt, of a vocabulary, of one line of data: there are files that never end
PIPED = 2**30  # bytes of data that come through a pipe: nobody can say how many will
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # the first bytes of packed files


def clean(text: str, name: str = "the prompt") -> str:
    r"""The text with line ends \n and without a byte order mark. UserError for halves of surrogate pairs."""
    require(is_text(text), f"{name} is not UTF-8 text: it holds half of a surrogate pair, which is no character")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def read_text(path: Path, what: str = "", longest: int = LONGEST) -> str:
    """All of a file, or of standard input for `-`. UserError if it cannot be read, is too long, or is not UTF-8."""
    try:
        if str(path) == "-":
            return _decoded(sys.stdin.buffer.read(longest + 1), "standard input", longest)
        with open(path, "rb") as file:
            return _decoded(file.read(longest + 1), str(path), longest)
    except OSError as e:
        raise UserError(f"cannot read {what}{' ' * bool(what)}{path}: {e.strerror}") from e


def read_prompt(path: Path) -> str:
    """The prompt in a file, or on standard input for `-`, without its last newline, which a shell or an editor put."""
    return read_text(path).removesuffix("\n")


@contextmanager
def open_data(path: Path) -> Iterator[tuple[io.BufferedIOBase, Callable[[], float]]]:
    """The bytes of a file, and what says which share of it is read.

    They are unpacked if they are gzip or zstandard, whatever the file's name. Of a pipe PIPED are read at most.
    """
    with open(path, "rb") as file:
        first, stream = file.peek(4), file
        if first.startswith(GZIP):
            stream = gzip.GzipFile(fileobj=file)
        elif first.startswith(ZSTD):
            needs("pyarrow", "hf", f"{path} is zstandard, and to unpack it")
            from pyarrow import CompressedInputStream, PythonFile

            stream = io.BufferedReader(CompressedInputStream(PythonFile(file, mode="r"), "zstd"))
        if Path(path).is_file():
            size = max(1, Path(path).stat().st_size)
            yield stream, lambda: file.tell() / size
        else:
            yield io.BufferedReader(_Pipe(stream, path)), lambda: 0.0


class _Pipe(io.RawIOBase):
    """A stream that ends in a UserError behind PIPED bytes."""

    def __init__(self, stream: io.BufferedIOBase, path: Path):
        self.stream, self.path, self.left = stream, path, PIPED

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self.stream.readinto1(buffer)
        self.left -= count
        require(self.left > 0, f"{self.path} is a pipe of more than {PIPED >> 30} GB; save its data to a file first")
        return count


def read_lines(file: io.BufferedIOBase, path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, one at a time, each with its place `path:number`. UserError if not such text."""
    for number in count(1):
        line = file.readline(LONGEST + 1)
        if not line:
            return
        if line.strip():
            yield f"{path}:{number}", _decoded(line, f"{path}:{number}")


def _decoded(raw: bytes, place: str, longest: int = LONGEST) -> str:
    require(len(raw) <= longest, f"{place}: more than {longest >> 20} MB without an end; is this the right file?")
    try:
        return clean(raw.decode("utf-8"), place)
    except UnicodeDecodeError as e:
        utf_16 = ", but UTF-16; save it as UTF-8" * raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise UserError(f"{place}: not UTF-8 text{utf_16}") from e
