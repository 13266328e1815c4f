"""A run of launch/local.py that is watched, so that a fault strikes it at the moment that is meant."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.train.kill_campaign import UNFINISHED

LIMIT = 600  # seconds for a run with its restarts; a tenth is usual


class Running:
    """A run under way: its output is read line by line."""

    def __init__(self, workdir: Path, launcher: subprocess.Popen):
        self.workdir, self.launcher, self._lines = workdir, launcher, []
        os.set_blocking(launcher.stdout.fileno(), False)

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def read(self) -> None:
        """Takes what was printed since."""
        while line := self.launcher.stdout.readline():
            self._lines.append(line)

    def wait_for(self, found: Callable[[], bool]) -> bool:
        """Waits until something is the case; False where the run ended before."""
        end = time.monotonic() + LIMIT
        while self.launcher.poll() is None and time.monotonic() < end:
            self.read()
            if found():
                return True
            time.sleep(0.002)
        return False

    def at_step(self, step: int) -> bool:
        """Waits until a step is logged."""
        return self.wait_for(lambda: any(line.startswith(f"step {step}/") for line in self._lines))

    def in_save(self) -> bool:
        """Waits until a save is under way."""
        return self.wait_for(lambda: any((self.workdir / "checkpoints").glob(UNFINISHED)))

    def says(self, words: str) -> bool:
        """Waits until this is printed."""
        return self.wait_for(lambda: words in self.output)

    def children(self) -> list[int]:
        """The processes, by number."""
        listed = subprocess.run(["pgrep", "-P", str(self.launcher.pid)], capture_output=True, text=True).stdout.split()
        return sorted(map(int, listed))

    def signal(self, how: signal.Signals, number: int | None = None) -> None:
        """Sends it to one process, or to both, where both are there."""
        children = self.children()
        if len(children) == 2:
            for child in children if number is None else [children[number]]:
                os.kill(child, how)

    def finish(self) -> int | None:
        """The exit code; None where the run did not end in time."""
        self.wait_for(lambda: False)
        if self.launcher.poll() is None:
            os.killpg(self.launcher.pid, signal.SIGKILL)
        self.read()
        return self.launcher.returncode
