"""Faults of a cluster, drawn from a seed, on a run of two processes: after each the run ends as if nothing had been.

python -m tests.faults --count 100 --seed 0

Each fault strikes a run of launch/local.py, which starts it again. The run must end with the losses, the tokens and the
last state of the clean run, bit for bit, or stop with the error that is stated for it and then, where what was wrong is
mended, go on to that end; it never hangs, never differs without a word, and never leaves a folder that the next start
cannot use.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests import processes
from tests.fault_kinds import FAULTS, Fault
from tests.faulty_run import Running
from tests.train import tiny_run
from tests.train.kill_campaign import last_hashes, records

FLAGS = ("mesh.data=2", "train.hang_timeout=12")
PREEMPTED, MISTAKE = 75, 2


class Struck(NamedTuple):
    """A fault, and how the run took it."""

    fault: str
    moment: str
    verdict: str  # one of GOOD, or what is wrong
    seconds: float


AS_CLEAN, AFTER_STOP = "as the clean run", "stopped as stated, then as the clean run"
GOOD = (AS_CLEAN, AFTER_STOP)


class Campaign:
    """Runs of one config in a folder, and what they should have come to."""

    def __init__(self, folder: Path):
        self.folder = folder
        tiny_run.write_text(folder / "text.txt")
        self.config = processes.write_config(folder, folder / "text.txt")
        self._clean: dict[str, Path] = {}

    def clean(self, name: str = "clean", *flags: str, **environment: str) -> Path:
        """The folder of a run that nothing struck; made once under each name."""
        if name not in self._clean:
            self._clean[name] = self.folder / name
            how = {"devices": 1, "entry": "tests.poisoned"} | environment
            processes.train(self.folder / name, self.config, *FLAGS, *flags, **how)
        return self._clean[name]

    def strike(self, name: str, draw: random.Random) -> Struck:
        """One fault, on a run of its own."""
        begun, fault = time.monotonic(), FAULTS[name](self, draw)
        shutil.rmtree(fault.workdir, ignore_errors=True)
        try:
            run = self._start(fault)
            moment = fault.strike(run)
            verdict = self._verdict(fault, run)
        finally:
            fault.close()
        return Struck(name, moment, verdict, time.monotonic() - begun)

    def _start(self, fault: Fault) -> Running:
        flags = (*FLAGS, *fault.flags)
        how = {"devices": 1, "restarts": 3, "grace": 20, "entry": "tests.poisoned"} | fault.environment
        return Running(fault.workdir, processes.start(fault.workdir, self.config, *flags, **how))

    def _verdict(self, fault: Fault, run: Running) -> str:
        code, good = run.finish(), AS_CLEAN
        while code == PREEMPTED or (code == MISTAKE and good == AS_CLEAN and fault.states(run.output)):
            if code == MISTAKE:
                good = AFTER_STOP
                fault.mend()
            run = self._start(fault)  # as a scheduler, or the user who read the message
            code = run.finish()
        if code is None:
            return f"HANGS: {run.output[-1500:]}"
        if code != 0:
            return f"ENDS WITH {code}: {run.output[-1500:]}"
        clean = fault.reference()
        if records(fault.workdir) != records(clean):
            return "OTHER METRICS"
        return good if last_hashes(fault.workdir) == last_hashes(clean) else "ANOTHER STATE"


def campaign(count: int, seed: int, folder: Path, names: list[str] | None = None) -> list[Struck]:
    """So many faults, in turn of every kind."""
    runs, struck = Campaign(folder), []
    names = names or list(FAULTS)
    for number in range(count):
        name = names[number % len(names)]
        struck.append(runs.strike(name, random.Random(f"{seed}/{number}")))
        print(
            f"{number + 1:4}  {struck[-1].seconds:5.0f} s  {name:36} {struck[-1].moment:52} {struck[-1].verdict}",
            flush=True,
        )
    return struck


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    options = parser.parse_args()
    names = [name for name in FAULTS if options.only in name]
    with tempfile.TemporaryDirectory() as folder:
        struck = campaign(options.count, options.seed, Path(folder), names)
    table = Counter((s.fault, s.verdict.partition(":")[0]) for s in struck)
    for (fault, verdict), number in sorted(table.items()):
        print(f"{fault:36} {verdict:42} {number}")
    good = sum(s.verdict in GOOD for s in struck)
    print(json.dumps({"faults": len(struck), "good": good}))
    return 0 if good == len(struck) else 1


if __name__ == "__main__":
    sys.exit(main())
