"""Saves that may fail: the training goes on and tries again, until too much would be lost."""

import time
from collections.abc import Callable

from jaxllm.train.checkpoint.checkpoints import Checkpoints, SaveFailed
from jaxllm.train.watch.events import Events
from jaxllm.train.watch.roll_call import any_process

LAST_TRIES = 5  # of a save after which nothing follows
LAST_PAUSE_SECONDS = 1.0


class Saver:
    """The saves of a run's checkpoints. Every process makes one and calls it at the same steps.

    Args:
      every: steps between saves; one that failed is tried again after a tenth of them.
      max_unsaved_minutes: a run that cannot be saved for so long ends.
    """

    def __init__(self, checkpoints: Checkpoints, events: Events, every: int, max_unsaved_minutes: float):
        self._checkpoints, self._events, self._max_minutes = checkpoints, events, max_unsaved_minutes
        self._retry_after = max(every // 10, 1)
        self._retry_at: int | None = None
        self._safe_since, self._begun = time.monotonic(), 0.0  # the newest state on disk; the save under way
        self._step = 0  # of the save under way

    @property
    def save_failed(self) -> bool:
        """Whether this process knows that the save under way fails."""
        return self._checkpoints.save_failed

    def retries(self, step: int) -> bool:
        """Whether a save that failed is to be tried again now."""
        return self._retry_at is not None and step >= self._retry_at

    def save(self, step: int, start: Callable[[], None]) -> float:
        """Finishes the save before and starts this one. Returns the seconds that the steps had to wait.

        Args:
          start: calls `Checkpoints.save`.

        Raises:
          UserError: nothing could be saved for too long.
        """
        begun = time.monotonic()
        self.settle(step)
        self._step, self._begun, self._retry_at = step, begun, None
        try:
            start()
        except SaveFailed as error:
            self._failed(step, error)
        return time.monotonic() - begun

    def settle(self, step: int) -> None:
        """Waits for the save under way, and takes note where it failed."""
        try:
            seconds = self._checkpoints.wait()
        except SaveFailed as error:
            self._failed(step, error)
        else:
            self._saved(seconds)

    def finish(self, step: int, start: Callable[[], None]) -> None:
        """Waits for the last save; where it failed, tries a few times more.

        Raises:
          UserError: it failed for good.
        """
        for left in reversed(range(LAST_TRIES)):
            try:
                if self._retry_at is not None:
                    self._begun, self._retry_at = time.monotonic(), None
                    start()
                self._saved(self._checkpoints.wait())
                return
            except SaveFailed as error:
                if not left:
                    raise
                self._failed(step, error)
                time.sleep(LAST_PAUSE_SECONDS)

    def _saved(self, seconds: float | None) -> None:
        if seconds is not None:
            self._safe_since = self._begun
            self._events.note("saved", self._step, seconds=round(seconds, 3))

    def _failed(self, step: int, error: SaveFailed) -> None:
        self._retry_at = step + self._retry_after
        reason = str(error).partition("\n")[0]
        minutes = (time.monotonic() - self._safe_since) / 60
        if any_process(minutes > self._max_minutes):
            raise SaveFailed(
                f"{error}\nNothing could be saved for {minutes:.0f} minutes (config.train.max_unsaved_minutes)."
            ) from error
        self._events.tell(
            "save_failed", step, f"{reason} The training goes on; the next try is at step {self._retry_at}."
        )
