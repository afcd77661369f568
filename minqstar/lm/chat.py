"""Chat templates: the Jinja program that comes with a checkpoint and writes a conversation as one text.

Such a program is somebody else's. It runs in Jinja's sandbox, sees plain data only, and is stopped when it runs for
more than `SECONDS` or makes a string, a list or a number that is huge.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from minqstar.errors import UserError, first_line, needs, require, visible
from minqstar.text import LONGEST

SECONDS = 5.0
PRIVATE = range(0xF0000, 0x10FFFE)  # characters that mean nothing by themselves
MARK = chr(PRIVATE[0])


class ChatTemplate:
    """The template `source`, which stands in the file `place`. `tokens` holds what it may name: `bos_token`, …"""

    def __init__(self, source: str, place: str, tokens: dict[str, str]):
        needs("jinja2", "hf", f"the chat template in {place}")
        self.source, self.place, self.tokens = source, place, tokens
        with self._bounded():
            self.template = environment().from_string(source)

    def render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        """The text of a conversation, up to and with what opens the assistant's turn if a prompt is asked for.

        UserError, with the template's own words, if it refuses these messages, fails, or does not end.
        """
        given = {**self.tokens, "messages": messages, "tools": None, "documents": None}
        with self._bounded():
            return self.template.render(**given, add_generation_prompt=add_generation_prompt)

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Inside, every line of Python looks at the clock, and what functions return is measured."""
        end, before = time.monotonic() + SECONDS, sys.gettrace()

        def watch(frame, event: str, value):
            if time.monotonic() > end:
                raise TimeoutError(f"it runs for more than {SECONDS:.0f} seconds")
            if event == "return" and isinstance(value, (str, list)) and len(value) > LONGEST:
                raise OverflowError("what it writes is too long")
            return watch

        sys.settrace(watch)
        try:
            yield
        except Exception as e:  # a program can fail in every way that there is
            raise UserError(f"{self.place}: the chat template fails: {visible(first_line(e))}") from e
        finally:
            sys.settrace(before)


def environment():
    """Jinja as transformers sets it up for templates: the same switches, the same few functions."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context, operator: str, left, right):
            """A product or power, unless it is huge: `"a" * 10**9` would be made in one step."""
            a, b = (len(x) if isinstance(x, (str, list, tuple)) else x for x in (left, right))
            if isinstance(a, (int, float)) and isinstance(b, (int, float)):
                size = abs(a) ** min(b, 64) if operator == "**" else abs(a * b)
                plain = isinstance(left, (int, float)) and isinstance(right, (int, float))
                if size > (2**63 if plain else LONGEST):
                    raise OverflowError(f"{operator} makes something huge")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """`{% generation %}` marks what the assistant wrote; it writes nothing itself."""

        tags = frozenset(["generation"])

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def marks_for(messages: list, tokens: list[str]) -> dict[str, str]:
    """A character for each of the tokens that the messages hold: it stands for the token while they are rendered."""
    written = "".join(strings(messages))
    free = (chr(code) for code in PRIVATE if chr(code) not in written)
    return {token: next(free) for token in tokens if token in written}


def strings(value) -> Iterator[str]:
    """All strings in a message."""
    if isinstance(value, str):
        yield value
    for part in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from strings(part)


def swapped(value, by: dict[str, str]):
    """A plain copy of a text or message with some strings in it exchanged, the longest first."""
    if isinstance(value, str):
        anyone = "|".join(map(re.escape, sorted(by, key=len, reverse=True)))
        return re.sub(anyone, lambda match: by[match[0]], value) if by else value
    if isinstance(value, list):
        return [swapped(part, by) for part in value]
    if isinstance(value, dict):
        return {name: swapped(part, by) for name, part in value.items() if part is not None}
    require(
        value is None or isinstance(value, (bool, int, float)), f"a message holds {type(value).__name__}: want text"
    )
    return value
