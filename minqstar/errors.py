"""What goes wrong, in words: errors that a user can mend, and the few helpers that their messages share."""

import importlib.util
import re
import signal


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what, where, and what to do."""


class Stopped(BaseException):
    """A signal asked the command to end. It is no Exception, so that no handler of errors holds it up."""

    def __init__(self, number: int, message: str = "stopped"):
        super().__init__(message)
        self.status = 128 + number


def ending_signals() -> list[int]:
    """The signals that ask a command to end; SIGHUP only where it exists and `nohup` has not had it ignored."""
    hang_up = getattr(signal, "SIGHUP", None)
    heard = hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([hang_up] if heard else [])]


def require(condition: bool, message: str):
    """Raise UserError(message) unless the condition holds. Not `assert`: it also holds under `python -O`."""
    if not condition:
        raise UserError(message)


def needs(package: str, extra: str, what: str):
    """UserError unless a package of one of the extras is installed."""
    found = importlib.util.find_spec(package) is not None
    require(found, f"{what} needs {package}, which is not installed: pip install 'minqstar[{extra}]'")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def fitting(found: dict, expected: dict):
    """ValueError unless both hold tensors of the same names, shapes and types, and the found ones are finite."""
    for name in sorted(expected.keys() | found.keys()):
        is_, should = (f"{tuple(of[name].shape)} {of[name].dtype}" if name in of else "not" for of in (found, expected))
        if is_ != should:
            raise ValueError(f"{name} is {is_} there, and should be {should}")
        if not found[name].isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")


def is_text(string: str) -> bool:
    """Whether a string is made of characters: JSON and the shell can also bring in halves of surrogate pairs."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


# control characters, line and paragraph separators, what turns the direction of writing, halves of surrogate pairs
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def visible(text: str, keep: str = "") -> str:
    """A text that is safe to print: what moves the cursor or the reading direction becomes a picture or an escape.

    ESC comes out as ␛, U+202E as \\u202e. The characters in `keep` stay: "\\n\\t" for texts of several lines.
    """

    def seen(match: re.Match) -> str:
        char, code = match[0], ord(match[0])
        return char if char in keep else chr(0x2400 + code) if code < 32 else "␡" if code == 127 else f"\\u{code:04x}"

    return UNSEEN.sub(seen, text)
