"""Sides that take turns. Each is a process of its own, which works only while the bench waits for it.

The bench asks for a turn by one byte on a side's standard input. The side works for half a second or more, and answers
with one line of JSON on its standard output. A side ends when that input closes: none outlives the bench, however the
bench ended. Nothing here imports torch, so that tests can start such processes in no time.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple

from minqstar.errors import UserError

TURN = 0.5  # seconds, at the least


class Turn(NamedTuple):
    rate: float  # units of work per second
    peak_gb: float  # the most memory that the process has held so far
    cpu_seconds: float  # of a unit, all threads together: other work on the machine hardly changes them


@contextmanager
def side(name: str, command: list[str]) -> Iterator[Callable[[], Turn]]:
    """Start a side, wait until it is warm, and end it afterwards. UserError if it dies, with its last words.

    Ctrl-C reaches the bench alone, which then ends its sides.
    """
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0, "start_new_session": True}
    with tempfile.TemporaryFile() as errors, subprocess.Popen(command, stderr=errors, **how) as process:

        def turn() -> Turn:
            try:
                process.stdin.write(b"\n")
                return Turn(*json.loads(process.stdout.readline()))
            except (BrokenPipeError, ValueError):
                process.kill()
                process.wait()
                errors.seek(0)
                words = errors.read().decode(errors="replace").strip()
                raise UserError(f"{name}: {(words.splitlines() or ['it died'])[-1]}") from None

        try:
            turn()  # the first turn warms up
            yield turn
        finally:
            process.kill()


Process = AbstractContextManager[Callable[[], Turn]]  # what `side` gives


def alternate(sides: dict[str, Process], rounds: int) -> tuple[dict[str, list[Turn]], dict[str, UserError]]:
    """The turns of the sides that start, A B A B …, and why the others do not: no compiler, a package is missing."""
    with ExitStack() as stack:
        alive, failed = {}, {}
        for name, process in sides.items():
            try:
                alive[name] = stack.enter_context(process)
            except UserError as e:
                failed[name] = e
        taken = [{name: turn() for name, turn in alive.items()} for _ in range(rounds)]
    return {name: [turns[name] for turns in taken] for name in alive}, failed


class Turns:
    """The other end, in the process of a side, which calls it after each piece of work with the units that it did.

    When a turn is over, the call answers the bench and returns when the next turn begins.
    """

    def __init__(self, warm_up: int):
        """Wait for the first turn, which lasts for `warm_up` pieces at the least."""
        self.left, self.asked = warm_up, threading.Semaphore(0)
        self.out, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is no answer
        threading.Thread(target=self._listen, daemon=True).start()
        self._begin()

    def _listen(self):
        while os.read(0, 1):
            self.asked.release()
        os._exit(0)  # the bench is gone, and the work may be long

    def _begin(self):
        self.asked.acquire()
        self.units = self.seconds = self.cpu_seconds = 0.0
        self.since = time.perf_counter(), time.process_time()

    def __call__(self, units: float | None):
        """So many units are done; with 0, a part of the piece that gives none yet. With None, what was done since the
        last call was preparation, and is not measured."""
        now = time.perf_counter(), time.process_time()
        (seconds, cpu), self.since = (b - a for a, b in zip(self.since, now, strict=True)), now
        if units is None:
            return
        self.seconds, self.cpu_seconds, self.units = self.seconds + seconds, self.cpu_seconds + cpu, self.units + units
        self.left -= units > 0
        if units > 0 and self.left <= 0 and self.seconds >= TURN:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            turn = self.units / self.seconds, peak, self.cpu_seconds / self.units
            print(json.dumps(turn), file=self.out, flush=True)
            self._begin()
