"""Kills a training run with SIGKILL at random moments, also during saves, until it is done all the same.

python tests/train/kill_campaign.py --kills 100 --seed 0

The metrics must be bit-equal to those of a run that nobody killed, its token ids and its last parameters too.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import tiny_run

UNFINISHED = "*.orbax-checkpoint-tmp*"


@dataclass
class Campaign:
    """What happened."""

    kills: int = 0
    during_a_save: int = 0  # of them, so many left an unfinished checkpoint behind
    starts: int = 0
    output: str = ""  # stderr of the last process


def run_through(workdir: Path, text: Path, kills: int, draw: random.Random, *changes: str) -> Campaign:
    """Starts the run again and again, killing it `kills` times, until it is done."""
    done = Campaign()
    while True:
        child = tiny_run.start(workdir, text, *changes)
        done.starts += 1
        if done.kills < kills and _kill_somewhere(child, workdir, draw):
            done.kills += 1
            done.during_a_save += any((workdir / "checkpoints").glob(UNFINISHED))
            continue
        _, done.output = child.communicate()
        assert child.returncode == 0, done.output
        return done


def _kill_somewhere(child, workdir: Path, draw: random.Random) -> bool:
    """Kills after a random number of steps, or in the middle of a save; False where the run was done before."""
    steps, in_save = draw.randint(1, 16), draw.random() < 0.5
    pause = draw.uniform(0, 0.03)
    for line in child.stderr:
        steps -= line.startswith("step ")
        if steps <= 0:
            break
    while in_save and child.poll() is None and not any((workdir / "checkpoints").glob(UNFINISHED)):
        time.sleep(0.0005)
    time.sleep(pause)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return child.returncode == -signal.SIGKILL


def records(workdir: Path) -> list[dict]:
    """metrics.jsonl without the columns of time."""
    from jaxllm.train.metrics import TIMES, read_metrics

    return [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in read_metrics(workdir / "metrics.jsonl")
    ]


def last_hashes(workdir: Path) -> tuple[str, str]:
    """Those of parameters and of the rest of the state, in the newest checkpoint."""
    newest = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    run = json.loads((newest / "run" / "metadata").read_text())
    return run["parameter_hash"], run["state_hash"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills_a_run", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(tiny_run.ROOT))
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        tiny_run.write_text(text)
        straight = Path(folder) / "straight"
        run_through(straight, text, 0, random.Random(0))
        killed = during_a_save = number = 0
        while killed < options.kills:
            workdir = Path(folder) / f"killed_{number}"
            wanted = min(options.kills_a_run, options.kills - killed)
            campaign = run_through(workdir, text, wanted, random.Random(options.seed * 1000 + number))
            same = records(workdir) == records(straight) and last_hashes(workdir) == last_hashes(straight)
            killed, during_a_save, number = killed + campaign.kills, during_a_save + campaign.during_a_save, number + 1
            verdict = "bit-equal" if same else "DIFFERS"
            print(
                f"run {number}: {campaign.kills} kills, {campaign.during_a_save} during a save: {verdict}", flush=True
            )
            if not same:
                return 1
    print(f"{killed} kills, {during_a_save} during a save: all runs bit-equal to the one that was not killed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
