"""How every command meets its user: options from a dataclass, and one clear line for a mistake."""

import contextlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

Options = TypeVar("Options")


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what, where, and what to do."""


def require(condition: bool, message: str):
    """Raise UserError(message) unless the condition holds. Not `assert`: it also holds under `python -O`."""
    if not condition:
        raise UserError(message)


def parse(options: type[Options], prog: str, args: list[str] | None = None) -> Options:
    """Options from the command line. A mistake prints one line on standard error and exits with status 2."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(options, prog=prog, args=args)
    except SystemExit as stop:
        if stop.code:  # tyro draws a box of several lines; keep the words of its first part
            lines = [re.sub(r"[│╭╮╰╯]", " ", line).strip() for line in complaint.getvalue().splitlines()[1:]]
            rule = next((i for i, line in enumerate(lines) if set(line) == {"─"}), len(lines))
            print(f"{prog}: {' '.join(filter(None, lines[:rule]))} (see {prog} --help)", file=sys.stderr)
        raise


def run(main: Callable[[Options], None], options: type[Options], prog: str | None = None):
    """Parse the command line and run; a UserError ends in one line on standard error and status 1."""
    prog = prog or Path(sys.argv[0]).name
    try:
        main(parse(options, prog))
    except UserError as e:
        print(f"{prog}: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
