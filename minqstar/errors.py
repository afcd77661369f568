"""What goes wrong, in words: errors that a user can mend, and the few helpers that their messages share."""

import importlib.util


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what, where, and what to do."""


class Stopped(BaseException):
    """A signal asked the command to end. It is no Exception, so that no handler of errors holds it up."""

    def __init__(self, number: int, message: str = "stopped"):
        super().__init__(message)
        self.status = 128 + number


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


def is_text(string: str) -> bool:
    """Whether a string is made of characters: JSON and the shell can also bring in halves of surrogate pairs."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True
