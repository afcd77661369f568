"""Tokenised rows: groups of a prompt with its responses, their token ids in arrays, in memory or mapped from files."""

import hashlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

COLUMNS = {
    "tokens": "i",
    "stops": "q",
    "place": "i",
    "first": "q",
    "scored": "q",
    "prompt": "q",
    "of_row": "q",
}  # types of numbers
SPILL = 2**20  # tokens that are kept in memory before the columns go on in their files


class Group(NamedTuple):
    """Token ids of a prompt and of its responses, each with its EOS.

    `given` holds for each response the places of those tokens that the environment wrote (a tool, a user's turn inside
    the response), which are seen and not scored. It is empty where there are none.
    `sizes` says how many responses each ranking has, the best of it first: 2 is a pair, 1 a completion. It is empty
    where all of the responses are one ranking.
    """

    prompt: list[int]
    responses: tuple[list[int], ...]
    given: tuple[tuple[int, ...], ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Positions that it takes in a row."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def rankings(self) -> tuple[int, ...]:
        """How many responses each of its rankings has."""
        return self.sizes or (len(self.responses),)

    def best(self) -> "Group":
        """The prompt with the best response of each ranking."""
        first = list(accumulate((0, *self.rankings[:-1])))
        responses, given = (tuple(of[i] for i in first) if of else () for of in self[1:3])
        return Group(self.prompt, responses, given, (1,) * len(first))


class Groups(Sequence[Group]):
    """Groups whose token ids stand in one array: they take what their tokens take, 4 bytes each.

    The array may be mapped from a file, and these may be some of the groups in it.
    """

    def __init__(self, groups: Iterable[Group] = ()):
        writer = GroupWriter()
        for prompt, responses, given, sizes in groups:
            writer.add(prompt, responses, given, sizes)
        self._set(writer.columns())

    @classmethod
    def of(cls, columns: dict[str, np.ndarray], known: str | None = None) -> "Groups":
        """The groups of a `GroupWriter`'s columns, with their `digest` if it is known."""
        groups = cls.__new__(cls)
        groups._set(columns)
        if known:
            groups.digest = known
        return groups

    def _set(self, columns: dict[str, np.ndarray]):
        self.tokens = columns["tokens"]  # a prompt, its responses, the next prompt, …; -1 - id of a token that is given
        self.stops = columns["stops"]  # where each of these texts ends in `tokens`, behind where the first begins
        self.place = columns["place"]  # of each text in its ranking, 0 the best; -1 of a prompt
        self.first = columns["first"]  # which of the texts is each group's prompt, and how many texts there are
        self.scored = columns["scored"]  # scored tokens of each group
        self.prompt = columns["prompt"]  # the `prompt_key` of each group
        self.of_row = columns["of_row"]  # of each row that was tokenised the group that it is in, -1 if it was skipped
        self.which = np.arange(len(self.scored))  # the groups that these are

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, i: int | slice) -> Group | list[Group]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        g = self.which[range(len(self))[i]]
        first, last = self.first[g : g + 2]
        texts = [self.tokens[slice(*self.stops[t : t + 2])] for t in range(first, last)]
        given = tuple(tuple(np.flatnonzero(ids < 0).tolist()) for ids in texts[1:])
        prompt, *responses = (np.where(ids < 0, -1 - ids, ids).tolist() for ids in texts)
        sizes = sizes_of(self.place[first + 1 : last])
        return Group(prompt, tuple(responses), given if any(given) else (), sizes if len(sizes) > 1 else ())

    @cached_property
    def compared(self) -> bool:
        """Whether responses are ranked, as those of a pair are."""
        return bool((self.place > 0).any())

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
        others = Groups.of(vars(self), vars(self).get("digest"))
        others.which = self.which[kept]
        place = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)  # the last is that of skipped rows
        others.of_row = place[self.of_row]
        return others


def sizes_of(place: np.ndarray) -> tuple[int, ...]:
    """How many responses each ranking has, from their places in it."""
    return tuple(np.diff(np.flatnonzero(np.append(place, 0) == 0)).tolist())


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
        sizes: Sequence[int] = (),
        key: int | None = None,
    ):
        """One group more, as in `Group`; `key` tells its prompt from others, where its ids do not."""
        if self.folder and len(self.parts["tokens"]) >= SPILL:
            self._spill()
        self.groups += 1
        self.parts["first"].append(self.texts)
        self.parts["scored"].append(0)
        self.parts["prompt"].append(prompt_key(prompt) if key is None else key)
        self._text(prompt, -1)
        self.extend_last(responses, given, sizes)

    def extend_last(
        self, responses: Sequence[list[int]], given: Sequence[Collection[int]] = (), sizes: Sequence[int] = ()
    ):
        """More responses in the last group."""
        ranks = chain.from_iterable(map(range, sizes or [len(responses)]))
        for ids, of_it, rank in zip(responses, given or [()] * len(responses), ranks, strict=True):
            self._text([-1 - i if place in of_it else i for place, i in enumerate(ids)] if of_it else ids, rank)
            self.parts["scored"][-1] += len(ids) - len(of_it)

    def _text(self, ids: list[int], place: int):
        self.parts["place"].append(place)
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


def fit(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Which items share a row: longest first, each into the fullest row that still takes it.

    The items row by row, and where in this order each row begins and the last one ends.
    """
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by the room left in them
    some, count = 0, 0  # bit r of `some`: a row has room r
    items = np.argsort(-np.asarray(lengths), kind="stable")
    rows = np.empty(len(items), dtype=np.int64)
    for place, length in enumerate(np.asarray(lengths)[items].tolist()):
        fitting = some >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            some ^= 0 if with_room[room] else 1 << room
        else:
            row, room, count = count, row_length, count + 1
        rows[place] = row
        with_room[room - length].append(row)
        some |= 1 << (room - length)
    stops = np.cumsum(np.bincount(rows, minlength=count))
    return items[np.argsort(rows, kind="stable")], np.concatenate([[0], stops])


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each start on, as many as its length says, one range behind the other."""
    return np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
