r"""Text that comes in: the same text is the same characters, whether typed, piped or read, and on whatever system.

Windows ends lines in \r\n and may begin a file with a byte order mark. A model would read both as tokens of their own.
"""

import math
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from minqstar.errors import UserError, is_text, require

LONGEST = 2**24  # bytes of a prompt, of a vocabulary, of one line of data: there are files that never end
PIPED = 2**30  # bytes of data that come through a pipe: nobody can say how many will


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


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not blank, one at a time, each with its place `path:number`. Errors as above."""
    left = math.inf if Path(path).is_file() else PIPED
    try:
        with open(path, "rb") as file:
            for number in count(1):
                line = file.readline(LONGEST + 1)
                left -= len(line)
                require(left > 0, f"{path} is a pipe of more than {PIPED >> 30} GB; save its data to a file first")
                if not line:
                    return
                if line.strip():
                    yield f"{path}:{number}", _decoded(line, f"{path}:{number}")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e


def _decoded(raw: bytes, place: str, longest: int = LONGEST) -> str:
    require(len(raw) <= longest, f"{place}: more than {longest >> 20} MB without an end; is this the right file?")
    try:
        return clean(raw.decode("utf-8"), place)
    except UnicodeDecodeError as e:
        utf_16 = ", but UTF-16; save it as UTF-8" * raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise UserError(f"{place}: not UTF-8 text{utf_16}") from e
