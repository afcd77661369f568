"""Messages, as chat templates take them, from the forms in which people write them.

A message is a dict with `role` (system, user, assistant or tool) and `content`, perhaps with more that templates know.
"""

import json
import re

from minqstar.errors import require
from minqstar.text import clean

ROLES = dict(system="system", developer="system", user="user", human="user", assistant="assistant", gpt="assistant")
ROLES |= dict(model="assistant", function_call="assistant", tool="tool", function="tool", observation="tool")
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")  # of a message, for chat templates
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
