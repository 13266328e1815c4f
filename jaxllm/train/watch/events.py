"""WORKDIR/events.jsonl: what happened to a run, one JSON object a line: starts, saves, faults, how it ended.

Unlike the metrics it is never cut back: a run that was interrupted five times tells of all five. The first process
writes it; but how a run fails is written by each process that fails, with its number.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxllm.errors import UserError
from jaxllm.remote.copy import push
from jaxllm.remote.place import with_addresses
from jaxllm.train.watch.sinks import JsonLines

Value = float | int | str


class Events:
    """The events of a run. Each is also said, where it has something to say.

    Args:
      say: takes the messages.
    """

    step = 0  # the newest that the run is known to be at

    def __init__(self, workdir: Path, say: Callable[[str], None]):
        self._path, self.say = workdir / "events.jsonl", say
        self._lines: JsonLines | None = None
        self._has_begun = False

    def tell(self, event: str, step: int, message: str = "", **figures: Value) -> None:
        """Writes an event, and says its message."""
        message = with_addresses(message)
        if message:
            self.say(message)
        self.note(event, step, message, **figures)

    def note(self, event: str, step: int, message: str = "", **figures: Value) -> None:
        """Writes an event without saying it. A disk that is full hinders no run."""
        self._has_begun = True
        if jax.process_index():
            return
        if self._lines is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(self._path)
        self._lines.write(_line(event, step, message, figures))

    @contextlib.contextmanager
    def failures_written(self) -> Iterator[None]:
        """Writes how the run ends where what is inside `with` raises: "crashed", or "stopped" by a mistake.

        A mistake before the first event is told to the user alone: no run was begun.
        """
        try:
            yield
        except (UserError, KeyboardInterrupt) as error:
            if self._has_begun:
                self.write_end("stopped", str(error) or "interrupted")
            raise
        except Exception as error:
            self.write_end("crashed", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            raise

    def write_end(self, event: str, message: str) -> None:
        """Writes, from any process and any thread, that the run ends here, and returns once it is on the disk.

        Never raises for the storage's sake; where there is no folder of the run, nothing is written.
        """
        process = {"process": jax.process_index()} if jax.process_count() > 1 else {}
        with contextlib.suppress(OSError):
            lines = JsonLines(self._path)  # of its own: the loop may be stuck in the other
            try:
                lines.write(_line(event, self.step, message, process))
                lines.sync()
            finally:
                lines.close()
            if jax.process_index() == 0:
                push(self._path.parent)

    def close(self) -> None:
        """Closes the file."""
        if self._lines:
            self._lines.close()


def _line(event: str, step: int, message: str, figures: dict[str, Value]) -> dict[str, Value]:
    return {"time": round(time.time(), 3), "step": step, "event": event, "message": message, **figures}
