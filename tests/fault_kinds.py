"""What befalls a run of two processes: each kind of fault, and what is wanted of the run after it."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tests.faulty_run import Running
from tests.poisoned import LOADING
from tests.train.kill_campaign import records

FIRST_STEP, LAST_STEP = 1, 20  # between which a fault strikes, of 24
ROWS = 16  # of a batch
EVERY = 4  # steps between checkpoints
EVALUATED = (7, 15)  # steps before an evaluation


class Runs(Protocol):
    """What a fault asks of its campaign."""

    folder: Path

    def clean(self, name: str = "clean", *flags: str, **environment: str) -> Path:
        """The folder of a run that nothing struck."""


class Fault:
    """A fault of one run. `strike` does it and says when."""

    flags: tuple[str, ...] = ()
    stated = ""  # in the message that the run may stop with

    def __init__(self, runs: Runs, draw: random.Random):
        self.runs, self.draw, self.workdir = runs, draw, runs.folder / "struck"
        self.environment: dict[str, str] = {}

    def strike(self, run: Running) -> str:
        raise NotImplementedError

    def states(self, output: str) -> bool:
        """Whether the run said what it stopped for."""
        return bool(self.stated) and self.stated in output

    def mend(self) -> None:
        """What a user does who has read the message."""

    def reference(self) -> Path:
        """The run that this one should have come out as."""
        return self.runs.clean()

    def close(self) -> None:
        """Takes away what was made for it."""


class Signalled(Fault):
    """A signal to one process at a random moment."""

    def __init__(self, runs: Runs, draw: random.Random, number: int, how: signal.Signals):
        super().__init__(runs, draw)
        self._number, self._how = number, how
        moments = ("in a step", "in a save", "in an evaluation", "while loading data", "while starting")
        self._moment, self._step = draw.choice(moments), draw.randint(FIRST_STEP, LAST_STEP)
        if self._moment == "in an evaluation":
            self._step = draw.choice(EVALUATED)
        if self._moment == "while loading data":
            self.environment = {"POISONED_SLOW": str(self._step * ROWS)}

    def strike(self, run: Running) -> str:
        if self._moment == "while starting":
            run.wait_for(lambda: len(run.children()) == 2)
            time.sleep(self.draw.uniform(0, 8))
        elif self._moment == "while loading data":
            run.wait_for((self.workdir / LOADING).exists)
        else:
            run.at_step(self._step)
            if self._moment == "in a save":
                run.in_save()
        time.sleep(self.draw.uniform(0, 0.05))
        run.signal(self._how, self._number)
        return self._moment if self._moment == "while starting" else f"{self._moment}, from step {self._step}"


class CheckpointSpoiled(Fault):
    """The run dies, and a byte of its newest checkpoint changes or one of its files goes."""

    def __init__(self, runs: Runs, draw: random.Random, how: str):
        super().__init__(runs, draw)
        self._how = how

    def strike(self, run: Running) -> str:
        step = self.draw.randint(2 * EVERY + 1, LAST_STEP)
        run.at_step(step)
        folder = self.workdir / "checkpoints"
        run.wait_for(lambda: len(_committed(folder)) > 1)  # one that is damaged and alone stops a run
        run.signal(signal.SIGSTOP)
        newest = max(_committed(folder))
        files = sorted(p for p in (folder / str(newest)).rglob("*") if p.is_file() and p.stat().st_size)
        file = self.draw.choice(files)
        spoil(file, self._how, self.draw)
        run.signal(signal.SIGKILL)
        return f"step {step}, {file.relative_to(folder)}"


class DataSpoiled(Fault):
    """A file of the token cache is changed or goes; then, most times, a process dies."""

    stated = "token cache"

    def __init__(self, runs: Runs, draw: random.Random, how: str):
        super().__init__(runs, draw)
        self._how, self._cache = how, runs.folder / "struck_cache"
        runs.clean()  # fills the cache
        shutil.rmtree(self._cache, ignore_errors=True)
        shutil.copytree(runs.folder / "cache", self._cache)
        self.flags = (f"data.cache={self._cache}",)

    def strike(self, run: Running) -> str:
        step = self.draw.randint(FIRST_STEP, LAST_STEP)
        run.at_step(step)
        files = sorted(p for p in self._cache.rglob("*") if p.is_file() and p.stat().st_size)
        file = self.draw.choice(files)
        spoil(file, self._how, self.draw)
        killed = self.draw.random() < 0.75
        if killed:
            run.signal(signal.SIGKILL, self.draw.randrange(2))
        return f"step {step}, {'/'.join(file.parts[-2:])}{', and a kill' if killed else ''}"

    def mend(self) -> None:
        shutil.rmtree(self._cache)


class DiskFull(Fault):
    """The disk of the run fills up: for a while, or until the user frees it."""

    stated = "ree space"
    SIZE = 48  # MB

    def __init__(self, runs: Runs, draw: random.Random):
        super().__init__(runs, draw)
        self._disk = runs.folder / "disk"
        self._disk.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.SIZE}m", "tmpfs", self._disk], check=True)
        self.workdir, self._ballast = self._disk / "run", self._disk / "ballast"

    def strike(self, run: Running) -> str:
        step, forever = self.draw.randint(FIRST_STEP, LAST_STEP), self.draw.random() < 0.5
        run.at_step(step)
        with self._ballast.open("wb", buffering=0) as ballast:
            while _written(ballast, bytes(self.draw.choice([1, 1 << 12, 1 << 16]))):
                pass
        if forever:
            return f"from step {step}, for good"
        run.says("could not be written")
        time.sleep(self.draw.uniform(0, 2))
        self.mend()
        return f"from step {step}, for a while"

    def mend(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", self._disk], check=True)


class BatchPoisoned(Fault):
    """A batch whose loss is not a number; the process may die besides."""

    def __init__(self, runs: Runs, draw: random.Random, policy: str):
        super().__init__(runs, draw)
        self._policy, self._step = policy, draw.choice([6, 11, 16, 19])
        self._row = (self._step - 1) * ROWS
        self.flags = (f"train.spike={policy}", "train.max_nonfinite=0") if policy == "rollback" else ()
        self.environment = {"POISONED_NAN": str(self._row)}

    def strike(self, run: Running) -> str:
        if self.draw.random() < 0.5:
            return f"of step {self._step}"
        step = self.draw.randint(self._step - 2, self._step + 2)
        run.at_step(step)
        run.signal(signal.SIGKILL, self.draw.randrange(2))
        return f"of step {self._step}, and a kill at step {step}"

    def reference(self) -> Path:
        if self._policy == "log":  # the step goes without an update
            assert records(self.workdir)[-1]["nonfinite"] == 1
            return self.runs.clean(f"poisoned_{self._row}", **self.environment)
        (skip,) = json.loads((self.workdir / "skips.json").read_text())
        first, after = skip["step"] * ROWS, skip["data"]["rows"]
        assert first <= self._row < after <= first + (EVERY + 2) * ROWS, skip
        return self.runs.clean(f"without_{first}_{after}", POISONED_LEFT_OUT=f"{first}-{after}")


def _committed(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def spoil(file: Path, how: str, draw: random.Random) -> None:
    """Changes a bit of a file, cuts it short or removes it."""
    if how == "removed":
        file.unlink()
    elif how == "cut short":
        os.truncate(file, draw.randrange(file.stat().st_size))
    else:
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)


def _written(file: Any, content: bytes) -> bool:
    try:
        return file.write(content) > 0
    except OSError:
        return False


def can_mount() -> bool:
    """Whether a small disk can be had."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


FAULTS: dict[str, Callable[[Runs, random.Random], Fault]] = {
    "SIGKILL of process 0": partial(Signalled, number=0, how=signal.SIGKILL),
    "SIGKILL of process 1": partial(Signalled, number=1, how=signal.SIGKILL),
    "SIGTERM of process 0": partial(Signalled, number=0, how=signal.SIGTERM),
    "SIGUSR1 of process 1": partial(Signalled, number=1, how=signal.SIGUSR1),
    "SIGSTOP of process 0": partial(Signalled, number=0, how=signal.SIGSTOP),
    "SIGSTOP of process 1": partial(Signalled, number=1, how=signal.SIGSTOP),
    "newest checkpoint: a bit changed": partial(CheckpointSpoiled, how="a bit changed"),
    "newest checkpoint: a file removed": partial(CheckpointSpoiled, how="removed"),
    "newest checkpoint: a file cut short": partial(CheckpointSpoiled, how="cut short"),
    "data: a bit changed": partial(DataSpoiled, how="a bit changed"),
    "data: a file removed": partial(DataSpoiled, how="removed"),
    "data: a file cut short": partial(DataSpoiled, how="cut short"),
    "a batch of NaN, skipped": partial(BatchPoisoned, policy="log"),
    "a batch of NaN, rolled back": partial(BatchPoisoned, policy="rollback"),
}
if can_mount():
    FAULTS["disk full"] = DiskFull
