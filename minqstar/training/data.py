"""Preference rows to packed, prefix-shared batches (the layout is drawn in `PackedData`).

A *group* is a prompt with its responses: those of its pairs or rankings, or its completions. The prompt is
stored once and each response is a branch that sees the prompt and itself. Several groups share a row.

    python -m minqstar.training.data prefs.jsonl --train-vocabulary prefs.tiktoken     # a vocabulary of one's own
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

from minqstar.console import Console
from minqstar.errors import UserError, require
from minqstar.files import check_output
from minqstar.lm.memory import mask_bytes, memory_of, require_memory
from minqstar.lm.tokenizer import Answer, Tokens, Unusable, train_vocabulary, turn
from minqstar.training.formats import Rows, answers_of, is_compared
from minqstar.training.groups import Group, Groups, GroupWriter, digest, fit, prompt_key, ranges, sizes_of

TOKEN_BYTES = 10  # that a token takes in memory: 4 in an array, which is copied when it grows, and its row's numbers


def unusable(prompt: list[int], answers: Sequence[Answer], block_size: int) -> str | None:
    """Why a row is skipped, or None."""
    if not prompt:
        return "empty prompt"
    if min(len(ids) - len(given) for ids, given in answers) <= 1:
        return "empty response"
    if any(one in answers[:place] for place, one in enumerate(answers)):
        return "chosen equals rejected" if len(answers) == 2 else "a response is ranked twice"
    longest = len(prompt) + max(len(ids) for ids, _ in answers)
    return f"longer than {block_size} tokens" if longest > block_size else None


def reasons_of(skipped: Counter[str]) -> str:
    """Why rows were skipped, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())


def tokenize(
    rows: Iterable[dict],
    tokenizer: Tokens,
    block_size: int,
    share: bool = True,
    writer: GroupWriter | None = None,
    advance: Callable[[float], None] | None = None,
) -> tuple[Groups, Counter[str]]:
    """Groups, and how many rows were skipped for which reason. Nothing is cut.

    Prompt and response are tokenised apart and concatenated. Neighbouring rows with one prompt become one group, as
    long as it fits the context: its keys and values are computed once for all of their responses. Without `share`
    every row is a group of its own. With a `writer` the groups go where it writes. UserError if some rows are pairs or
    rankings and others are not, or if a row cannot be written as this tokenizer wants it.
    """
    skipped, most = Counter(), memory_of(torch.device("cpu")) / TOKEN_BYTES
    room, writer, compared = (writer and writer.folder) is None, writer or GroupWriter(), None
    last, prompt, length = None, [], 0  # the last group's prompt, its ids, and the group's length
    for number, row in enumerate(rows, 1):
        if advance and number % 1000 == 0:
            advance(rows.share)
        before, compared, text = compared, is_compared(row), row.get("prompt")
        known = text is not None and text == last
        try:
            same = before in (None, compared)
            require(same, "some rows have chosen and rejected, others completion; split them into two files")
            ids, answers = encoded(row, tokenizer, prompt if known else None)
            why = unusable(ids, answers, block_size)
        except Unusable as e:
            why = e.why
        except UserError as e:
            raise UserError(f"{rows.place if isinstance(rows, Rows) else f'row {number}'}: {e}") from e
        if why:
            skipped[why] += 1
            writer.row(skipped=True)
            continue
        responses, given = zip(*answers, strict=True)
        size = sum(map(len, responses))
        if share and known and length + size <= block_size:
            writer.extend_last(responses, given)
            length += size
        else:
            writer.add(ids, responses, given, key=row_key(row, ids, answers))
            last, prompt, length = text, ids, len(ids) + size
            fits = not room or writer.tokens < most
            require(fits, f"the data hold more than {most:,.0f} tokens, too many for the memory")
        writer.row()
    return Groups.of(writer.columns()), skipped


def row_key(row: dict, prompt: list[int], answers: list[Answer]) -> int:
    """What tells a row's prompt from others; a plain text is told from others as a whole."""
    return prompt_key(prompt + answers[0][0] if "text" in row else prompt)


def encoded(row: dict, tokenizer: Tokens, prompt: list[int] | None = None) -> tuple[list[int], list[Answer]]:
    """The ids of a row's prompt, unless they are known, and its answers. A plain text answers its own first token."""
    if "text" in row:
        ids = tokenizer.encode_text(row["text"])
        return ids[:1], [([*ids[1:], tokenizer.eos], ())]
    ids = tokenizer.encode_prompt(row["prompt"]) if prompt is None else prompt
    return ids, [tokenizer.encode_answer(row["prompt"], answer) for answer in answers_of(row).values()]


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
    sizes: tuple[int, ...]  # how many of the R responses each ranking has, in order: 2 is a pair, 1 a completion

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
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sizes"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


class PackedData:
    """Groups packed into R rows of T tokens, once and for all: epochs shuffle rows, never what is in them.

        row:       p0 p1 p2 c0 c1 eos r0 eos | next group …
        before:    -1 p0 p1 p2 c0 c1  p2 r0
        branch:     0  0  0  1  1  1   2  2
        position:   0  1  2  3  4  5   3  4
        scored:    p2→c0 c0→c1 c1→eos   p2→r0 r0→eos

    The hidden state at `source` predicts the token `target`; this and `before` are the only shifts by one in training.
    Tokens that the environment wrote are seen and not scored. Rows are laid out when a batch asks for them: beside
    the groups, which may be in a file, there are a few numbers a group in memory.
    """

    def __init__(self, groups: Sequence[Group], pad: int, row_length: int):
        require(bool(groups), "no usable rows are left in the data")
        self.groups = groups if isinstance(groups, Groups) else Groups(groups)
        lengths = self.groups.lengths
        self.pad, self.row_length = pad, max(row_length, int(lengths.max()))
        self.order, self.stops = fit(lengths, self.row_length)  # indices of groups, row by row; where rows begin, end
        g = self.groups.which[self.order]
        self.first_scored = self._by_row(self.groups.scored[g])
        self.responses_in_row = np.diff(self._by_row(np.diff(self.groups.first)[g] - 1))

    def _by_row(self, of_group: np.ndarray) -> np.ndarray:
        """The sum over all rows before each row, and over all."""
        return np.concatenate([[0], np.cumsum(of_group)])[self.stops]

    def __len__(self) -> int:
        return len(self.stops) - 1

    @property
    def num_scored(self) -> int:
        return int(self.first_scored[-1])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every token, of its place and of what is scored."""
        known = f"{self.groups.digest} {self.row_length}".encode()
        return digest([known, self.groups.which.tobytes(), self.order.tobytes(), self.stops.tobytes()])

    def scored(self, rows: np.ndarray) -> np.ndarray:
        """Indices of the rows' scored tokens, in order."""
        return ranges(self.first_scored[rows], self.first_scored[rows + 1] - self.first_scored[rows])

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows laid out: first their groups, then the groups' texts, then the texts' tokens, all in order."""
        rows, of = np.asarray(rows, dtype=np.int64), self.groups
        in_row = self.stops[rows + 1] - self.stops[rows]
        row, g = np.repeat(np.arange(len(rows)), in_row), of.which[self.order[ranges(self.stops[rows], in_row)]]
        group = ranges(np.zeros_like(rows), in_row)

        texts = of.first[g + 1] - of.first[g]
        text = ranges(of.first[g], texts)
        row, group, branch = np.repeat(row, texts), np.repeat(group, texts), text - np.repeat(of.first[g], texts)
        start, length = of.stops[text], of.stops[text + 1] - of.stops[text]
        prompt = np.repeat(length[branch == 0], texts)  # how long the text's prompt is
        at = np.cumsum(length) - length
        at += row * self.row_length - at[np.searchsorted(row, row)]  # where in the B*T positions it begins

        ids = of.tokens[ranges(start, length)]
        given, ids = ids < 0, np.where(ids < 0, -1 - ids, ids).astype(np.int64)
        place = ranges(at, length)
        shape = (len(rows), self.row_length)
        tokens = np.full(shape, self.pad, dtype=np.int64)
        before, groups = (np.full(shape, -1, dtype=np.int64) for _ in range(2))
        positions, branches = (np.zeros(shape, dtype=np.int64) for _ in range(2))
        tokens.flat[place] = ids
        groups.flat[place], branches.flat[place] = np.repeat(group, length), np.repeat(branch, length)
        positions.flat[place] = ranges(np.where(branch > 0, prompt, 0), length)
        source = place - 1
        first = np.cumsum(length) - length  # the first token of each text
        last = np.repeat((at + length - 1)[branch == 0], texts)  # a prompt's last predicts the first of each branch
        source[first] = np.where(branch > 0, last, -1)
        before.flat[place] = np.where(source < 0, -1, tokens.flat[source])

        scored = np.repeat(branch > 0, length) & ~given
        response = np.repeat(np.cumsum(branch > 0) - 1, length)
        parts = (tokens, before, positions, groups, branches, source[scored], ids[scored], response[scored])
        return Batch(*map(torch.from_numpy, parts), sizes_of(of.place[text[branch > 0]]))

    def batches(self, order: Iterable[int], size: int) -> Iterator[Batch]:
        order = np.fromiter(order, dtype=np.int64)
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])


@dataclass(frozen=True)
class Options:
    """Train a vocabulary on the texts of a file."""

    data: Annotated[Path, tyro.conf.Positional]
    """Preference pairs or answers: JSON, JSONL or parquet, in any of the usual formats."""
    train_vocabulary: Path
    """Where to write it."""
    vocabulary_size: int = 1024
    """Tokens, EOS and PAD included; fewer if the texts offer no more to merge."""


def main(options: Options):
    check_output(options.train_vocabulary, ".tiktoken", options.data)
    values = (value for row in Rows(options.data) for value in (row.get("prompt", ""), *answers_of(row).values()))
    texts = (value if isinstance(value, str) else "".join(map(turn, value)) for value in values)
    tokenizer = train_vocabulary(texts, options.vocabulary_size)
    tokenizer.save(options.train_vocabulary)
    Console().say(f"wrote {options.train_vocabulary}: {tokenizer.n_vocab} tokens")


if __name__ == "__main__":
    from minqstar.cli import run

    run(main, Options, prog="python -m minqstar.training.data")
