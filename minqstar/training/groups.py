"""Tokenised rows: groups of a prompt with its responses, their token ids in one array."""

from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple


class Group(NamedTuple):
    """Token ids of a prompt and of its responses, each with its EOS; of pairs chosen and rejected alternate."""

    prompt: list[int]
    responses: tuple[list[int], ...]

    @property
    def length(self) -> int:
        """Positions that it takes in a row."""
        return len(self.prompt) + sum(map(len, self.responses))


class Groups(Sequence[Group]):
    """Groups whose token ids stand in one array: in memory they take what their tokens take, 4 bytes each."""

    def __init__(self, groups: Iterable[Group] = ()):
        self.tokens = array("i")  # a prompt, its responses, the next prompt, …
        self.stops = array("q", [0])  # where each of these texts ends in `tokens`, behind where the first begins
        self.first = array("q")  # which of the texts is each group's prompt
        self.pairs = False  # whether responses are chosen and rejected in turn
        self.of_row = array("q")  # of each row that was tokenised the group that it is in, -1 if it was skipped
        for group in groups:
            self.add(*group)

    def add(self, prompt: list[int], responses: Iterable[list[int]]):
        """One group more."""
        self.first.append(len(self.stops) - 1)
        self.extend_last((prompt, *responses))

    def extend_last(self, responses: Iterable[list[int]]):
        """More responses in the last group."""
        for ids in responses:
            self.tokens.fromlist(ids)
            self.stops.append(len(self.tokens))

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, i: int | slice) -> Group | list[Group]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        texts = range(self.first[i], self.first[i + 1] if i + 1 < len(self) else len(self.stops) - 1)
        prompt, *responses = (self.tokens[self.stops[t] : self.stops[t + 1]].tolist() for t in texts)
        return Group(prompt, tuple(responses))

    @property
    def used(self) -> int:
        """How many rows they are from."""
        return sum(group >= 0 for group in self.of_row)

    def without(self, some: set[int]) -> "Groups":
        """The others, with what is known of their rows."""
        place = {i: place for place, i in enumerate(i for i in range(len(self)) if i not in some)}
        others = Groups(self[i] for i in place)
        others.pairs, others.of_row = self.pairs, array("q", (place.get(i, -1) for i in self.of_row))
        return others


def rows_of(groups: Groups, rows: Iterable[dict], which: Collection[int] | None = None) -> list[dict]:
    """Of the rows that were tokenised those that are in the groups, or in some of them."""
    which = range(len(groups)) if which is None else which
    return [row for row, group in zip(rows, groups.of_row, strict=True) if group in which]
