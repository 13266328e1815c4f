"""Ends a process in which nothing moves any more, so that a launcher can start the run again.

A device that hangs, a process elsewhere that was stopped, a file system that does not answer: the others would wait in
a collective for ever. (A process that dies is noticed sooner: its connections break, or its heartbeats stop.)
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import jax

from jaxllm.errors import LOST

START_SECONDS = 7200.0  # for what comes before the first step: reading, compiling, restoring
SLOW = 10.0  # a step that takes so many times the usual time is told of
TOLD_FROM = 20.0  # seconds: no step is slow before
WRITE_SECONDS = 10.0  # for the last event: it may be the disk that does not answer


class Watchdog:
    """Inside `with`, watches that `alive` is called at least every `seconds`.

    Args:
      seconds: after which a process ends where nothing moved; 0: never.
      told: takes what is said of a slow step.
      write_end: writes down why the process ends.
      leave: how to end, with an exit code.
    """

    def __init__(
        self,
        seconds: float,
        told: Callable[[str], None],
        write_end: Callable[[str], None],
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.seconds, self._told, self._write_end, self._leave = seconds, told, write_end, leave
        self._allowed, self._doing, self._since = START_SECONDS, "starting", time.monotonic()
        self._usual: float | None = None
        self._told_of_this = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()

    def alive(self, doing: str, starting: bool = False) -> None:
        """Something moved.

        Args:
          doing: what comes now.
          starting: it may take long, as a start does.
        """
        self._allowed = START_SECONDS if starting else self.seconds
        self.goes_on(doing)

    def goes_on(self, doing: str) -> None:
        """Something moved in the midst of what may take as long as was said last."""
        self._doing, self._since, self._told_of_this = doing, time.monotonic(), False

    def usual(self, seconds: float) -> None:
        """What a step usually takes."""
        self._usual = seconds

    def _watch(self) -> None:
        while not self._end.wait(min(max(self.seconds / 20, 0.05), 5.0)):
            still = time.monotonic() - self._since
            if still > self._allowed:
                self._die(still)
            elif self._usual and still > max(SLOW * self._usual, TOLD_FROM) and not self._told_of_this:
                self._told_of_this = True
                self._told(f"{self._doing} has taken {still:.0f} s so far; a step usually takes {self._usual:.2g} s")

    def _die(self, still: float) -> None:
        why = f"nothing moved for {still:.0f} s while {self._doing} (config.train.hang_timeout)"
        print(
            f"jaxllm: process {jax.process_index()}: {why}; the run ends here and can go on from its last checkpoint. "
            "Where it stood:",
            file=sys.stderr,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        writing = threading.Thread(target=self._write_end, args=(why,), daemon=True)
        writing.start()
        writing.join(WRITE_SECONDS)
        self._leave(LOST)
