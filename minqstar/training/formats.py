"""Files to rows: preference and fine-tuning data in the shapes that people write become rows of this project's shape.

A row is a dict. It holds `prompt` with `chosen` and `rejected`, or `prompt` with `completion`, or `text` alone. The
values are strings; or they are lists of *messages*, as chat templates take them: `{"role": "user", "content": "Hi"}`.
Roles are system, user, assistant and tool. A response begins and ends with a message of the assistant.
"""

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from minqstar.errors import UserError, first_line, require, visible
from minqstar.text import clean
from minqstar.training.containers import read_raw
from minqstar.training.messages import dialogue, message_of

RESPONSE_FIELDS = (("chosen", "rejected"), ("completion",))
PROMPTS, COMPLETIONS = ("prompt", "question", "input"), ("completion", "response", "answer", "output")
ROW_FIELDS = ("prompt", *RESPONSE_FIELDS[0], *RESPONSE_FIELDS[1], "text", "system")  # what other columns are not called
TURNS = [  # in prompts that are strings: a user's turn, and the mark behind which the assistant answers
    re.compile(rf"(?:\A|{re.escape(user)}).*?{re.escape(assistant)}", re.DOTALL)
    for user, assistant in (
        ("Human:", "\n\nAssistant:"),
        ("User:", "\n\nAssistant:"),
        ("USER:", "ASSISTANT:"),
        ("<|im_start|>user\n", "<|im_start|>assistant\n"),
        ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("<start_of_turn>user\n", "<start_of_turn>model\n"),
        ("<|user|>\n", "<|assistant|>\n"),
        ("[INST]", "[/INST]"),
        ("### Instruction:\n", "### Response:\n"),
    )
]
Field = str | list[dict]  # text or messages


class Rows:
    """The rows of a file. Each iteration reads the file again and holds one row at a time.

    UserError names the file and the row that is not JSON, lacks something, or is of another format or shape than the
    rows before it. `form` is "auto" (the first row decides) or a key of FORMATS.
    """

    form: str  # once a row is read: its format
    used: set[str]  # the columns that were used, and those that were not, of the rows read so far
    unused: set[str]
    place: str  # where the last row stands: "file.jsonl:17", "file.json, row 17"
    share: float  # which share of the file is read, in [0, 1]; 0 of a pipe

    def __init__(self, path: Path | str, form: str = "auto"):
        require(form in ("auto", *FORMATS), f"the format {form!r} is not known; known are auto, {', '.join(FORMATS)}")
        self.path, self.form, self._asked, self.place, self.share = Path(path), form, form, str(path), 0.0
        self.used, self.unused = set(), set()

    def __iter__(self) -> Iterator[dict]:
        shape = None
        for raw in self._raw():
            form = detect(raw, self.place) if self._asked == "auto" else self._asked
            rest = dict(raw)  # a format takes out of it what it uses
            try:
                row = FORMATS[form](rest, self.place)
            except UserError as e:
                raise UserError(f"{e} (read as {form})") if form == self._asked else e from None
            before, shape = shape, (form, "messages" if isinstance(row.get("prompt"), list) else "strings")
            mixed = f"this row is of format {form} in {shape[1]}, those before it are {' in '.join(before or shape)}"
            require(before in (None, shape), f"{self.place}: mixed shapes: {mixed}; split them into two files")
            self.form = form
            self.used |= raw.keys() - rest.keys()
            self.unused |= rest.keys()
            yield {**row, **{name: value for name, value in rest.items() if name not in ROW_FIELDS}}
        require(shape is not None, f"{self.path}: holds no rows")

    def _raw(self) -> Iterator[dict]:
        """The objects of the file as they stand, their place in `self.place`."""
        self.place = str(self.path)
        try:
            for place, share, raw in read_raw(self.path):
                self.place, self.share = place, share
                require(isinstance(raw, dict), f"{self.place}: want an object, got {type(raw).__name__}")
                yield raw
        except (EOFError, zlib.error, OSError) as e:
            require(getattr(e, "errno", None) is None, f"cannot read {self.path}: {getattr(e, 'strerror', '')}")
            where = f"{self.place}: behind this place the file is damaged or cut off"
            raise UserError(f"{where} ({first_line(e)}); fetch it again") from e


def fields_of(row: dict) -> tuple[str, ...]:
    """The names of a row's responses."""
    return RESPONSE_FIELDS["chosen" not in row]


def read_pairs(path: Path | str) -> list[dict]:
    """The rows of a preference file of any format, as `Rows` gives them. UserError if one has not two answers."""
    rows = list(Rows(path))
    require(all("chosen" in row for row in rows), f"{path}: want rows with chosen and rejected, not completion")
    return rows


def detect(raw: dict, place: str) -> str:
    """The format of a raw row, by the names of its columns that are not null."""
    names = {name for name, value in raw.items() if value is not None}
    pair, one = bool(names & {"chosen", "rejected"}), bool(names & set(COMPLETIONS))
    if "prompt" in names and (pair or one):
        return "prompt"
    if "conversations" in names:
        return "sharegpt"
    if "messages" in names and not (pair and isinstance(raw.get("chosen"), str | list)):
        return "messages"
    if "instruction" in names:
        return "alpaca"
    if names & set(PROMPTS) and (pair or one):
        return "prompt"
    if pair:
        text = raw.get("chosen")
        return "hh" if isinstance(text, str) and text.lstrip("\ufeff\r\n").startswith("Human:") else "implicit"
    if "text" in names:
        return "text"
    if "prompt" in names or one:
        return "prompt"
    wanted = "prompt or messages with chosen and rejected or with completion, instruction with output, or text"
    columns = visible(", ".join(sorted(raw)[:20])) or "(none)"
    raise UserError(f"{place}: no format fits the columns {columns}; want {wanted}")


def _explicit(row: dict, place: str) -> dict:
    """A prompt and its answers; with a column `system`, or if one of them is messages, all become messages."""
    chat = "system" in row
    system, prompt = _system(row, place), _field(row, place, *PROMPTS)
    answers = _answers(row, place, *COMPLETIONS)
    if not chat and all(isinstance(field, str) for field in (prompt, *answers.values())):
        return {"prompt": prompt, **answers}
    return _behind(_led(system, _turns(prompt, "user")), answers, place)


def _implicit(row: dict, place: str) -> dict:
    """Two answers that both hold the prompt."""
    answers = {name: _field(row, place, name) for name in RESPONSE_FIELDS[0]}
    if all(isinstance(answer, str) for answer in answers.values()):
        at = _cut(*answers.values())
        require(at > 0, f"{place}: the field 'prompt' is missing, and 'chosen' and 'rejected' do not begin alike")
        return {"prompt": answers["chosen"][:at], **{name: answer[at:] for name, answer in answers.items()}}
    system = _system(row, place)
    return _split({name: _led(system, _turns(answer, "assistant")) for name, answer in answers.items()}, place)


def _hh(row: dict, place: str) -> dict:
    r"""Anthropic's dialogues in two strings, `\n\nHuman: … \n\nAssistant: …`, as messages."""
    return _split({name: dialogue(_text(row, place, name), place) for name in RESPONSE_FIELDS[0]}, place)


def _conversation(column: str, row: dict, place: str) -> dict:
    """Messages in one column: the prompt of two answers, or a conversation whose assistant's turns are the response."""
    system, turns = _system(row, place), _turns(_field(row, place, column), "user")
    if {"chosen", "rejected"} & {name for name, value in row.items() if value is not None}:
        return _behind(_led(system, turns), _answers(row, place), place)
    return _split({"completion": _led(system, turns)}, place)


def _alpaca(row: dict, place: str) -> dict:
    """An instruction, perhaps an input for it, and the output or two answers."""
    parts = [_text(row, place, "instruction")]
    parts += [_text(row, place, name) for name in ("input", "context") if row.get(name) is not None]
    system, user = _system(row, place), _turns("\n\n".join(filter(None, parts)), "user")
    return _behind(system + user, _answers(row, place, "output", *COMPLETIONS), place)


# What turns a raw row, out of which it takes what it uses, into a row; the place is for errors.
FORMATS: dict[str, Callable[[dict, str], dict]] = {
    "prompt": _explicit,
    "implicit": _implicit,
    "hh": _hh,
    "sharegpt": partial(_conversation, "conversations"),
    "messages": partial(_conversation, "messages"),
    "alpaca": _alpaca,
    "text": lambda row, place: {"text": _text(row, place, "text")},
}


def _behind(prompt: list[dict], answers: dict[str, Field], place: str) -> dict:
    """A row of a prompt and its answers. Answers that repeat the prompt, or go on with other turns first, are cut."""
    talks, last = {name: _turns(answer, "assistant") for name, answer in answers.items()}, prompt[-1]
    if all(turns[0]["role"] == "assistant" for turns in talks.values()):
        return {"prompt": prompt, **{name: _ended(turns, name, place) for name, turns in talks.items()}}
    for name, turns in talks.items():
        own = turns[0]["role"] == "assistant"
        same = (i for i, turn in enumerate(turns, 1) if not own and _same(turn, last))
        known = next(same, 0)  # how many turns the answer repeats, up to the one in which the prompt ends
        twice = not known and turns[0]["role"] == last["role"] == "user"
        require(not twice, f"{place}: {name!r} begins with a user's turn, but not with the one that the prompt ends in")
        talks[name] = max(prompt, turns[:known], key=len) + turns[known:]
    return _split(talks, place, len(prompt))


def _same(one: dict, other: dict) -> bool:
    """Whether two messages say the same, but for white space around it."""
    return one["role"] == other["role"] and one["content"].strip() == other["content"].strip()


def _split(talks: dict[str, list[dict]], place: str, given: int = 1) -> dict:
    """Conversations cut where the assistant's turn begins: a single one at its first, behind the `given` messages.

    Two are cut at the last turn that both have at the same place behind the same messages, so that neither is empty.
    """
    talks = {name: _ended(talk, name, place) for name, talk in talks.items()}
    first, *others = talks.values()
    places = range(given, len(first))
    for other in others:
        places = range(min(_alike(first, other), len(first) - 1, len(other) - 1), 0, -1)
    for at in places:
        if first[at - 1]["role"] != "assistant" and all(talk[at]["role"] == "assistant" for talk in talks.values()):
            return {"prompt": first[:at], **{name: talk[at:] for name, talk in talks.items()}}
    why = "chosen and rejected share no turn before one of the assistant" if others else "the assistant speaks first"
    raise UserError(f"{place}: no prompt: {why}")


def _cut(chosen: str, rejected: str) -> int:
    """How long the prompt of two strings is that both begin with: up to the last turn of the assistant that both have.

    Without marks of turns, up to white space, which belongs to the answers. What they share behind it stays in both.
    """
    common = chosen[: _alike(chosen, rejected)]
    families = [list(turn.finditer(common)) for turn in TURNS]
    if marked := [turns for turns in families if turns]:  # the first mark tells the family; others are quoted
        return min(marked, key=lambda turns: (turns[0].end(), -turns[-1].end()))[-1].end()
    ends = [match.start() for match in re.finditer(r"(?<=\S)\s", chosen[: len(common) + 1])]
    for at in reversed(ends):
        if all(text[at : at + 1].isspace() and text[at:].strip() for text in (chosen, rejected)):
            return at
    return 0


def _alike(one: Sequence, other: Sequence) -> int:
    """How many items, characters or messages, two sequences have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _ended(turns: list[dict], name: str, place: str) -> list[dict]:
    """A conversation up to the last message of the assistant."""
    own = [i for i, turn in enumerate(turns, 1) if turn["role"] == "assistant"]
    require(bool(own), f"{place}: no turn of the assistant" + f" in {name!r}" * (name != "completion"))
    return turns[: own[-1]]


def _turns(field: Field, role: str) -> list[dict]:
    return [{"role": role, "content": field}] if isinstance(field, str) else field


def _led(system: list[dict], turns: list[dict]) -> list[dict]:
    """A conversation behind the system's message, unless it has one of its own."""
    return turns if turns[0]["role"] == "system" else system + turns


def _system(row: dict, place: str) -> list[dict]:
    """The message of the column `system`, which may be missing, null or empty."""
    text = _text(row, place, "system") if row.get("system") is not None else row.pop("system", None)
    return _turns(text, "system") if text else []


def _answers(row: dict, place: str, *names: str) -> dict[str, Field]:
    """The two answers; or the completion, if a row has only this, under one of its names."""
    pair = {"chosen", "rejected"} & {name for name, value in row.items() if value is not None}
    if not pair and any(name in row for name in names):
        return {"completion": _field(row, place, *names)}
    hint = f"; the response of a row that has only one is called {names[0]!r}" if names and not pair else ""
    return {name: _field(row, place, name, hint=hint) for name in RESPONSE_FIELDS[0]}


def _text(row: dict, place: str, name: str) -> str:
    text = _field(row, place, name)
    require(isinstance(text, str), f"{place}: {name!r} must be a string, got messages")
    return text


def _field(row: dict, place: str, *names: str, hint: str = "") -> Field:
    """The field of the first of these names that is there, taken out of the row and cleaned."""
    found = sorted((name for name in names if name in row), key=lambda name: row[name] is None)
    require(bool(found), f"{place}: the field {names[0]!r} is missing{hint}")
    value, what = row.pop(found[0]), f"{place}: {found[0]!r}"
    if isinstance(value, str):
        return clean(value, what)
    turns = [value] if isinstance(value, dict) else value
    kind = "null" if value is None else type(value).__name__
    require(isinstance(turns, list), f"{what} must be a string or a list of messages, got {kind}")
    require(bool(turns), f"{what} is an empty list of messages")
    return [message_of(turn, f"{what}, message {number}") for number, turn in enumerate(turns, 1)]
