"""How every command meets its user: options from a dataclass, and one clear line for a mistake."""

import contextlib
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import tyro

from minqstar.errors import Stopped, UserError, first_line

Options = TypeVar("Options")


def stop(number: int, _):
    """A signal handler."""
    raise Stopped(number)


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
            words = " ".join(filter(None, lines[:rule]))
            words = re.sub(r"^Error parsing \w+: |(?<=required\)).*", "", words)
            print(f"{prog}: {words} (see {prog} --help)", file=sys.stderr)
        raise


def run(main: Callable[[Options], None], options: type[Options], prog: str | None = None):
    """Parse the command line and run. What goes wrong outside the code ends in one line on standard error.

    Exit status 2 for a mistake on the command line, 1 for one found later, 128 + n for signal n.
    """
    prog = prog or Path(sys.argv[0]).name
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        with one_line_warnings(prog):
            main(parse(options, prog))
        sys.stdout.flush()
        return
    except UserError as e:
        message, status = str(e), 1
    except Stopped as e:
        message, status = str(e), e.status
    except OSError as e:
        message, status = f"{e.filename or 'output'}: {e.strerror or e}", 1
        if isinstance(e, BrokenPipeError):  # `sample.py | head`: nobody reads on, and nothing more can be flushed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MemoryError, torch.OutOfMemoryError) as e:
        message, status = f"out of memory; a smaller model, row length, batch or budget may fit ({first_line(e)})", 1
    except RuntimeError as e:  # the CPU's allocator has no exception of its own
        if "allocate memory" not in str(e):
            raise
        message, status = "out of memory; a smaller model, row length, batch or budget may fit", 1
    print(f"{prog}: {message}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def one_line_warnings(prog: str):
    """Inside, a warning is a line as an error is."""
    before, warnings.formatwarning = warnings.formatwarning, lambda message, *_: f"{prog}: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
