"""Other people's tokenizers: a Hugging Face folder's `tokenizer.json` behind the interface of our own `Tokenizer`.

The `tokenizers` library makes the ids. It drops bytes that have no token in silence, so each answer is checked here:
the bytes of the tokens are the bytes of the text, as the tokenizer's own normalizer writes it, or there is an error.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from minqstar.errors import UserError, first_line, is_text, needs, require, visible
from minqstar.files import replace_file
from minqstar.lm.chat import MARK, ChatTemplate, marks_for, swapped
from minqstar.lm.tokenizer import NoToken, Rewritten, Tokens
from minqstar.text import read_text

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
ENDS = "generation_config.json"
LONGEST_JSON = 2**28  # bytes; a vocabulary of 256k tokens takes 33 MB


class BorrowedTokenizer(Tokens):
    """The tokenizer of a folder, given as the texts of its files by name; `configs` may name EOS and PAD too.

    Some tokenizers write a space in front of a text. `encode` and `encode_prompt` have it, and so has what their ids
    decode to. A response continues a text: `encode_response` has none.
    """

    def __init__(self, folder: Path, files: dict[str, str], configs: dict[str, dict]):
        self.folder, self.files = folder, files
        whole = self._parsed(files[TOKENIZER])
        whole.no_padding(), whole.no_truncation()
        spec = json.loads(whole.to_str())
        spec["model"].pop("dropout", None)  # it would draw other ids each time
        decides = [spec[part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer")]
        self.fingerprint = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        self.first = self._parsed(json.dumps(spec))
        other = [without_space(spec, always) for always in (False, True)]
        self.later, self.continued = (self.first if s == spec else self._parsed(json.dumps(s)) for s in other)
        self.front = self._front(whole)
        self.added = self.first.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in self.added.items() if token.special)
        self.names = [self.added[i].content for i in self.special]
        shape = json.dumps([spec["normalizer"], spec["pre_tokenizer"]], ensure_ascii=False)
        self.spaced = "▁" in shape and '"ByteLevel"' not in shape
        self.pieces = {i: self._piece(token, '"ByteLevel"' in shape) for token, i in self.first.get_vocab().items()}
        self.pieces |= {i: token.content.encode() for i, token in self.added.items()}
        self.n_vocab = max(self.pieces) + 1
        self._read_roles(configs)

    def _parsed(self, text: str):
        import tokenizers

        try:
            model = json.loads(text)["model"]
            if prefix := model.get("continuing_subword_prefix"):  # where it does not fit, the library ends the process
                raise ValueError(f"continuing_subword_prefix {prefix!r} is not supported")
            return tokenizers.Tokenizer.from_str(text)
        except Exception as e:  # the library raises nothing more special
            raise UserError(f"{self.folder / TOKENIZER}: no tokenizer: {visible(first_line(e))}") from e

    def _front(self, whole) -> list[int]:
        """The special tokens that the post-processor puts in front of a text."""
        try:
            trial = whole.encode("a")
        except BaseException as e:  # so the library's panics come: a post-processor that names what is not there
            if type(e).__name__ != "PanicException":
                raise
            raise UserError(f"{self.folder / TOKENIZER}: its post_processor fails: {visible(first_line(e))}") from e
        mask = trial.special_tokens_mask
        return trial.ids[: mask.index(0)] if 0 in mask else []

    def _piece(self, token: str, byte_level: bool) -> bytes:
        """The bytes of a token: in GPT-2's alphabet, or with ▁ for a space and <0x0A> for a byte."""
        if byte_level:
            return bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode()
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " " if self.spaced else "▁").encode()

    def _read_roles(self, configs: dict[str, dict]):
        """Which ids end a response, and which pads: of the template, and of all configs."""
        named = configs[CONFIG]
        contents = {name: t["content"] if isinstance(t, dict) and "content" in t else t for name, t in named.items()}
        tokens = {name: t for name, t in contents.items() if name.endswith("_token") and isinstance(t, str)}
        listed = lambda of: of if isinstance(of, list) else [of]  # noqa: E731
        ends = [i for config in configs.values() for i in listed(config.get("eos_token_id"))]
        ends.append(self.first.token_to_id(tokens["eos_token"]) if "eos_token" in tokens else None)
        self.template = None
        if source := self._template_source(named):
            self.template = ChatTemplate(*source, tokens)
            ends.insert(0, self._end_of_turn())
        for i in ends:
            known = i is None or (type(i) is int and i in self.pieces)
            require(known, f"{self.folder}: eos_token_id {i!r} is no token of {TOKENIZER}")
        self.ends = tuple(dict.fromkeys(i for i in ends if i is not None))
        require(bool(self.ends), f"{self.folder}: no file names the token that ends a text (eos_token in {CONFIG})")
        self.eos = self.ends[0]
        pads = [self.first.token_to_id(tokens["pad_token"]) if "pad_token" in tokens else None]
        pads += [config.get("pad_token_id") for config in configs.values()]
        self.pad = next((i for i in pads if type(i) is int and i in self.pieces), self.eos)

    def _template_source(self, config: dict) -> tuple[str, str] | None:
        """The chat template and the file that holds it."""
        if TEMPLATE in self.files:
            return self.files[TEMPLATE], str(self.folder / TEMPLATE)
        given, place = config.get("chat_template"), self.folder / CONFIG
        if isinstance(given, list):  # [{"name": "default", "template": "…"}, …]
            given = next((t.get("template") for t in given if isinstance(t, dict) and t.get("name") == "default"), None)
        require(given is None or isinstance(given, str), f"{place}: chat_template is no text")
        return given and (given, str(place))

    def _end_of_turn(self) -> int | None:
        """The special token that the template writes behind what the assistant says."""
        mark = MARK
        text = self.template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}], False)
        where = text.rfind(mark)
        return next((i for i, start, _ in self._specials(text) if start > where >= 0), None)

    def encode(self, text: str) -> list[int]:
        return self._ids(self.first, text)

    def encode_text(self, text: str) -> list[int]:
        return [*self.front, *self.encode(text)]

    def encode_prompt(self, prompt: str | list[dict]) -> list[int]:
        """A prompt's ids: behind BOS where the tokenizer wants it, or as a user's turn after `start_chat`.

        A conversation's ids are those of transformers' `apply_chat_template`, but special tokens in a message stay its
        text. UserError, with the template's own words, if it refuses these messages.
        """
        if isinstance(prompt, str) and self.chat:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str) or self.template is None:
            return super().encode_prompt(prompt)
        fine = bool(prompt) and all(isinstance(message, dict) for message in prompt)
        require(fine, "a conversation is a list of messages, each like {'role': 'user', 'content': '…'}")
        marks = marks_for(prompt, self.names)
        return self._rendered(self.template.render(swapped(prompt, marks), True), marks, self.first)

    @property
    def encoding_key(self) -> str:
        return repr((self.fingerprint, self.front, self.ends, self.chat, self.template and self.template.source))

    def start_chat(self):
        """From now on a prompt is a user's turn in the chat template."""
        require(self.template is not None, f"{self.folder} has no chat template ({TEMPLATE}): leave out --chat")
        self.chat = True
        self.encode_prompt("a")  # whatever is wrong with the template is said now

    def encode_response(self, text: str) -> list[int]:
        return [*self._ids(self.continued, text), self.eos]

    def bytes_of(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token; a model may have ids that the tokenizer does not know, which are shown as ⟨id 7⟩."""
        return [self.pieces[i] if i in self.pieces else f"⟨id {i}⟩".encode() for i in ids]

    def _turns(self, prompt: list[dict], response: list[dict]) -> Iterator[tuple[list[int], list[int]]]:
        """As the chat template writes the whole conversation, cut where it opens and ends the assistant's turns."""
        if self.template is None:
            yield from super()._turns(prompt, response)
            return
        marks = marks_for([prompt, response], self.names)
        messages, text = [swapped(message, marks) for message in (*prompt, *response)], ""
        for place in range(len(prompt), len(messages)):
            if messages[place]["role"] != "assistant":
                continue
            opened = self.template.render(messages[:place], True)
            whole = self.template.render(messages[: place + 1], False)
            if not (opened.startswith(text) and whole.startswith(opened)):
                raise Rewritten(f"{self.template.place} writes a turn otherwise once another follows: keep the last")
            between, answer = opened[len(text) :] if text else "", whole[len(opened) :]
            stop = max((stop for i, _, stop in self._specials(answer) if i in self.ends), default=None)
            tokenizer = self.later if opened.endswith(tuple(self.names)) else self.continued
            ids = self._rendered(answer[:stop], marks, tokenizer) + [self.eos] * (stop is None)
            yield self._rendered(between, marks, self.later), ids
            text = opened + answer[:stop]

    def _rendered(self, text: str, marks: dict[str, str], tokenizer) -> list[int]:
        """The ids of what the template wrote; the `tokenizer` takes it up to its first special token."""
        if not marks and tokenizer is not self.continued:
            return self._ids(tokenizer, text, special=True)
        ids, at, back = [], 0, {mark: content for content, mark in marks.items()}
        for i, start, stop in [*self._specials(text), (None, len(text), len(text))]:
            piece = swapped(text[at:start], back)
            ids += self._ids(self.later if at else tokenizer, piece) + [i] * (i is not None)
            at = stop
        return ids

    def _specials(self, text: str) -> Iterator[tuple[int, int, int]]:
        """The special tokens in a text: id, start and stop."""
        self.first.encode_special_tokens = False
        encoding = self.first.encode(text, add_special_tokens=False)
        for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if i in self.special and text[start:stop].strip() == self.added[i].content.strip():
                yield i, start, stop

    def _ids(self, tokenizer, text: str, special: bool = False) -> list[int]:
        """The ids of a text, checked; special tokens in it are themselves only if `special`."""
        require(is_text(text), "the text is not UTF-8: it holds half of a surrogate pair, which is no character")
        tokenizer.encode_special_tokens = not special
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, at, piece = encoding.ids, 0, []
        for i, (start, stop) in zip(ids, encoding.offsets, strict=True):
            if i in self.added and self._stands(i, text[start:stop], special):
                self._check(text[at:start], piece, tokenizer)
                at, piece = stop, []
            else:
                piece.append(i)
        self._check(text[at:], piece, tokenizer)
        leaked = "" if special else ", ".join(self.added[i].content for i in self.special.intersection(ids))
        require(not leaked, f"{self.folder / TOKENIZER} takes {visible(leaked)} in a text for a special token")
        return ids

    def _stands(self, i: int, text: str, special: bool) -> bool:
        """Whether an added token stands for a text; a special one may take white space beside it."""
        if i in self.special:
            return special and text.strip() == self.added[i].content.strip()
        return self._normal(text) == self._normal(self.added[i].content)

    def _normal(self, text: str) -> bytes:
        normalizer = self.continued.normalizer
        text = normalizer.normalize_str(text) if normalizer else text
        return (text.replace("▁", " ") if self.spaced else text).encode()

    def _check(self, text: str, ids: list[int], tokenizer):
        """UserError unless the bytes of the tokens are the text, behind a space that the tokenizer may put there."""
        want, have = self._normal(text), b"".join(self.bytes_of(ids))
        have = have.replace("▁".encode(), b" ") if self.spaced else have
        if want == have or (tokenizer is not self.continued and b" " + want == have):
            return
        have = have[1:] if have[:1] == b" " != want[:1] else have
        at = next((at for at, (a, b) in enumerate(zip(want, have, strict=False)) if a != b), min(len(want), len(have)))
        around = want[max(0, at - 20) : at + 20].decode(errors="ignore")
        byte = f"the byte {want[at]:02x}" if at < len(want) else "the end"
        where = f"{byte} in {visible(around)!r}"
        raise NoToken(f"{self.folder / TOKENIZER} has no token for {where}: change the text, or use another model")

    def save_in(self, folder: Path):
        """Write the files as they were, and the ids that end a response: `load_borrowed` makes the same of them."""
        ends = {ENDS: json.dumps({"eos_token_id": self.ends, "pad_token_id": self.pad}) + "\n"}
        for name, text in (self.files | ends).items():
            replace_file(folder / name, partial(Path.write_bytes, data=text.encode()))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2 writes each byte as a character that is seen: itself, or the next one free from 256 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + k): byte for k, byte in enumerate(rest)}


BYTE_OF = _byte_alphabet()


def without_space(spec, always: bool):
    """A part of `tokenizer.json` that puts no space before the first text, or before any (`always`)."""
    if isinstance(spec, list):
        return [s for s in (without_space(s, always) for s in spec) if s is not None]
    if not isinstance(spec, dict):
        return spec
    if "model" in spec:
        return spec | {part: without_space(spec[part], always) for part in ("normalizer", "pre_tokenizer")}
    if spec.get("type") == "Prepend" and always:
        return None
    if spec.get("type") == "Metaspace" and (always or spec["prepend_scheme"] == "first"):
        return spec | {"prepend_scheme": "never"}
    if spec.get("type") == "ByteLevel" and always and "add_prefix_space" in spec:
        return spec | {"add_prefix_space": False}
    return {name: without_space(part, always) for name, part in spec.items()}


def load_borrowed(folder: Path) -> BorrowedTokenizer:
    """The tokenizer of a Hugging Face folder; UserError if a file is missing or malformed, or names code of its own."""
    needs("tokenizers", "hf", f"the tokenizer of {folder}")
    there = {name for name in (TOKENIZER, CONFIG, TEMPLATE) if (folder / name).is_file()}
    if TOKENIZER not in there:
        old = next((name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()), None)
        convert = f"transformers makes it of {old}: AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(…)"
        raise UserError(
            f"{folder} has no {TOKENIZER}" + (f"; {convert}" if old else ", which a tokenizer is read from")
        )
    files = {name: read_text(folder / name, "the tokenizer", LONGEST_JSON) for name in sorted(there)}
    configs = {name: _json(folder / name) for name in (ENDS, "config.json", CONFIG)}
    code = "auto_map" in configs[CONFIG]
    require(not code, f"{folder / CONFIG} names code of its own (auto_map), which is never run; save it without")
    return BorrowedTokenizer(folder, files, configs)


def _json(path: Path) -> dict:
    """What a JSON file holds; nothing if it is not there."""
    try:
        value = json.loads(read_text(path)) if path.is_file() else {}
    except (json.JSONDecodeError, RecursionError) as e:
        raise UserError(f"{path}: no JSON: {first_line(e)}") from e
    require(isinstance(value, dict), f"{path}: want a JSON object")
    return value
