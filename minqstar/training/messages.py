"""Messages, as chat templates take them, from the forms in which people write them; where their prompt ends.

A message is a dict with `role` (system, user, assistant or tool) and `content`, perhaps with more that templates know.
"""

import json
import re
from collections.abc import Iterable, Sequence

from minqstar.errors import UserError, require
from minqstar.text import clean

ROLES = dict(system="system", developer="system", user="user", human="user", assistant="assistant", gpt="assistant")
ROLES |= dict(model="assistant", function_call="assistant", tool="tool", function="tool", observation="tool")
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")  # of a message, for chat templates
Field = str | list[dict]  # text or messages
HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")


def message_of(raw: dict, what: str) -> dict:
    """A message with `role`, `content` and what chat templates know; ShareGPT says `from` and `value`."""
    require(isinstance(raw, dict), f"{what}: want an object with role and content, got {type(raw).__name__}")
    role = raw.get("role") or raw.get("from")
    known = isinstance(role, str) and role in ROLES
    require(known, f"{what}: unknown role {role!r:.40}; known are {', '.join(ROLES)}")
    contents = [raw[name] for name in ("content", "value") if name in raw]
    require(bool(contents or raw.get("tool_calls")), f"{what}: the field 'content' is missing")
    content = next((content for content in contents if content is not None), "")
    if isinstance(content, list):  # of parts
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        require(all(isinstance(part, str) for part in parts), f"{what}: holds a part that is not text")
        content = "".join(parts)
    require(isinstance(content, str), f"{what}: its content must be a string, got {type(content).__name__}")
    message = {"role": ROLES[role], "content": clean(content, what)}
    if role == "function_call" and (calls := _calls(message["content"])):
        message |= {"content": "", "tool_calls": _cleaned(calls, what)}
    return message | {name: _cleaned(raw[name], what) for name in KEPT if raw.get(name)}


def _calls(text: str) -> list[dict]:
    """The calls that ShareGPT writes as JSON, one or a list of them; none if the text is something else."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = calls if isinstance(calls, list) else [calls]
    named = all(isinstance(call, dict) and "name" in call for call in calls)
    return [{"type": "function", "function": call} for call in calls] if named else []


def _cleaned(value, what: str):
    """A value of JSON with every text in it cleaned. Parquet fills in null where one call lacks what another has."""
    if isinstance(value, dict):
        return {clean(name, what): _cleaned(each, what) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_cleaned(each, what) for each in value]
    return clean(value, what) if isinstance(value, str) else value


def dialogue(text: str, place: str) -> list[dict]:
    """The messages of an HH string. A mark of the speaker who is speaking already is part of what is said."""
    text, marks = text.lstrip("\n"), []
    for match in HH_TURN.finditer(text):
        if match[1] == ("Assistant" if len(marks) % 2 else "Human"):
            marks.append(match)
    require(bool(marks) and marks[0].start() == 0, f"{place}: a dialogue must begin with 'Human:'")
    ends = [*(match.start() for match in marks[1:]), len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[m[1]], "content": text[m.end() : end]} for m, end in zip(marks, ends, strict=True)]


def behind(prompt: list[dict], answers: dict[str, Field], place: str) -> dict:
    """A row of a prompt and its answers. Answers that repeat the prompt, or go on with other turns first, are cut."""
    talks, last = {name: turns_of(answer, "assistant") for name, answer in answers.items()}, prompt[-1]
    if all(turns[0]["role"] == "assistant" for turns in talks.values()):
        return {"prompt": prompt, **{name: ended(turns, name, place) for name, turns in talks.items()}}
    for name, turns in talks.items():
        own = turns[0]["role"] == "assistant"
        repeated = (i for i, turn in enumerate(turns, 1) if not own and same(turn, last))
        known = next(repeated, 0)  # how many turns the answer repeats, up to the one in which the prompt ends
        twice = not known and turns[0]["role"] == last["role"] == "user"
        require(not twice, f"{place}: {name!r} begins with a user's turn, but not with the one that the prompt ends in")
        talks[name] = max(prompt, turns[:known], key=len) + turns[known:]
    return split(talks, place, len(prompt))


def same(one: dict, other: dict) -> bool:
    """Whether two messages say the same, but for white space around it."""
    return one["role"] == other["role"] and one["content"].strip() == other["content"].strip()


def split(talks: dict[str, list[dict]], place: str, given: int = 1) -> dict:
    """Conversations cut where the assistant's turn begins: a single one at its first, behind the `given` messages.

    Others are cut at the last turn that all have at the same place behind the same messages. None is empty: each ends
    with the assistant.
    """
    talks = {name: ended(talk, name, place) for name, talk in talks.items()}
    first, several = next(iter(talks.values())), len(talks) > 1
    for at in range(alike(*talks.values()), 0, -1) if several else range(given, len(first)):
        if first[at - 1]["role"] != "assistant" and all(talk[at]["role"] == "assistant" for talk in talks.values()):
            return {"prompt": first[:at], **{name: talk[at:] for name, talk in talks.items()}}
    why = f"{in_words(talks)} share no turn before one of the assistant" if several else "the assistant speaks first"
    raise UserError(f"{place}: no prompt: {why}")


def ended(turns: list[dict], name: str, place: str) -> list[dict]:
    """A conversation up to the last message of the assistant."""
    own = [i for i, turn in enumerate(turns, 1) if turn["role"] == "assistant"]
    require(bool(own), f"{place}: no turn of the assistant" + f" in {name!r}" * (name != "completion"))
    return turns[: own[-1]]


def turns_of(field: Field, role: str) -> list[dict]:
    return [{"role": role, "content": field}] if isinstance(field, str) else field


def led(system: list[dict], turns: list[dict]) -> list[dict]:
    """A conversation behind the system's message, unless it has one of its own."""
    return turns if turns[0]["role"] == "system" else system + turns


def alike(*sequences: Sequence) -> int:
    """How many items, characters or messages, all have in common at their beginning."""
    for place, (item, *others) in enumerate(zip(*sequences, strict=False)):
        if any(other != item for other in others):
            return place
    return min(map(len, sequences))


def in_words(names: Iterable[str]) -> str:
    """'chosen' and 'rejected'."""
    return " and ".join(map(repr, names))
