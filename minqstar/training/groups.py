"""Tokenised rows: groups of a prompt with its responses, their token ids in arrays, in memory or mapped from files."""

import hashlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

COLUMNS = {"tokens": "i", "stops": "q", "first": "q", "scored": "q", "prompt": "q", "of_row": "q"}  # types of numbers
SPILL = 2**20  # tokens that are kept in memory before the columns go on in their files


class Group(NamedTuple):
    """Token ids of a prompt and of its responses, each with its EOS; of pairs chosen and rejected alternate.

    `given` holds for each response the places of those tokens that the environment wrote (a tool, a user's turn inside
    the response), which are seen and not scored. It is empty where there are none.
    """

    prompt: list[int]
    responses: tuple[list[int], ...]
    given: tuple[tuple[int, ...], ...] = ()

    @property
    def length(self) -> int:
        """Positions that it takes in a row."""
        return len(self.prompt) + sum(map(len, self.responses))


class Groups(Sequence[Group]):
    """Groups whose token ids stand in one array: they take what their tokens take, 4 bytes each.

    The array may be mapped from a file, and these may be some of the groups in it.
    """

    def __init__(self, groups: Iterable[Group] = ()):
        writer = GroupWriter()
        for group in groups:
            writer.add(*group)
        self._set(writer.columns(), pairs=False)

    @classmethod
    def of(cls, columns: dict[str, np.ndarray], pairs: bool, known: str | None = None) -> "Groups":
        """The groups of a `GroupWriter`'s columns, with their `digest` if it is known.

        `pairs` says whether responses are chosen and rejected in turn.
        """
        groups = cls.__new__(cls)
        groups._set(columns, pairs)
        if known:
            groups.digest = known
        return groups

    def _set(self, columns: dict[str, np.ndarray], pairs: bool):
        self.tokens = columns["tokens"]  # a prompt, its responses, the next prompt, …; -1 - id of a token that is given
        self.stops = columns["stops"]  # where each of these texts ends in `tokens`, behind where the first begins
        self.first = columns["first"]  # which of the texts is each group's prompt, and how many texts there are
        self.scored = columns["scored"]  # scored tokens of each group
        self.prompt = columns["prompt"]  # the `prompt_key` of each group
        self.of_row = columns["of_row"]  # of each row that was tokenised the group that it is in, -1 if it was skipped
        self.which = np.arange(len(self.scored))  # the groups that these are
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, i: int | slice) -> Group | list[Group]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        g = self.which[range(len(self))[i]]
        texts = [self.tokens[slice(*self.stops[t : t + 2])] for t in range(*self.first[g : g + 2])]
        given = tuple(tuple(np.flatnonzero(ids < 0).tolist()) for ids in texts[1:])
        prompt, *responses = (np.where(ids < 0, -1 - ids, ids).tolist() for ids in texts)
        return Group(prompt, tuple(responses), given if any(given) else ())

    @property
    def lengths(self) -> np.ndarray:
        """Positions that each group takes in a row."""
        start, stop = (self.first[self.which + end] for end in (0, 1))
        return self.stops[stop] - self.stops[start]

    @property
    def used(self) -> int:
        """How many rows they are from."""
        return int((self.of_row >= 0).sum())

    def prompt_keys(self) -> np.ndarray:
        """The `prompt_key` of each of these groups."""
        return self.prompt[self.which]

    @cached_property
    def digest(self) -> str:
        """A hash of every token, of its place and of what is scored, for all groups that the arrays hold."""
        return digest(vars(self)[name].tobytes() for name in COLUMNS if name != "of_row")

    def without(self, some: Collection[int]) -> "Groups":
        """The others, with what is known of their rows."""
        kept = np.ones(len(self), dtype=bool)
        kept[list(some)] = False
        others = Groups.of(vars(self), self.pairs, vars(self).get("digest"))
        others.which = self.which[kept]
        place = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)  # the last is that of skipped rows
        others.of_row = place[self.of_row]
        return others


def prompt_key(ids: list[int]) -> int:
    """A number of 64 bits for a prompt: equal prompts have equal numbers, and others hardly ever."""
    whole = hashlib.blake2b(array(COLUMNS["tokens"], ids).tobytes(), digest_size=8)
    return int.from_bytes(whole.digest(), "little", signed=True)


def digest(parts: Iterable[bytes]) -> str:
    """sha256 of some parts, one after the other."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def in_parts(*files: Path) -> Iterator[bytes]:
    """The bytes of some files. Read so, and not through a map, they leave nothing in the process's memory."""
    for path in files:
        with open(path, "rb") as file:
            while part := file.read(SPILL):
                yield part


class GroupWriter:
    """Takes groups one by one, into memory or into the files of a folder."""

    def __init__(self, folder: Path | None = None):
        self.folder, self.groups, self.texts, self.tokens = folder, 0, 0, 0
        self.parts = {name: array(kind) for name, kind in COLUMNS.items()}
        self.parts["stops"].append(0)

    def add(
        self,
        prompt: list[int],
        responses: Sequence[list[int]],
        given: Sequence[Collection[int]] = (),
        key: int | None = None,
    ):
        """One group more; `key` tells its prompt from others, where its ids do not."""
        if self.folder and len(self.parts["tokens"]) >= SPILL:
            self._spill()
        self.groups += 1
        self.parts["first"].append(self.texts)
        self.parts["scored"].append(0)
        self.parts["prompt"].append(prompt_key(prompt) if key is None else key)
        self._text(prompt)
        self.extend_last(responses, given)

    def extend_last(self, responses: Sequence[list[int]], given: Sequence[Collection[int]] = ()):
        """More responses in the last group."""
        for ids, of_it in zip(responses, given or [()] * len(responses), strict=True):
            self._text([-1 - i if place in of_it else i for place, i in enumerate(ids)] if of_it else ids)
            self.parts["scored"][-1] += len(ids) - len(of_it)

    def _text(self, ids: list[int]):
        self.parts["tokens"].fromlist(ids)
        self.texts, self.tokens = self.texts + 1, self.tokens + len(ids)
        self.parts["stops"].append(self.tokens)

    def row(self, skipped: bool = False):
        """One row more: it is in the last group, or was skipped."""
        self.parts["of_row"].append(-1 if skipped else self.groups - 1)

    def _spill(self):
        for name, part in self.parts.items():
            with open(self.folder / name, "ab") as file:
                part.tofile(file)
            self.parts[name] = array(COLUMNS[name])

    def columns(self) -> dict[str, np.ndarray]:
        """All that was taken, complete."""
        self.parts["first"].append(self.texts)
        if not self.folder:
            return {name: np.asarray(part) for name, part in self.parts.items()}
        self._spill()
        return mapped(self.folder)


def mapped(folder: Path) -> dict[str, np.ndarray]:
    """The columns that a `GroupWriter` wrote into a folder; what is read of them stays in no process's own memory."""
    return {
        name: np.memmap(folder / name, kind, "r") if (folder / name).stat().st_size else np.array([], kind)
        for name, kind in COLUMNS.items()
    }


def rows_of(groups: Groups, rows: Iterable[dict], which: Collection[int] | None = None) -> list[dict]:
    """Of the rows that were tokenised those that are in the groups, or in some of them."""
    which = range(len(groups)) if which is None else which
    return [row for row, group in zip(rows, groups.of_row.tolist(), strict=True) if group in which]
