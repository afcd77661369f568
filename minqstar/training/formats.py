"""Files to rows: JSONL of `prompt` with `chosen` and `rejected`, or with `completion`, checked row by row."""

import json
from collections.abc import Iterator
from pathlib import Path

from minqstar.errors import UserError, first_line, require
from minqstar.text import clean, read_lines

RESPONSE_FIELDS = (("chosen", "rejected"), ("completion",))


def fields_of(row: dict) -> tuple[str, ...]:
    """The names of a row's responses."""
    return RESPONSE_FIELDS["chosen" not in row]


FORMATS = {"prompt": 1}


class Rows:
    def __init__(self, path, form="auto"):
        self.path, self.form, self.unused, self.place, self.share = Path(path), form, set(), "", 0.0

    def __iter__(self):
        for i, row in enumerate(read_jsonl(self.path), 1):
            self.place = f"{self.path}:{i}"
            yield row


def read_jsonl(path: Path) -> Iterator[dict]:
    """The rows of a file, one at a time: objects with `prompt` and either `chosen` and `rejected`, or `completion`.

    These are strings; what else a row holds is kept. Blank lines are passed over. UserError names the file and line of
    the first row that is anything else.
    """
    place = None
    for place, line in read_lines(path):
        yield _checked(line, place)
    require(place is not None, f"{path}: holds no rows")


def read_pairs(path: Path | str) -> list[dict]:
    """The rows of a preference file: objects with the strings `prompt`, `chosen` and `rejected`. UserError if not."""
    rows = list(read_jsonl(Path(path)))
    require(all("chosen" in row for row in rows), f"{path}: want rows with chosen and rejected, not completion")
    return rows


def _checked(line: str, place: str) -> dict:
    array = line.lstrip().startswith("[")
    require(not array, f"{place}: a JSON array begins here; want one object a line, without brackets")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{place}: not JSON ({first_line(e)})") from e
    require(isinstance(row, dict), f"{place}: want an object, got {type(row).__name__}")
    names = next((names for names in RESPONSE_FIELDS if any(name in row for name in names)), RESPONSE_FIELDS[0])
    hint = "" if set(names) & row.keys() else "; the response of a row that has only one is called 'completion'"
    for name in ("prompt", *names):
        require(name in row, f"{place}: the field {name!r} is missing{hint}")
        require(isinstance(row[name], str), f"{place}: {name!r} must be a string, got {type(row[name]).__name__}")
        row[name] = clean(row[name], f"{place}: {name!r}")
    return row
