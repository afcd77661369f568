"""Files to rows: preference and fine-tuning data in the shapes that people write become rows of this project's shape.

A row is a dict. It holds `prompt` with `chosen` and `rejected`, or with `ranked`, a list of two or more responses, the
best first, or with `completion`; or `text` alone. The values are strings; or they are lists of *messages*, as chat
templates take them: `{"role": "user", "content": "Hi"}`.
Roles are system, user, assistant and tool. A response begins and ends with a message of the assistant.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path

from minqstar.errors import UserError, first_line, require, visible
from minqstar.text import clean
from minqstar.training.containers import read_raw
from minqstar.training.messages import Field, alike, behind, dialogue, in_words, led, message_of, split, turns_of

PAIR, RANKED = ("chosen", "rejected"), "ranked"
PROMPTS, COMPLETIONS = ("prompt", "question", "input"), ("completion", "response", "answer", "output")
ROW_FIELDS = ("prompt", *PAIR, RANKED, "completion", "text", "system")  # what other columns are not called
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
                row = _gathered(FORMATS[form](rest, self.place))
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


def answers_of(row: dict) -> dict[str, Field]:
    """A row's responses by their names, the best first; a plain text is one."""
    if RANKED in row:
        return {f"{RANKED} {place}": answer for place, answer in enumerate(row[RANKED], 1)}
    return {name: row[name] for name in (*PAIR, "completion", "text") if name in row}


def is_compared(row: dict) -> bool:
    """Whether a row is a preference: a pair or a ranking."""
    return bool({"chosen", RANKED} & row.keys())


def as_pairs(rows: Iterable[dict]) -> list[dict]:
    """The rows, and in the place of a ranking all of its pairs."""
    pairs = []
    for row in rows:
        rest = {name: value for name, value in row.items() if name != RANKED}
        of_it = (dict(zip(PAIR, two, strict=True)) for two in combinations(row.get(RANKED, ()), 2))
        pairs += [{**rest, **pair} for pair in of_it] if RANKED in row else [row]
    return pairs


def read_pairs(path: Path | str) -> list[dict]:
    """The pairs of a preference file of any format, a ranking as all of its pairs. UserError if a row is neither."""
    rows = as_pairs(Rows(path))
    require(all("chosen" in row for row in rows), f"{path}: want rows with chosen and rejected, not completion")
    return rows


def detect(raw: dict, place: str) -> str:
    """The format of a raw row, by the names of its columns that are not null."""
    names = {name for name, value in raw.items() if value is not None}
    pair, one = bool(names & {*PAIR, RANKED}), bool(names & set(COMPLETIONS))
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
        ranked = raw.get(RANKED)
        text = ranked[0] if isinstance(ranked, list) and ranked else raw.get("chosen")
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
    return behind(led(system, turns_of(prompt, "user")), answers, place)


def _implicit(row: dict, place: str) -> dict:
    """Two answers or more that all hold the prompt."""
    answers = _answers(row, place)
    if all(isinstance(answer, str) for answer in answers.values()):
        first, at = next(iter(answers.values())), _cut(*answers.values())
        require(at > 0, f"{place}: the field 'prompt' is missing, and {in_words(answers)} do not begin alike")
        return {"prompt": first[:at], **{name: answer[at:] for name, answer in answers.items()}}
    system = _system(row, place)
    return split({name: led(system, turns_of(answer, "assistant")) for name, answer in answers.items()}, place)


def _hh(row: dict, place: str) -> dict:
    r"""Anthropic's dialogues in two strings, `\n\nHuman: … \n\nAssistant: …`, as messages."""
    answers = _answers(row, place)
    for name, answer in answers.items():
        require(isinstance(answer, str), f"{place}: {name!r} must be a string, got messages")
    return split({name: dialogue(answer, place) for name, answer in answers.items()}, place)


def _conversation(column: str, row: dict, place: str) -> dict:
    """Messages in one column: the prompt of two answers, or a conversation whose assistant's turns are the response."""
    system, turns = _system(row, place), turns_of(_field(row, place, column), "user")
    if {*PAIR, RANKED} & {name for name, value in row.items() if value is not None}:
        return behind(led(system, turns), _answers(row, place), place)
    return split({"completion": led(system, turns)}, place)


def _alpaca(row: dict, place: str) -> dict:
    """An instruction, perhaps an input for it, and the output or two answers."""
    parts = [_text(row, place, "instruction")]
    parts += [_text(row, place, name) for name in ("input", "context") if row.get(name) is not None]
    system, user = _system(row, place), turns_of("\n\n".join(filter(None, parts)), "user")
    return behind(system + user, _answers(row, place, "output", *COMPLETIONS), place)


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


def _cut(*answers: str) -> int:
    """How long the prompt is that some strings begin with: up to the last turn of the assistant that all have.

    Without marks of turns, up to white space, which belongs to the answers. What they share behind it stays in them.
    """
    common = answers[0][: alike(*answers)]
    families = [list(turn.finditer(common)) for turn in TURNS]
    if marked := [turns for turns in families if turns]:  # the first mark tells the family; others are quoted
        return min(marked, key=lambda turns: (turns[0].end(), -turns[-1].end()))[-1].end()
    ends = [match.start() for match in re.finditer(r"(?<=\S)\s", answers[0][: len(common) + 1])]
    for at in reversed(ends):
        if all(text[at : at + 1].isspace() and text[at:].strip() for text in answers):
            return at
    return 0


def _system(row: dict, place: str) -> list[dict]:
    """The message of the column `system`, which may be missing, null or empty."""
    text = _text(row, place, "system") if row.get("system") is not None else row.pop("system", None)
    return turns_of(text, "system") if text else []


def _answers(row: dict, place: str, *names: str) -> dict[str, Field]:
    """The two answers or those of a ranking; or the completion, if a row has only this, under one of its names."""
    given = {name for name, value in row.items() if value is not None}
    pair = given & set(PAIR)
    if RANKED in given:
        require(not pair, f"{place}: both {RANKED!r} and {in_words(sorted(pair))}; want one of them")
        return _ranked(row.pop(RANKED), place)
    if not pair and any(name in row for name in names):
        return {"completion": _field(row, place, *names)}
    hint = f"; the response of a row that has only one is called {names[0]!r}" if names and not pair else ""
    return {name: _field(row, place, name, hint=hint) for name in PAIR}


def _ranked(value, place: str) -> dict[str, Field]:
    """The answers of a ranking, by their places in it."""
    ok = isinstance(value, list) and len(value) > 1
    got = f"{len(value)}" if isinstance(value, list) else type(value).__name__
    require(ok, f"{place}: {RANKED!r} must be a list of two responses or more, the best first, got {got}")
    ranking = {f"{RANKED} {number}": each for number, each in enumerate(value, 1)}
    for name, each in ranking.items():
        tied = isinstance(each, list) and any(not isinstance(turn, dict) for turn in each)
        require(not tied, f"{place}: {name!r} is no response; of responses that tie leave out all but one")
    return {name: _field(dict(ranking), place, name) for name in ranking}


def _gathered(row: dict) -> dict:
    """A row with the answers of its ranking in one list."""
    ranked = [name for name in row if name.startswith(f"{RANKED} ")]
    rest = {name: value for name, value in row.items() if name not in ranked}
    return {**rest, RANKED: [row[name] for name in ranked]} if ranked else rest


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
