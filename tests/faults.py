"""Faults of a cluster, drawn from a seed, on a run of two processes: after each the run ends as if nothing had been.

python -m tests.faults --count 100 --seed 0

Each fault strikes a run of launch/local.py, which starts it again. The run must end with the losses, the tokens and the
last state of the clean run, bit for bit, or stop with the error that is stated for it; it never hangs, never differs
without a word, and never leaves a folder that the next start cannot use.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests import processes
from tests.train import tiny_run
from tests.train.kill_campaign import UNFINISHED, last_hashes, records

FLAGS = ("mesh.data=2", "train.hang_timeout=12")
LIMIT = 240  # seconds for a run with its restarts
FIRST_STEP, LAST_STEP = 1, 20  # between which a fault strikes, of 24


class Struck(NamedTuple):
    """A fault, and how the run took it."""

    fault: str
    moment: str
    verdict: str  # "as the clean run", "stopped as stated", or what is wrong
    seconds: float


class Running:
    """A run under way: its output is read line by line."""

    def __init__(self, workdir: Path, config: Path, draw: random.Random, *flags: str, restarts: int = 3, **more: str):
        self.workdir, self.draw, self.lines = workdir, draw, []
        flags = (*FLAGS, *flags)
        self.launcher = processes.start(workdir, config, *flags, devices=1, restarts=restarts, grace=20, **more)
        os.set_blocking(self.launcher.stdout.fileno(), False)

    def read(self) -> None:
        """Takes what was printed since."""
        while line := self.launcher.stdout.readline():
            self.lines.append(line)

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
        return self.wait_for(lambda: any(line.startswith(f"step {step}/") for line in self.lines))

    def in_save(self) -> bool:
        """Waits until a save is under way."""
        return self.wait_for(lambda: any((self.workdir / "checkpoints").glob(UNFINISHED)))

    def children(self) -> list[int]:
        """The processes, by number."""
        listed = subprocess.run(["pgrep", "-P", str(self.launcher.pid)], capture_output=True, text=True).stdout.split()
        return sorted(map(int, listed))

    def finish(self) -> int | None:
        """The exit code; None where the run did not end in time."""
        self.wait_for(lambda: False)
        self.read()
        if self.launcher.poll() is None:
            os.killpg(self.launcher.pid, signal.SIGKILL)
            return None
        return self.launcher.returncode

    @property
    def output(self) -> str:
        return "".join(self.lines)


def strike(number: int, how: signal.Signals) -> Callable[[Running], str]:
    """Sends a signal to one process, at a random moment."""

    def fault(run: Running) -> str:
        moment = run.draw.choice(["in a step", "in a save", "in an evaluation", "while starting"])
        step = run.draw.randint(FIRST_STEP, LAST_STEP)
        if moment == "while starting":
            run.wait_for(lambda: len(run.children()) == 2)
            time.sleep(run.draw.uniform(0, 8))
        else:
            run.at_step(step if moment != "in an evaluation" else run.draw.choice([7, 15]))
            if moment == "in a save":
                run.in_save()
            time.sleep(run.draw.uniform(0, 0.05))
        children = run.children()
        if len(children) == 2:
            os.kill(children[number], how)
        return f"{moment}, from step {step}"

    return fault


def spoil(how: str) -> Callable[[Running], str]:
    """Kills the run, and changes a byte of the newest checkpoint or removes one of its files."""

    def fault(run: Running) -> str:
        step = run.draw.randint(9, LAST_STEP)
        run.at_step(step)
        folder = run.workdir / "checkpoints"
        newest = max((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), default=None)
        files = sorted(p for p in (folder / str(newest)).rglob("*") if p.is_file())
        file = run.draw.choice([p for p in files if p.stat().st_size])
        for child in run.children():
            os.kill(child, signal.SIGSTOP)
        if how == "byte":
            content = bytearray(file.read_bytes())
            content[run.draw.randrange(len(content))] ^= 1 << run.draw.randrange(8)
            file.write_bytes(content)
        else:
            file.unlink()
        for child in run.children():
            os.kill(child, signal.SIGKILL)
        return f"step {step}, {file.relative_to(folder)}"

    return fault


FAULTS: dict[str, Callable[[Running], str]] = {
    "SIGKILL of process 0": strike(0, signal.SIGKILL),
    "SIGKILL of process 1": strike(1, signal.SIGKILL),
    "SIGTERM of process 0": strike(0, signal.SIGTERM),
    "SIGUSR1 of process 1": strike(1, signal.SIGUSR1),
    "SIGSTOP of process 0": strike(0, signal.SIGSTOP),
    "SIGSTOP of process 1": strike(1, signal.SIGSTOP),
    "a byte of the newest checkpoint": spoil("byte"),
    "a file of the newest checkpoint": spoil("file"),
}


def run_fault(name: str, folder: Path, config: Path, draw: random.Random, clean: Path) -> Struck:
    """One fault, on a run of its own."""
    begun, workdir = time.monotonic(), folder / "struck"
    shutil.rmtree(workdir, ignore_errors=True)
    run = Running(workdir, config, draw)
    moment = FAULTS[name](run)
    code = run.finish()
    while code == 75:  # preempted after a good save: a scheduler starts it again
        run = Running(workdir, config, draw)
        code = run.finish()
    return Struck(name, moment, _verdict(code, run, workdir, clean), time.monotonic() - begun)


def _verdict(code: int | None, run: Running, workdir: Path, clean: Path) -> str:
    if code is None:
        return f"HANGS: {run.output[-600:]}"
    if code != 0:
        return f"ENDS WITH {code}: {run.output[-600:]}"
    if records(workdir) != records(clean):
        return "OTHER METRICS"
    return "as the clean run" if last_hashes(workdir) == last_hashes(clean) else "ANOTHER STATE"


def prepare(folder: Path) -> tuple[Path, Path]:
    """(the config, the workdir of the clean run)."""
    tiny_run.write_text(folder / "text.txt")
    config = processes.write_config(folder, folder / "text.txt")
    processes.train(folder / "clean", config, *FLAGS, devices=1)
    return config, folder / "clean"


def campaign(count: int, seed: int, folder: Path, names: list[str] | None = None) -> list[Struck]:
    """So many faults, in turn of every kind."""
    config, clean = prepare(folder)
    names, struck = names or list(FAULTS), []
    for number in range(count):
        name = names[number % len(names)]
        struck.append(run_fault(name, folder, config, random.Random(f"{seed}/{number}"), clean))
        print(
            f"{number + 1:4}  {struck[-1].seconds:5.0f} s  {name:32} {struck[-1].moment:44} {struck[-1].verdict}",
            flush=True,
        )
    return struck


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        struck = campaign(options.count, options.seed, Path(folder))
    table = Counter((s.fault, s.verdict.partition(":")[0]) for s in struck)
    for (fault, verdict), number in sorted(table.items()):
        print(f"{fault:36} {verdict:24} {number}")
    print(json.dumps({"faults": len(struck), "as_the_clean_run": sum(s.verdict == "as the clean run" for s in struck)}))
    return 0 if all(s.verdict == "as the clean run" for s in struck) else 1


if __name__ == "__main__":
    sys.exit(main())
