"""How every command meets its user: options from a dataclass, and one clear line for a mistake.

Torch takes a second to import. So this module does not, and `start` imports a command only when Ctrl-C is one line too.
"""

import functools
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
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import TypeVar

from minqstar.errors import Stopped, UserError, ending_signals, first_line, visible

Options = TypeVar("Options")
Defaults = Callable[[list[str]], object]
Needs = Sequence[tuple[str, str]]  # ("tree mcts", "--search mcts"): see `misplaced`


def stop(number: int, _):
    """A signal handler."""
    raise Stopped(number)


def leave(number: int, _):
    """The handler while modules are imported: nothing can be lost yet, and an exception could be, in foreign code."""
    with suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(128 + number)


def hear_signals(handler: Callable):
    for number in ending_signals():
        signal.signal(number, handler)


def start(module: str):
    """The command of a module: what it calls `main`, `Options` and `NEEDS`."""
    hear_signals(leave)
    found = importlib.import_module(module)
    run(found.main, found.Options, needs=found.NEEDS, defaults=vars(found).get("defaults"))


train = functools.partial(start, "minqstar.pipeline")  # `train.py`, and after an installation `minqstar-train`
sample = functools.partial(start, "minqstar.lab.sample")


# ---- the command line


def parse(
    options: type[Options],
    prog: str,
    args: list[str] | None = None,
    needs: Needs = (),
    defaults: Defaults | None = None,
) -> Options | None:
    """Options from the command line, None where it asked for help and got it. `defaults` gives them for its words.

    A mistake prints one line on standard error and exits with status 2.
    """
    from unittest.mock import patch

    import tyro

    args = sys.argv[1:] if args is None else args
    whole, drawn, complaint = "--help-all" in args, io.StringIO(), io.StringIO()
    config = (tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
    try:
        with redirect_stdout(drawn), redirect_stderr(complaint), patch.dict(os.environ, COLUMNS="80"):
            default = {"default": defaults(args)} if defaults else {}
            parsed = tyro.cli(options, prog=prog, args=["--help"] if whole else args, config=config, **default)
        words = misplaced(parsed, args, needs)
    except SystemExit as e:
        if not e.code:
            print(help_text(drawn.getvalue(), prog, whole, sys.modules[options.__module__].__doc__ or ""))
            return None
        words = mistake(complaint.getvalue(), e, options)
    if words:
        print(f"{prog}: {visible(words)} (see {prog} --help)", file=sys.stderr)
        sys.exit(2)
    return parsed


def misplaced(parsed: object, args: list[str], needs: Needs) -> str:
    """What the first option needs that was typed, if only with its default, and has no use beside the others; or "".

    A rule names options, or groups of them, and their condition: `--data` must be given, or be `no --data`, or
    `--search sample best-of-n` have one of these values. A positional one is written as `--help` does: RUN. Of
    `RUN|--policy` one must be given.
    """
    words = args[: args.index("--")] if "--" in args else args
    typed = [re.sub(r"(^|\.)no-", r"\1", m[1].replace("_", "-")) for w in words if (m := re.match(r"--([\w.-]+)", w))]
    for name in typed:
        for rule in (condition for names, condition in needs if {name, name.split(".")[0]} & set(names.split())):
            flag, *values = rule.removeprefix("no ").split()
            places = [one.strip("-").replace("-", "_").lower().split(".") for one in flag.split("|")]
            there = [functools.reduce(getattr, place, parsed) for place in places]
            holds = any(str(value) in values if values else value not in (None, False) for value in there)
            if holds and rule.startswith("no "):
                return f"--{name} does not go with {flag}"
            if not holds and not rule.startswith("no "):
                named = [flag.replace("|", " or ")] if flag.startswith("--") or not values else []
                return " ".join([f"--{name} needs", *named, " or ".join(values)]).rstrip()
    return ""


def mistake(drawn: str, error: SystemExit, options: type) -> str:
    """In one line what tyro says of a mistake: a title, a rule, what is wrong, a rule, and perhaps what was meant."""
    _, words, *hints = re.split(r"^ *-+ *\n", drawn, flags=re.M)
    words = re.sub(r"(?<=required\)).*", "", " ".join(words.split()))
    if group := re.match(r"Error parsing (\w+): ", words):
        cause = error.__context__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__  # the message itself: tyro breaks long words
        nested = typing.get_type_hints(options).get(group[1])
        flags = flags_of(nested, f"--{group[1]}.") if nested else flags_of(options)
        return as_typed(str(cause or words.removeprefix(group[0])), flags, first=True)
    similar = re.findall(r"^ {6}(--[\w.-]+)", "".join(hints), re.M) if words.startswith("Unrecognized") else []
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
    """tyro's help, its parts as paragraphs: the command's own options, if `whole` its groups too, examples.

    tyro draws a part as a title, a rule and lines; the examples are the commands in the module's docstring.
    """
    usage, *parts = re.split(r"^ (\S.*?) *\n -+ *\n", drawn, flags=re.M)
    text = "\n\n".join(textwrap.fill(part, 80, subsequent_indent="  ") for part in usage.strip().split("\n\n"))
    groups = [title.split()[0] for title in parts[::2] if title.endswith(" options")]
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        if whole or not title.endswith(" options"):
            body = re.sub(r"\s*\(default:\s+(None|False|/[^)]*)\)", "", body)  # /: a path of this machine
            text += f"\n\n{title}:\n" + re.sub(r"^ *-* *\n| +$", "", body, flags=re.M).rstrip()
    if groups:
        text = re.sub("(-h, --help +)show .*", r"\1show this; --help-all shows all options", text)
    if groups and not whole:
        text += f"\n\nmore, shown by --help-all: {', '.join(f'--{group}.*' for group in groups)}"
    if prog.startswith("minqstar-"):
        story = re.sub(r"python (train|sample)\.py", r"minqstar-\1", story)
    examples = re.findall(r"^ *((?:python|echo|minqstar-).*?)(?:  +#( .*))?$", story, re.M)
    lines = [f"\n  #{comment}\n  {command}" if comment else f"\n  {command}" for command, comment in examples]
    return text + "".join(["\n\nexamples:", *lines] if lines else [])


# ---- the run


class Output:
    """Standard output that breaks no run: what cannot be encoded is replaced, and what cannot be written is dropped.

    The first `error` is kept for the end, when the work is done: nobody reads on, or the disk is full.
    """

    def __init__(self, stream: io.TextIOBase):
        self.stream, self.error = stream, None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str):
        self._try(self.stream.write, text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, call: Callable, *args):
        try:
            call(*args)
        except OSError as e:
            self.error = self.error or e


@contextmanager
def streams(prog: str) -> Iterator[None]:
    """Inside, standard streams that were closed read and write nothing, `Output` is in use, a warning is one line."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in their order: each takes its own handle
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    before, output = (sys.stdout, warnings.formatwarning), Output(sys.stdout)
    sys.stdout, warnings.formatwarning = output, lambda message, *_: f"{prog}: {visible(str(message))}\n"
    try:
        yield
    finally:
        output.flush()
        sys.stdout, warnings.formatwarning = before
    if output.error:
        raise output.error


def run(
    main: Callable[[Options], None],
    options: type[Options],
    prog: str | None = None,
    needs: Needs = (),
    defaults: Defaults | None = None,
):
    """Parse the command line and run. What goes wrong outside the code ends in one line on standard error.

    Exit status 2 for a mistake on the command line, 1 for one found later, 128 + n for signal n, which of a closed
    pipe is SIGPIPE.
    """
    prog = prog or Path(sys.argv[0]).name
    hear_signals(stop)
    try:
        with streams(prog):
            if (parsed := parse(options, prog, needs=needs, defaults=defaults)) is not None:
                main(parsed)
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
    except (MemoryError, RuntimeError) as e:  # CUDA's error is a RuntimeError; the CPU's has no type of its own
        memory = isinstance(e, MemoryError) or "OutOfMemory" in type(e).__name__ or "allocate memory" in str(e)
        if not memory:
            raise
        message, status = f"out of memory; a smaller model, row length, batch or budget may fit ({first_line(e)})", 1
    with suppress(OSError):  # the terminal may be gone
        print(f"{prog}: {visible(message)}", file=sys.stderr)
    sys.exit(status)
