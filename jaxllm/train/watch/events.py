"""WORKDIR/events.jsonl: what happened to a run, one JSON object a line: starts, saves, faults, how it ended.

Unlike the metrics it is never cut back: a run that was interrupted five times tells of all five. The first process
writes it; what happens in another one goes to its stderr.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax

from jaxllm.remote.place import with_addresses
from jaxllm.train.watch.sinks import JsonLines

Value = float | int | str


class Events:
    """The events of a run. Each is also said, where it has something to say.

    Args:
      say: takes the messages.
    """

    def __init__(self, workdir: Path, say: Callable[[str], None]):
        self._path, self.say = workdir / "events.jsonl", say
        self._lines: JsonLines | None = None

    def tell(self, event: str, step: int, message: str = "", **figures: Value) -> None:
        """Writes an event, and says its message."""
        message = with_addresses(message)
        if message:
            self.say(message)
        self.note(event, step, message, **figures)

    def note(self, event: str, step: int, message: str = "", **figures: Value) -> None:
        """Writes an event without saying it. A disk that is full hinders no run."""
        if jax.process_index():
            return
        if self._lines is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(self._path)
        self._lines.write({"time": round(time.time(), 3), "step": step, "event": event, "message": message, **figures})

    def close(self) -> None:
        """Closes the file."""
        if self._lines:
            self._lines.close()
