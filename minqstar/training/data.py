"""Preference rows to packed, prefix-shared batches (the layout is drawn in `PackedData`).

A *group* is a prompt with its responses: chosen and rejected of its pairs, or its completions. The prompt is
stored once and each response is a branch that sees the prompt and itself. Several groups share a row.

    python -m minqstar.training.data prefs.jsonl --train-vocabulary prefs.tiktoken     # a vocabulary of one's own
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

from minqstar.console import Console
from minqstar.errors import require
from minqstar.files import check_output
from minqstar.lm.memory import mask_bytes, memory_of, require_memory
from minqstar.lm.tokenizer import NoToken, Tokenizer, train_vocabulary
from minqstar.training.formats import RESPONSE_FIELDS, read_jsonl
from minqstar.training.groups import Group, Groups

TOKEN_BYTES = 30  # that a token takes here, read and packed


def unusable(prompt: list[int], responses: Sequence[list[int]], block_size: int) -> str | None:
    """Why a row is skipped, or None."""
    if not prompt:
        return "empty prompt"
    if min(map(len, responses)) == 1:
        return "empty response"
    if len(responses) == 2 and responses[0] == responses[1]:
        return "chosen equals rejected"
    longest = len(prompt) + max(map(len, responses))
    return f"longer than the context of {block_size} tokens" if longest > block_size else None


def reasons_of(skipped: Counter[str]) -> str:
    """Why rows were skipped, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())


def tokenize(
    rows: Iterable[dict], tokenizer: Tokenizer, block_size: int, share: bool = True
) -> tuple[Groups, Counter[str]]:
    """Groups, and how many rows were skipped for which reason. Nothing is cut.

    Prompt and response are tokenised apart and concatenated. Neighbouring rows with one prompt become one group, as
    long as it fits the context: its keys and values are computed once for all of their responses. Without `share`
    every row is a group of its own. UserError if some rows are pairs and others are not.
    """
    groups, skipped, most = Groups(), Counter(), memory_of(torch.device("cpu")) / TOKEN_BYTES
    text, prompt, last, length = None, [], None, 0  # this row's prompt; the last group's, and the group's length
    for row in rows:
        pairs = "chosen" in row
        same = pairs == groups.pairs or not groups.of_row
        require(same, "some rows have chosen and rejected, others completion; split them into two files")
        groups.pairs = pairs
        try:
            if row["prompt"] != text:
                text, prompt = None, tokenizer.encode_prompt(row["prompt"])
                text = row["prompt"]
            responses = [tokenizer.encode_response(row[name]) for name in RESPONSE_FIELDS[not pairs]]
            why = unusable(prompt, responses, block_size)
        except NoToken:
            responses, why = [], "with a character that has no token"
        size = sum(map(len, responses))
        if why:
            skipped[why] += 1
        elif share and text == last and length + size <= block_size:
            groups.extend_last(responses)
            length += size
        else:
            groups.add(prompt, responses)
            last, length = text, len(prompt) + size
            require(len(groups.tokens) < most, f"the data hold more than {most:,.0f} tokens, too many for the memory")
        groups.of_row.append(-1 if why else len(groups) - 1)
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
        B, T = self.tokens.shape
        lower = "row-length or micro-tokens of the stage"
        require_memory(mask_bytes(B, T, T), f"{B} rows of {T:,} tokens at once", lower, self.tokens.device)
        same = self.group[:, :, None] == self.group[:, None, :]
        own = (self.branch[:, None, :] == 0) | (self.branch[:, :, None] == self.branch[:, None, :])
        causal = torch.ones(T, T, dtype=torch.bool, device=same.device).tril()
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
        lengths = [group.length for group in groups]
        self.row_length = max(row_length, *lengths)
        rows = fit(lengths, self.row_length)
        shape, place = (len(rows), self.row_length), np.int16 if self.row_length < 2**15 else np.int32
        self.tokens = np.full(shape, pad, dtype=np.int32)
        self.before = np.full(shape, -1, dtype=np.int32)
        self.positions = np.zeros(shape, dtype=place)
        self.group = np.full(shape, -1, dtype=place)
        self.branch = np.zeros(shape, dtype=place)
        self.members = rows  # for each row the indices of its groups, in order
        source, target, response = array("i"), array("i"), array("i")
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
                    source.fromlist([last, *range(end, end + len(ids) - 1)])
                    target.fromlist(ids)
                    response.fromlist([count] * len(ids))
                    end, count, scored = end + len(ids), count + 1, scored + len(ids)
                at = end
            self.first_scored.append(self.first_scored[-1] + scored)
            self.responses_in_row.append(count)
        self.source, self.response = np.array(source, dtype=place), np.array(response, dtype=place)
        self.target = np.array(target, dtype=np.int32)
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
        for part in (self.tokens, self.group, self.branch, self.source, self.target):
            digest.update(repr(part.shape).encode() + part.astype(np.int32).tobytes())
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
