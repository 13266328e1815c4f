"""What checkpoints cost a run: the time that a save stops its steps for, the bytes that a restore reads, memory.

    python -m tests.benchmarks.checkpoint             # 100 million parameters; 4 virtual devices; 10 minutes on 2 cores
    python -m tests.benchmarks.checkpoint --layers 2  # 14 million: two minutes

Each figure is from a process of its own. Bytes are those that the process asked the system for (rchar of /proc/self/io,
which also counts what the page cache had) in its second restore: in the first it also reads Python's modules.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.train import tiny_run

EMBED, HEADS, LENGTH, BATCH = 768, 12, 64, 8
SAVED = {"mesh.data": 4, "layout.zero_stage": 3}
RESTORED = {  # onto other meshes than that of the save
    "the same": SAVED,
    "data=2, model=2": {"mesh.data": 2, "mesh.model": 2},
    "model=4": {"mesh.data": 1, "mesh.model": 4},
    "data=4, ZeRO 0": {"mesh.data": 4, "layout.zero_stage": 0},
    "pipeline=2, data=2": {"mesh.pipeline": 2, "mesh.data": 2, "layout.num_microbatches": 2},
}
GIGABYTE = 1e9


def config_of(folder: Path, layers: int, **changes: object):
    """Saves only at the end, unless told."""
    fields = {"model.num_layers": layers, "model.embed_dim": EMBED, "model.num_heads": HEADS, "model.dropout": 0.0}
    fields |= {"model.max_length": LENGTH, "data.batch_size": BATCH, "train.eval_every": 0, "train.checkpoint_every": 0}
    return tiny_run.tiny_config(folder / "text.txt", folder / "cache", **fields | changes)


def blocking(folder: Path, layers: int) -> dict:
    """Seconds that each save stops the steps for, and those of a step, also of the one that the save goes on beside."""
    from jaxllm.train import loop
    from jaxllm.train.checkpoint import saver
    from jaxllm.train.metrics import read_metrics

    stopped, save = [], saver.Saver.save

    def timed(self, step, start):
        stopped.append((step, save(self, step, start)))
        return stopped[-1][1]

    saver.Saver.save = timed
    changes = {"train.steps": 26, "train.checkpoint_every": 6} | SAVED
    loop.train(config_of(folder, layers, **changes), folder / "saved", quiet=True)
    records = read_metrics(folder / "saved" / "metrics.jsonl")
    seconds = {r["step"]: r["seconds_per_step"] for r in records if r.get("seconds_per_step")}
    saves = [step for step, _ in stopped]
    beside = [seconds[step + 2] for step in saves if step + 2 in seconds]
    alone = [seconds[step] for step in seconds if step > 2 and not {step, step - 1, step - 2} & set(saves)]
    return {
        "stopped": [round(s, 3) for _, s in stopped],
        "step": round(statistics.median(alone), 3),
        "beside": [round(s, 3) for s in beside],
    }


def restoring(folder: Path, layers: int, layout: str) -> dict:
    """Bytes read, over those of the arrays on disk."""
    from jaxllm.train.checkpoint.checkpoints import Checkpoints

    abstract = _abstract(folder, layers, RESTORED[layout])
    checkpoints = Checkpoints(folder / "saved" / "checkpoints", say=lambda line: None)
    checkpoints.restore(abstract)
    before, begun = _bytes_read(), time.perf_counter()
    restored = checkpoints.restore(abstract)
    read, seconds = _bytes_read() - before, time.perf_counter() - begun
    newest = folder / "saved" / "checkpoints" / str(restored.step)
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return {"read": read, "size": size, "seconds": round(seconds, 2)}


def memory(folder: Path, layers: int, saves: int) -> dict:
    """The resident set after each save."""
    from jaxllm.train import loop
    from jaxllm.train.checkpoint import saver

    resident, save = [], saver.Saver.save

    def measured(self, step, start):
        self.settle(step)  # the save before is on disk
        resident.append(_resident())
        return save(self, step, start)

    saver.Saver.save = measured
    changes = {"train.steps": saves + 1, "train.checkpoint_every": 1} | SAVED
    loop.train(config_of(folder, layers, **changes), folder / "many", quiet=True)
    return {"after_saves": {n: resident[n] for n in (1, 5, 10, 20, 30, 40, saves) if n < len(resident)}}


def _abstract(folder: Path, layers: int, changes: dict):
    import contextlib

    from jaxllm.train.metrics import ProgressReport
    from jaxllm.train.prepare import prepare
    from jaxllm.train.source import DatasetSource
    from jaxllm.train.watch.events import Events

    report = ProgressReport(quiet=True)
    how = {"devices": None, "quiet": True, "open_source": DatasetSource, "expects": None, "report": report}
    with contextlib.ExitStack() as stack:
        how["events"] = Events(folder / "other", report.say)
        return prepare(config_of(folder, layers, **changes), folder / "other", stack, **how).abstract


def _bytes_read() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_process(what: str, folder: Path, layers: int, *more: str) -> dict:
    """Runs one of these in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.checkpoint", f"--layers={layers}", "--only", what, str(folder)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([*command, *more], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(layers: int, saves: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_run.write_text(folder / "text.txt")
        found = in_process("blocking", folder, layers)
        print(f"{layers} layers of {EMBED}: a step takes {found['step']:.2f} s", flush=True)
        print(f"  a save stops the steps for {found['stopped']} s, the first with what it compiles", flush=True)
        print(f"  the steps beside the writing take {found['beside']} s", flush=True)
        for layout in RESTORED:
            found = in_process("restoring", folder, layers, layout)
            times = found["read"] / found["size"]
            size = found["size"] / GIGABYTE
            print(f"  restored to {layout:24}: {times:.3f} x {size:.3f} GB read, {found['seconds']} s", flush=True)
        found = in_process("memory", folder, max(layers // 7, 1), str(saves))
        print("  resident GB after n saves:", {n: round(b / GIGABYTE, 3) for n, b in found["after_saves"].items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--saves", type=int, default=50)
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.only:
        report(options.layers, options.saves)
        return 0
    what, folder, *more = options.only
    if what == "memory":
        print(json.dumps(memory(Path(folder), options.layers, int(more[0]))))
    else:
        print(json.dumps(globals()[what](Path(folder), options.layers, *more)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
