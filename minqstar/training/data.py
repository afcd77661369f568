"""Preference files to packed, prefix-shared batches (the layout is drawn in `PackedData`).

A *group* is a prompt with its responses: chosen and rejected of its pairs, or its completions. The prompt is
stored once and each response is a branch that sees the prompt and itself. Several groups share a row.

    python -m minqstar.training.data prefs.jsonl --train-vocabulary prefs.tiktoken     # a vocabulary of one's own
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from minqstar.console import Console
from minqstar.errors import UserError, first_line, is_text, require
from minqstar.files import check_output
from minqstar.lm.tokenizer import Tokenizer, train_vocabulary

RESPONSE_FIELDS = (("chosen", "rejected"), ("completion",))


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file: objects with `prompt` and either `chosen` and `rejected`, or `completion`, all strings.

    Blank lines are passed over. UserError names the file and line of the first row that is anything else.
    """
    try:
        with open(path, "rb") as file:
            numbered = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    require(bool(numbered), f"{path}: holds no rows")
    return [_checked(line, f"{path}:{number}") for number, line in numbered]


def read_pairs(path: Path | str) -> list[dict]:
    """The rows of a preference file: objects with the strings `prompt`, `chosen` and `rejected`. UserError if not."""
    rows = read_jsonl(Path(path))
    require(all("chosen" in row for row in rows), f"{path}: want rows with chosen and rejected, not completion")
    return rows


def _checked(line: bytes, place: str) -> dict:
    array = line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    require(not array, f"{place}: a JSON array begins here; want one object a line, without brackets")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(f"{place}: not UTF-8 text") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{place}: not JSON ({first_line(e)})") from e
    require(isinstance(row, dict), f"{place}: want an object, got {type(row).__name__}")
    names = next((names for names in RESPONSE_FIELDS if any(name in row for name in names)), RESPONSE_FIELDS[0])
    hint = "" if set(names) & row.keys() else "; the response of a row that has only one is called 'completion'"
    for name in ("prompt", *names):
        require(name in row, f"{place}: the field {name!r} is missing{hint}")
        require(isinstance(row[name], str), f"{place}: {name!r} must be a string, got {type(row[name]).__name__}")
        require(is_text(row[name]), f"{place}: {name!r} holds half of a surrogate pair, which is no character")
    return row


class Group(NamedTuple):
    """Token ids of a prompt and of its responses, each with its EOS; of pairs chosen and rejected alternate."""

    prompt: list[int]
    responses: tuple[list[int], ...]

    @property
    def length(self) -> int:
        """Positions that it takes in a row."""
        return len(self.prompt) + sum(map(len, self.responses))


def tokenize(
    rows: Sequence[dict], tokenizer: Tokenizer, block_size: int, share: bool = True
) -> tuple[list[Group], Counter[str]]:
    """Groups, and how many rows were skipped for which reason. Nothing is cut.

    Prompt and response are tokenised apart and concatenated. Neighbouring rows with one prompt become one group, as
    long as it fits the context: its keys and values are computed once for all of their responses. Without `share`
    every row is a group of its own.
    """
    texts = [[row[name] for name in (RESPONSE_FIELDS[0] if "chosen" in row else RESPONSE_FIELDS[1])] for row in rows]
    ids_of = {prompt: tokenizer.encode(prompt) for prompt in {row["prompt"] for row in rows}}
    groups, skipped = [], Counter()
    for row, text in zip(rows, texts, strict=True):
        prompt = ids_of[row["prompt"]]
        ids = tuple(map(tokenizer.encode_response, text))
        if not prompt:
            skipped["empty prompt"] += 1
        elif min(map(len, ids)) == 1:
            skipped["empty response"] += 1
        elif len(text) == 2 and text[0] == text[1]:
            skipped["chosen equals rejected"] += 1
        elif len(prompt) + max(map(len, ids)) > block_size:
            skipped[f"longer than the context of {block_size} tokens"] += 1
        elif share and groups and groups[-1].prompt == prompt and groups[-1].length + sum(map(len, ids)) <= block_size:
            groups[-1] = Group(prompt, groups[-1].responses + ids)
        else:
            groups.append(Group(prompt, ids))
    return groups, skipped


@dataclass(frozen=True)
class Batch:
    """B packed rows of T tokens with R responses, S scored tokens. Row-major order throughout."""

    tokens: Tensor  # (B, T) int64
    before: Tensor  # (B, T) int64: the token before it, a prompt's last before each branch; -1 before a prompt
    positions: Tensor  # (B, T) int64: every branch restarts at its prompt's length
    group: Tensor  # (B, T) int64: which group of the row; -1 on padding
    branch: Tensor  # (B, T) int64: 0 prompt, 1 first response, 2 second, …
    source: Tensor  # (S,) int64: index into the B*T hidden states of the one that predicts …
    target: Tensor  # (S,) int64: … this token
    response: Tensor  # (S,) int64 in [0, R): the response that it belongs to
    num_responses: int

    def mask(self) -> Tensor:
        """(B, 1, T, T) bool: same group, not later, and the key is prompt or of the query's own branch."""
        same = self.group[:, :, None] == self.group[:, None, :]
        own = (self.branch[:, None, :] == 0) | (self.branch[:, :, None] == self.branch[:, None, :])
        causal = torch.ones(self.tokens.shape[1], self.tokens.shape[1], dtype=torch.bool, device=same.device).tril()
        return (same & own & causal)[:, None]

    def to(self, device: torch.device) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_responses"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Which items share a row: longest first, each into the fullest row that still takes it."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by the room left in them
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        room = next((room for room in range(length, row_length + 1) if with_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, row_length
        else:
            row = with_room[room].pop()
        rows[row].append(item)
        with_room[room - length].append(row)
    return rows


class PackedData:
    """Groups packed into R rows of T tokens, once and for all: epochs shuffle rows, never what is in them.

        row:       p0 p1 p2 c0 c1 eos r0 eos | next group …
        before:    -1 p0 p1 p2 c0 c1  p2 r0
        branch:     0  0  0  1  1  1   2  2
        position:   0  1  2  3  4  5   3  4
        scored:    p2→c0 c0→c1 c1→eos   p2→r0 r0→eos

    The hidden state at `source` predicts the token `target`; this and `before` are the only shifts by one in training.
    """

    def __init__(self, groups: Sequence[Group], pad: int, row_length: int):
        require(bool(groups), "no usable rows are left in the data")
        self.row_length = max(row_length, max(group.length for group in groups))
        rows = fit([group.length for group in groups], self.row_length)
        shape = (len(rows), self.row_length)
        self.tokens = np.full(shape, pad, dtype=np.int32)
        self.before = np.full(shape, -1, dtype=np.int32)
        self.positions = np.zeros(shape, dtype=np.int32)
        self.group = np.full(shape, -1, dtype=np.int32)
        self.branch = np.zeros(shape, dtype=np.int32)
        self.members = rows  # for each row the indices of its groups, in order
        source, target, response = [], [], []
        self.first_scored, self.responses_in_row = [0], []
        for r, row in enumerate(rows):
            at = count = scored = 0
            for g, member in enumerate(row):
                prompt, responses = groups[member]
                end = at + len(prompt)
                self._place(r, at, prompt, -1, 0, g, 0)
                last = end - 1  # the prompt's last position predicts the first token of every branch
                for branch, ids in enumerate(responses, 1):
                    self._place(r, end, ids, prompt[-1], len(prompt), g, branch)
                    source += [last, *range(end, end + len(ids) - 1)]
                    target += ids
                    response += [count] * len(ids)
                    end, count, scored = end + len(ids), count + 1, scored + len(ids)
                at = end
            self.first_scored.append(self.first_scored[-1] + scored)
            self.responses_in_row.append(count)
        self.source, self.target, self.response = (np.array(x, dtype=np.int32) for x in (source, target, response))
        self.first_scored = np.array(self.first_scored)
        self.responses_in_row = np.array(self.responses_in_row)

    def _place(self, row: int, at: int, ids: list[int], before: int, position: int, group: int, branch: int):
        here = slice(at, at + len(ids))
        self.tokens[row, here] = ids
        self.before[row, here] = [before, *ids[:-1]]
        self.positions[row, here] = np.arange(position, position + len(ids))
        self.group[row, here] = group
        self.branch[row, here] = branch

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_scored(self) -> int:
        return len(self.target)

    def fingerprint(self) -> str:
        """A hash of every token, of its place and of what is scored."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.group, self.branch, self.source, self.target):
            digest.update(repr(array.shape).encode() + array.tobytes())
        return digest.hexdigest()

    def scored(self, rows: np.ndarray) -> np.ndarray:
        """Indices of the rows' scored tokens, in order."""
        return np.concatenate([np.arange(self.first_scored[r], self.first_scored[r + 1]) for r in rows])

    def batch(self, rows: np.ndarray) -> Batch:
        scored = self.scored(rows)
        counts = self.first_scored[rows + 1] - self.first_scored[rows]
        row_of = np.repeat(np.arange(len(rows)), counts)
        first_response = np.cumsum(self.responses_in_row[rows]) - self.responses_in_row[rows]
        arrays = (
            *(array[rows] for array in (self.tokens, self.before, self.positions, self.group, self.branch)),
            self.source[scored] + row_of * self.row_length,
            self.target[scored],
            self.response[scored] + first_response[row_of],
        )
        tensors = (torch.from_numpy(array.astype(np.int64)) for array in arrays)
        return Batch(*tensors, num_responses=int(self.responses_in_row[rows].sum()))

    def batches(self, order: Iterable[int], size: int) -> Iterator[Batch]:
        order = np.fromiter(order, dtype=np.int64)
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])


@dataclass(frozen=True)
class Options:
    """Train a vocabulary on the texts of a file."""

    data: Annotated[Path, tyro.conf.Positional]
    """JSONL of prompt, chosen, rejected, or of prompt, completion."""
    train_vocabulary: Path
    """Where to write it."""
    vocabulary_size: int = 1024
    """Tokens, EOS and PAD included; fewer if the texts offer no more to merge."""


def main(options: Options):
    check_output(options.train_vocabulary, ".tiktoken", options.data)
    names = ("prompt", *RESPONSE_FIELDS[0], *RESPONSE_FIELDS[1])
    texts = (row[name] for row in read_jsonl(options.data) for name in names if isinstance(row.get(name), str))
    tokenizer = train_vocabulary(texts, options.vocabulary_size)
    tokenizer.save(options.train_vocabulary)
    Console().say(f"wrote {options.train_vocabulary}: {tokenizer.n_vocab} tokens")


if __name__ == "__main__":
    from minqstar.cli import run

    run(main, Options, prog="python -m minqstar.training.data")
