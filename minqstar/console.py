"""The console of every command: the one place through which texts reach the terminal."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import rich.console
from rich.progress import Progress
from rich.segment import Segment

from minqstar.errors import visible


class Console(rich.console.Console):
    """rich's console, safe for texts that anybody wrote: nothing in them moves the cursor or hides other text."""

    def __init__(self, **options):
        super().__init__(**{"highlight": False, "markup": False} | options)

    def say(self, text: str):
        """One line, as long as it is: a path or a command in it can be copied."""
        self.print(text, soft_wrap=True)

    def render(self, renderable, options=None) -> Iterable[Segment]:
        """What is printed, piece by piece; of tables and other nested things each cell passes here too."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text, keep="\n\t"))


@contextmanager
def progress(words: str, total: float) -> Iterator[Callable]:
    """A progress bar on standard error, if that is a terminal; what it yields advances it by some of the total."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(words, total=total)
        yield lambda steps=1: bar.advance(task, steps)
