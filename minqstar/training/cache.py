"""Rows tokenised once: the groups of a file in arrays on disk, which are mapped into memory when they are asked for.

A folder of the cache holds the columns of `GroupWriter` and `meta.json`. Its name tells the file, the tokenizer and the
context; when the file is another than it was, its folder is made anew. The cache may be removed at any time.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from minqstar.errors import UserError, first_line, require
from minqstar.files import aside, discard, in_words, owner, replace_file, replace_folder
from minqstar.lm.tokenizer import Tokens
from minqstar.training.data import tokenize
from minqstar.training.formats import Rows
from minqstar.training.groups import COLUMNS, Groups, GroupWriter, digest, in_parts, mapped, rows_of

META, FORMAT = "meta.json", 2


class TokenCache:
    """The rows of one file, tokenised: `groups`, why rows were `skipped`, and of what `form` the rows are.

    It is read from its folder in `where`, or made there. UserError if a row or the folder is damaged; then nothing of
    it is left. `advance` is told how far the reading is, a share of the file. A pipe gives its rows only once: they
    stay in memory.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokens,
        block_size: int,
        where: Path,
        advance: Callable[[float], None] = lambda share: None,
        wait: Callable[[str], None] | None = None,
    ):
        self.rows, self.made = rows, True
        if not rows.path.is_file():
            self.given = list(rows)
            self.groups, self.skipped = tokenize(self.given, tokenizer, block_size)
            self.form, self.unused = rows.form, sorted(rows.unused)
            return
        name = f"{FORMAT} {rows.path.resolve()} {rows.form} {tokenizer.encoding_key} {block_size}"
        self.name = hashlib.sha256(name.encode()).hexdigest()[:16]
        self.folder = where / self.name
        with owner(self.folder, wait):
            self.made = not self._is_current()
            if self.made:
                self._make(tokenizer, block_size, advance)
            self._open()

    def _stamp(self) -> list[int]:
        """What changes when a file is written."""
        with in_words(f"cannot read {self.rows.path}"):
            of = self.rows.path.stat()
        return [of.st_size, of.st_mtime_ns, of.st_ino]

    def _meta(self) -> dict:
        try:
            meta = json.loads((self.folder / META).read_bytes())
            require(meta["name"] == self.name, "it is of another file or tokenizer")
            return meta
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{self.folder} is a damaged cache ({first_line(e)}); remove it") from e

    def _is_current(self) -> bool:
        return self.folder.exists() and self._meta()["stamp"] == self._stamp()

    def _make(self, tokenizer: Tokens, block_size: int, advance: Callable[[float], None]):
        stamp, new = self._stamp(), aside(self.folder, "new")
        with in_words(f"cannot keep tokens in {self.folder.parent}"):
            new.mkdir(parents=True)
            try:
                _, skipped = tokenize(self.rows, tokenizer, block_size, writer=GroupWriter(new), advance=advance)
                meta = {"name": self.name, "file": str(self.rows.path), "stamp": stamp, "form": self.rows.form}
                meta |= {"unused": sorted(self.rows.unused), "skipped": dict(skipped)}
                meta |= hashes(new)
                (new / META).write_text(json.dumps(meta, indent=2))
                replace_folder(new, self.folder)
            except BaseException:
                if new.exists():
                    discard(new, self.folder)
                raise

    def _open(self):
        meta = self._meta()
        try:
            columns = mapped(self.folder)
            whole = hashes(self.folder).items() <= meta.items()
        except (OSError, ValueError) as e:
            raise UserError(f"{self.folder} is a damaged cache ({first_line(e)}); remove it") from e
        require(whole, f"{self.folder} is a damaged cache (its tokens have changed); remove it")
        self.groups, self.skipped = Groups.of(columns, meta["tokens"]), Counter(meta["skipped"])
        self.form, self.unused = meta["form"], meta["unused"]

    def held(self, which: set[int]) -> list[dict]:
        """The rows of some groups. The file is read again for them, once: they are kept beside the groups."""
        if not self.rows.path.is_file():
            return rows_of(self.groups, self.given, which)
        name = hashlib.sha256(np.array(sorted(which)).tobytes()).hexdigest()[:16]
        file = self.folder / f"rows-{name}.json"
        try:
            rows, known = json.loads(file.read_bytes())
            if known == digest([json.dumps(rows).encode()]):
                return rows
        except (OSError, ValueError, TypeError):
            pass  # made below
        same = zip(self.rows, self.groups.of_row.tolist(), strict=False)  # of a changed file they are not as many
        rows, place = [row for row, group in same if group in which], self.rows.path
        require(self._stamp() == self._meta()["stamp"], f"{place} was changed while it was read; repeat the command")
        content = json.dumps([rows, digest([json.dumps(rows).encode()])])
        replace_file(file, lambda new: new.write_text(content, encoding="utf-8"))
        return rows


def hashes(folder: Path) -> dict[str, str]:
    """The hashes of a folder's columns: of the groups, as `Groups.digest`, and of the rows that they are from."""
    of_groups = [folder / name for name in COLUMNS if name != "of_row"]
    return {"tokens": digest(in_parts(*of_groups)), "rows": digest(in_parts(folder / "of_row"))}
