"""A tiktoken `Encoding` from a vocabulary file, and the training of such a file.

A vocabulary file holds one `<base64 bytes> <rank>` a line, tiktoken's own form. It is byte-level: ranks 0..255
are the bytes, so any text round-trips. Two special tokens follow the last rank: EOS, the action that ends a
response, and PAD, which fills packed rows and is never scored. Neither can be written in text.

    python -m minqstar.world.tldr --train-vocabulary minqstar/lm/vocab.tiktoken     # rebuilds the default vocabulary
"""

import base64
import binascii
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tiktoken

from minqstar.errors import UserError, needs, require
from minqstar.files import replace_file
from minqstar.text import read_text

EOS, PAD = "<|eos|>", "<|pad|>"
DEFAULT_VOCABULARY = Path(__file__).parent / "vocab.tiktoken"

# Words take the space before them, digits stand alone: a number is copied digit by digit, and texts that are
# joined at a space or around a digit are tokenised alike joined and apart.
# The count in braces bounds the matcher's recursion on endless white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s{1,256}(?!\S)|\s"


ROLES = {"user": "Human", "assistant": "Assistant"}  # as Anthropic's HH data have them
OPENED = "\n\nAssistant:"


def turn(message: dict) -> str:
    """A message where there is no chat template: a blank line, who speaks, and what is said."""
    role, calls = message["role"], message.get("tool_calls")
    said = (message.get("content") or "") + (json.dumps(calls) if calls else "")
    return f"\n\n{ROLES.get(role, role.capitalize())}:" + f" {said}" * bool(said)


class Span(NamedTuple):
    """The tokens from `start` up to `stop`, which make whole characters only together, and their text."""

    start: int
    stop: int
    text: str


# The ids of a complete response, and the places of those that the environment wrote: a tool, a user's turn inside it.
Answer = tuple[list[int], tuple[int, ...]]


class Unusable(UserError):
    """A text or a conversation that a tokenizer cannot write; `why`, in a few words, for who counts such rows."""

    why: str


class NoToken(Unusable):
    """A text holds a character that a vocabulary has no token for."""

    why = "with a character that has no token"


class EmptyTurn(Unusable):
    """The assistant says nothing in one of its turns; or it calls a tool, and the chat template leaves that out."""

    why = "empty response"


class Rewritten(Unusable):
    """A chat template writes a turn otherwise once another one follows, so that its tokens are not known before."""

    why = "whose turns the chat template writes otherwise once others follow"


class Tokens(ABC):
    """What every tokenizer shares: the ids that end a response, and how tokens are shown.

    `eos` ends a response that we write; `ends` holds every id that ends one, `eos` first. `pad` fills packed rows.
    `n_vocab` is the largest id + 1. Equal `fingerprint`s mean equal ids for every text.
    """

    eos: int
    ends: tuple[int, ...]
    pad: int
    n_vocab: int
    special: frozenset[int]  # the ids of tokens that are no text
    fingerprint: str
    chat = False  # whether a prompt that is a text is a user's turn

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text. Special tokens written out in it are ordinary characters; no EOS is added."""

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text that stands first, behind those special tokens that the tokenizer puts in front."""
        return self.encode(text)

    def encode_prompt(self, prompt: str | list[dict]) -> list[int]:
        """The ids of a prompt that is a text, as `encode_text` has them, or a conversation.

        A conversation, a list of messages like {"role": "user", "content": "…"}, is written as the chat template wants
        it, up to and with what opens the assistant's turn. Without a template it is text: Human: …, Assistant: ….
        """
        return self.encode_text(prompt if isinstance(prompt, str) else "".join(map(turn, prompt)) + OPENED)

    @property
    def encoding_key(self) -> str:
        """Equal keys mean equal ids for every row, be it text or conversation."""
        return self.fingerprint

    def start_chat(self):
        """From now on a prompt is a user's turn in the chat template; UserError if there is none."""
        raise UserError("this vocabulary has no chat template: leave out --chat")

    def encode_response(self, text: str) -> list[int]:
        """The EOS rule: a complete response is its ids and exactly one EOS."""
        return [*self.encode(text), self.eos]

    def encode_answer(self, prompt: str | list[dict], response: str | list[dict]) -> Answer:
        """A complete response to a prompt. Of a conversation it is the messages that follow, an assistant's first.

        Each of the assistant's turns ends in EOS. What others say in between is given.
        """
        if isinstance(response, str):
            return self.encode_response(response), ()
        ids, given = [], []
        for between, answer in self._turns(prompt, response):
            if len(answer) == 1:
                raise EmptyTurn("a turn of the assistant is empty")
            given += range(len(ids), len(ids) + len(between))
            ids += between + answer
        return ids, tuple(given)

    def _turns(self, prompt: list[dict], response: list[dict]) -> Iterator[tuple[list[int], list[int]]]:
        """For each of the assistant's turns what was said since the one before, and the turn with its end."""
        since = ""
        for place, message in enumerate(response):
            if message["role"] == "assistant":
                between = self.encode_response(since + OPENED)[:-1] if place else []
                yield between, self.encode_response(turn(message).removeprefix(OPENED))
                since = ""
            else:
                since += turn(message)

    @abstractmethod
    def save_in(self, folder: Path):
        """Write into a folder what makes the same tokenizer again."""

    @abstractmethod
    def bytes_of(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens left out; bytes that are not UTF-8 come out as U+FFFD."""
        return b"".join(self.bytes_of([i for i in ids if i not in self.special])).decode("utf-8", "replace")

    def _characters(self, ids: Sequence[int]) -> Iterator[tuple[str, bytes, list[int]]]:
        """Each character of some ids: what to show for it, its bytes, and for each of them whose token it is in.

        A byte that belongs to no character counts as one of its own and is shown as its number: ⟨e4⟩.
        """
        pieces = self.bytes_of(ids)
        token_of = [token for token, piece in enumerate(pieces) for _ in piece]
        at = 0
        for character in b"".join(pieces).decode("utf-8", "surrogateescape"):
            code = character.encode("utf-8", "surrogateescape")
            lone = "\udc80" <= character <= "\udcff"  # how "surrogateescape" marks such a byte
            yield byte_text(code[0]) if lone else character, code, token_of[at : at + len(code)]
            at += len(code)

    def spans(self, ids: Sequence[int]) -> list[Span]:
        """The smallest groups of neighbouring tokens that make whole characters; most hold one token.

        They follow each other and hold all ids. Their texts, joined, are `decode(ids)`, except that special tokens
        are shown, and that a byte which belongs to no character is shown as ⟨e4⟩ where `decode` has U+FFFD.
        """
        texts, until = [""] * len(ids), list(range(len(ids)))
        for text, _, tokens in self._characters(ids):
            texts[tokens[-1]] += text
            until[tokens[0]] = tokens[-1]
        spans, start, last = [], 0, 0
        for token in range(len(ids)):
            last = max(last, until[token])
            if token == last:
                spans.append(Span(start, token + 1, "".join(texts[start : token + 1])))
                start = last = token + 1
        return spans

    def texts_of(self, ids: Sequence[int]) -> list[str]:
        """What each token shows beside its neighbours, one text a token, special ones included.

        Where several tokens make one character, the last of them shows it, and those before show their bytes: the
        three tokens of 中 are `⟨e4⟩`, `⟨b8⟩`, `中`. All other texts, joined, are `decode(ids)`; see also `spans`.
        """
        texts = [""] * len(ids)
        for text, code, tokens in self._characters(ids):
            for byte, token in zip(code, tokens, strict=True):
                texts[token] += byte_text(byte) if token != tokens[-1] else ""
            texts[tokens[-1]] += text
        return texts


class Tokenizer(Tokens):
    """Text to token ids and back. `n_vocab` counts the two special tokens."""

    def __init__(self, ranks: dict[bytes, int]):
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
            raise UserError("the vocabulary must hold all 256 single bytes and rank its tokens 0, 1, 2, …")
        self.ranks = ranks
        special = {EOS: len(ranks), PAD: len(ranks) + 1}
        self.encoding = tiktoken.Encoding("minqstar", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self.eos, self.pad = special[EOS], special[PAD]
        self.ends, self.special = (self.eos,), frozenset(special.values())
        self.n_vocab = self.encoding.n_vocab
        self.fingerprint = hashlib.sha256(repr(ranks).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def bytes_of(self, ids: Sequence[int]) -> list[bytes]:
        return [self.encoding.decode_single_token_bytes(i) for i in ids]

    def save(self, path: Path):
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())
        content = "".join(lines).encode()
        replace_file(path, lambda new: new.write_bytes(content))

    def save_in(self, folder: Path):
        self.save(folder / DEFAULT_VOCABULARY.name)


def byte_text(byte: int) -> str:
    """How a byte is shown that is no character."""
    return f"⟨{byte:02x}⟩"


def load_tokenizer(path: Path = DEFAULT_VOCABULARY) -> Tokenizer:
    """The tokenizer of a vocabulary file; UserError if the file is missing or malformed."""
    ranks, lines = {}, read_text(path, "the vocabulary").splitlines()
    try:
        for line in lines:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as e:
        raise UserError(f"{path}:{len(ranks) + 1}: want '<base64> <rank>', got {line[:60]!r}") from e
    return Tokenizer(ranks)


def train_vocabulary(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-level BPE with `size` tokens (special ones included, at least 258) learned on some texts."""
    require(258 <= size <= 2**20, f"a vocabulary has between 258 and {2**20:,} tokens, got {size}")
    needs("rustbpe", "tokenizer", "training a vocabulary")
    import rustbpe

    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(iter(texts), size - 2, pattern=PATTERN)
    return Tokenizer({bytes(token): rank for token, rank in bpe.get_mergeable_ranks()})
