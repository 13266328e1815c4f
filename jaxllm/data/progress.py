"""Progress of the work that prepares data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.console
import rich.progress

Bar = Callable[[str], "contextmanager[Callable[[float], None]]"]


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr; the value it yields takes the part that is done, 0 to 1."""
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def no_progress_bar(what: str) -> Iterator[Callable[[float], None]]:
    yield lambda done: None
