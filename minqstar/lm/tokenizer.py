"""A tiktoken `Encoding` from a vocabulary file, and the training of such a file.

A vocabulary file holds one `<base64 bytes> <rank>` a line, tiktoken's own form. It is byte-level: ranks 0..255
are the bytes, so any text round-trips. Two special tokens follow the last rank: EOS, the action that ends a
response, and PAD, which fills packed rows and is never scored. Neither can be written in text.

    python -m minqstar.world.tldr --train-vocabulary minqstar/lm/vocab.tiktoken     # rebuilds the default vocabulary
"""

import base64
import binascii
import hashlib
from collections.abc import Iterable
from pathlib import Path

import tiktoken

from minqstar.errors import UserError, needs, require

EOS, PAD = "<|eos|>", "<|pad|>"
DEFAULT_VOCABULARY = Path(__file__).parent / "vocab.tiktoken"

# Words take the space before them, digits stand alone: a number is copied digit by digit, and texts that are
# joined at a space or around a digit are tokenised alike joined and apart.
# The count in braces bounds the matcher's recursion on endless white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s{1,256}(?!\S)|\s"


class Tokenizer:
    """Text to token ids and back. `n_vocab` counts the two special tokens."""

    def __init__(self, ranks: dict[bytes, int]):
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
            raise UserError("the vocabulary must hold all 256 single bytes and rank its tokens 0, 1, 2, …")
        self.ranks = ranks
        special = {EOS: len(ranks), PAD: len(ranks) + 1}
        self.encoding = tiktoken.Encoding("minqstar", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self.eos, self.pad = special[EOS], special[PAD]
        self.n_vocab = self.encoding.n_vocab
        self.fingerprint = hashlib.sha256(repr(ranks).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Special tokens written out in it are ordinary characters; no EOS is added."""
        return self.encoding.encode_ordinary(text)

    def encode_response(self, text: str) -> list[int]:
        """The EOS rule: a complete response is its ids and exactly one EOS."""
        return [*self.encode(text), self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens left out; bytes that are not UTF-8 come out as U+FFFD."""
        return self.encoding.decode([i for i in ids if i < self.eos])

    def text_of(self, token: int) -> str:
        """What one token looks like, special ones included."""
        return self.encoding.decode([token])

    def save(self, path: Path):
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())
        path.write_text("".join(lines), encoding="ascii")


def load_tokenizer(path: Path = DEFAULT_VOCABULARY) -> Tokenizer:
    """The tokenizer of a vocabulary file; UserError if the file is missing or malformed."""
    ranks = {}
    try:
        for line in Path(path).read_text(encoding="ascii").splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as e:
        raise UserError(f"cannot read the vocabulary {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not a vocabulary file: want ASCII lines of '<base64> <rank>'") from e
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
