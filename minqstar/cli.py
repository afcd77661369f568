"""How every command meets its user: options from a dataclass, and one clear line for a mistake.

Torch takes a second to import. So this module does not, and `start` imports a command only when Ctrl-C is one line too.
"""

import contextlib
import importlib
import io
import os
import re
import signal
import sys
import textwrap
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TypeVar

from minqstar.errors import Stopped, UserError, ending_signals, first_line, visible

Options = TypeVar("Options")
Needs = Sequence[tuple[str, str]]  # ("tree mcts", "--search mcts"): see `misplaced`


def stop(number: int, _):
    """A signal handler."""
    raise Stopped(number)


def leave(number: int, _):
    """The handler while modules are imported: nothing can be lost yet, and an exception could be, in foreign code."""
    with contextlib.suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(128 + number)


def hear_signals(handler: Callable):
    for number in ending_signals():
        signal.signal(number, handler)


def start(module: str):
    """The command of a module: what it calls `main`, `Options` and `NEEDS`."""
    hear_signals(leave)
    try:
        found = importlib.import_module(module)
    except UserError as e:  # somebody's scenario: each is checked when it is made, which is now
        sys.exit(f"{Path(sys.argv[0]).name}: {visible(str(e))}")
    run(found.main, found.Options, needs=found.NEEDS)


def train():
    """`train.py`, and `minqstar-train` after an installation."""
    start("minqstar.pipeline")


def sample():
    """`sample.py`, and `minqstar-sample` after an installation."""
    start("minqstar.sample")


# ---- the command line


def parse(options: type[Options], prog: str, args: list[str] | None = None, needs: Needs = ()) -> Options:
    """Options from the command line. A mistake prints one line on standard error and exits with status 2."""
    import tyro

    args = sys.argv[1:] if args is None else args
    whole = "--help-all" in args
    config = (tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
    with kept_apart() as (drawn, complaint):
        try:
            parsed, words = tyro.cli(options, prog=prog, args=["--help"] if whole else args, config=config), ""
        except SystemExit as e:
            parsed, words = None, mistake(complaint.getvalue(), e, options) if e.code else ""
    if parsed is None and not words:
        print(help_text(drawn.getvalue(), prog, whole, sys.modules[options.__module__].__doc__ or ""))
        sys.exit()
    words = words or misplaced(parsed, args, needs)
    if words:
        print(f"{prog}: {visible(words)} (see {prog} --help)", file=sys.stderr)
        sys.exit(2)
    return parsed


@contextlib.contextmanager
def kept_apart() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Inside, what is printed goes into two texts, output and errors, 80 columns wide."""
    out, errors = io.StringIO(), io.StringIO()
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "80"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            yield out, errors
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def misplaced(parsed: object, args: list[str], needs: Needs) -> str:
    """What the first option needs that was typed, if only with its default, and has no use beside the others; or "".

    A rule names options, or groups of them, and their condition: `--data` must be given, or be `no --data`, or
    `--search sample best-of-n` have one of these values. A positional one is written as `--help` does: RUN.
    """
    words = args[: args.index("--")] if "--" in args else args
    typed = [re.sub(r"(^|\.)no-", r"\1", m[1].replace("_", "-")) for w in words if (m := re.match(r"--([\w.-]+)", w))]
    for name in typed:
        for rule in (condition for names, condition in needs if {name, name.split(".")[0]} & set(names.split())):
            flag, *values = rule.removeprefix("no ").split()
            value = getattr(parsed, flag.strip("-").replace("-", "_").lower())
            holds = str(value) in values if values else value not in (None, False)
            if holds and rule.startswith("no "):
                return f"--{name} does not go with {flag}"
            if not holds and not rule.startswith("no "):
                named = [flag] if flag.startswith("--") or not values else []
                return " ".join([f"--{name} needs", *named, " or ".join(values)]).rstrip()
    return ""


def mistake(drawn: str, error: SystemExit, options: type) -> str:
    """In one line what tyro says of a mistake: a title, a rule, what is wrong, a rule, and perhaps what was meant."""
    parts = re.split(r"^ *-+ *\n", drawn, flags=re.M)
    words, hints = " ".join(parts[1].split()), "".join(parts[2:])
    if group := re.match(r"Error parsing (\w+): ", words):
        cause = error.__context__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__  # the message itself: tyro breaks long words
        nested = typing.get_type_hints(options).get(group[1])
        flags = flags_of(nested, f"--{group[1]}.") if nested else flags_of(options)
        return as_typed(str(cause or words.removeprefix(group[0])), flags, first=True)
    if words.startswith("Missing from"):  # RUN (required) and what it is
        return re.sub(r"(?<=required\)).*", "", words)
    similar = re.findall(r"^ {6}(--[\w.-]+)", hints, re.M) if words.startswith("Unrecognized") else []
    similar = [flag for flag in similar if re.search(rf"--{flag.split('.')[-1]}(?![\w-])", words)] or similar
    return words.removeprefix("Error parsing ") + (f"; perhaps you meant {' or '.join(similar[:4])}" if similar else "")


def flags_of(options: type, prefix: str = "--") -> dict[str, str]:
    """The flag of each field."""
    kinds = typing.get_type_hints(options)
    return {name: prefix + name.replace("_", "-") for name, kind in kinds.items() if not is_dataclass(kind)}


def as_typed(message: str, flags: dict[str, str], first: bool = False) -> str:
    """A message with flags in place of the fields that it names: those with an underscore, and the `first` word."""
    named = r"(?<!\S)[a-z]+(?:_[a-z]+)+(?=[ ,;:]|$)" + (r"|^\w+(?= )" if first else "")
    return re.sub(named, lambda match: flags.get(match[0], match[0]), message)


def help_text(drawn: str, prog: str, whole: bool, story: str) -> str:
    """tyro's help in plain lines: the command's own options, its groups too if `whole`, the docstring's examples."""
    usage, *parts = re.split(r"^ (\S.*?) *\n -+ *\n", drawn, flags=re.M)
    boxes = list(zip(parts[::2], parts[1::2], strict=True))
    groups = [title.split()[0] for title, _ in boxes if title.endswith(" options")]
    text = "\n\n".join(textwrap.fill(part, 80, subsequent_indent="  ") for part in usage.strip().split("\n\n"))
    for title, body in boxes:
        if whole or not title.endswith(" options"):
            body = re.sub(r"\s*\(default:\s+(None|False|/[^)]*)\)", "", body)  # /: a path of this machine
            body = re.sub(r"^ *-* *\n", "", body, flags=re.M)
            text += f"\n\n{title}:\n" + re.sub(" +$", "", body, flags=re.M).rstrip()
    if groups:
        text = re.sub("(-h, --help +)show .*", r"\1show this; --help-all shows all options", text)
    if groups and not whole:
        text += f"\n\nmore options, shown by --help-all: {', '.join(f'--{group}.*' for group in groups)}"
    examples = ""
    for line in re.findall(r"^ *((?:python|echo) .*)", story, re.M):
        line = re.sub(r"python (train|sample)\.py", r"minqstar-\1", line) if prog.startswith("minqstar-") else line
        command, _, comment = line.partition("  #")
        examples += f"\n  #{comment}\n  {command.strip()}" if comment else f"\n  {line}"
    return text + (f"\n\nexamples:{examples}" if examples else "")


# ---- the run


class Output:
    """Standard output that breaks no run: what cannot be encoded is replaced; where nobody reads on, or the disk is
    full, the rest is dropped, and `finish` raises the error when the work is done."""

    def __init__(self, stream: io.TextIOBase):
        self.stream, self.error = stream, None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def finish(self):
        self.flush()
        if self.error:
            raise self.error

    def _try(self, call: Callable, *args):
        try:
            call(*args)
        except OSError as e:
            self.error = self.error or e


@contextlib.contextmanager
def streams(prog: str) -> Iterator[Output]:
    """Inside, standard streams that were closed read and write nothing, `Output` is in use, a warning is one line."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in their order: each takes its own handle
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    before = sys.stdout, warnings.formatwarning
    sys.stdout = Output(sys.stdout)
    warnings.formatwarning = lambda message, *_: f"{prog}: {visible(str(message))}\n"
    try:
        yield sys.stdout
    finally:
        sys.stdout.flush()
        sys.stdout, warnings.formatwarning = before


def run(main: Callable[[Options], None], options: type[Options], prog: str | None = None, needs: Needs = ()):
    """Parse the command line and run. What goes wrong outside the code ends in one line on standard error.

    Exit status 2 for a mistake on the command line, 1 for one found later, 128 + n for signal n, which of a closed
    pipe is SIGPIPE.
    """
    prog = prog or Path(sys.argv[0]).name
    hear_signals(stop)
    try:
        with streams(prog) as output:
            try:
                main(parse(options, prog, needs=needs))
            except SystemExit as e:
                if e.code:  # 0: the help was shown
                    raise
            output.finish()
            return
    except UserError as e:
        message, status = as_typed(str(e), flags_of(options)), 1
    except Stopped as e:
        message, status = str(e), e.status
    except BrokenPipeError:  # `sample.py | head`: who closed it knows
        sys.exit(128 + 13)
    except OSError as e:
        message, status = f"{e.filename or 'output'}: {e.strerror or e}", 1
    except FloatingPointError as e:
        message, status = f"numbers overflow ({first_line(e)}): weights are too large, or damaged; train anew", 1
    except (MemoryError, RuntimeError) as e:  # CUDA's kind is a RuntimeError; the CPU's allocator has none of its own
        if (
            not isinstance(e, MemoryError)
            and type(e).__name__ != "OutOfMemoryError"
            and "allocate memory" not in str(e)
        ):
            raise
        message, status = f"out of memory; a smaller model, row length, batch or budget may fit ({first_line(e)})", 1
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"{prog}: {visible(message)}", file=sys.stderr)
    sys.exit(status)
