"""What a run reports: WORKDIR/metrics.jsonl, WORKDIR/tensorboard/ and a progress bar (or plain lines) on stderr."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jaxllm.remote.place import with_addresses
from jaxllm.train.watch.sinks import JsonLines, Sink, TensorBoard, WeightsAndBiases

# What is not the same in every repetition of a run.
TIMES = ("tokens_per_second", "mfu", "seconds_per_step", "time", "data_wait", "host_seconds", "slowest_process")


class MetricsWriter:
    """One JSON object a line and a logged step, and the same scalars for TensorBoard. Only one process makes one.

    Args:
      workdir: the run's folder.
      restored_step: the step a resumed run goes on from. Later lines, and one cut short, are removed, so that the file
        reads like that of a run never interrupted.
      wandb_project: also to Weights & Biases; "": not.
    """

    def __init__(self, workdir: Path, restored_step: int = 0, wandb_project: str = ""):
        path = workdir / "metrics.jsonl"
        _truncate_after(path, restored_step)
        self._sinks: list[Sink] = [JsonLines(path), TensorBoard(workdir / "tensorboard", restored_step)]
        if wandb_project:
            self._sinks.append(WeightsAndBiases(wandb_project, workdir))

    def write(self, record: Mapping[str, float | int | str | None]) -> None:
        """Appends a record, which holds its `step`. Numbers that are not finite become null."""
        plain = {name: _finite(value) for name, value in record.items() if value is not None}
        for sink in self._sinks:
            sink.write(plain)

    def sync(self) -> None:
        """Puts the lines on disk. A checkpoint must not be there before the lines up to its step.

        Raises:
          OSError: they could not be written.
        """
        for sink in self._sinks:
            sink.sync()

    def close(self) -> None:
        """Closes the files."""
        for sink in self._sinks:
            sink.close()


def read_metrics(path: Path) -> list[dict[str, float | int | str | None]]:
    """The records of a metrics.jsonl; a last line cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def _truncate_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        new = path.with_suffix(".jsonl.new")
        new.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        new.replace(path)


def _finite(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Stopwatch:
    """Seconds and steps of training since the last lap; evaluations, saves and the first compilation are left out."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._steps = 0

    def step_done(self) -> None:
        """Counts a finished step. The first after a pause only starts the clock."""
        if self._start is None:
            self._start, self._steps = time.perf_counter(), 0
        else:
            self._steps += 1

    def lap(self) -> float | None:
        """Seconds a step since the last lap or pause, or None where no whole step was timed."""
        if self._start is None or not self._steps:
            return None
        now = time.perf_counter()
        seconds = (now - self._start) / self._steps
        self._start, self._steps = now, 0
        return seconds

    def pause(self) -> None:
        """Stops the clock until the next finished step."""
        self._start = None


class ProgressReport:
    """A rich progress bar where `stream` is a terminal, a plain line a logged step where it is not."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False):
        self._console = Console(file=stream or sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._total = 0
        self._bar: Progress | None = None

    def start(self, total_steps: int, step: int = 0) -> None:
        """Shows the bar, at a step."""
        self._total = total_steps
        if self._console.is_terminal and not self._console.quiet:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("train", total=total_steps, completed=step, text="compiling")
            self._bar.start()

    def say(self, text: str) -> None:
        """Prints a text, above the bar where there is one."""
        self._console.print(with_addresses(text), markup=False)

    def step(self, step: int) -> None:
        """Moves the bar."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def logged(self, record: Mapping[str, float | int | str | None], seconds_a_step: float | None) -> None:
        """Shows loss, tokens a second, MFU and the time left."""
        left = None if seconds_a_step is None else seconds_a_step * (self._total - int(record["step"]))
        text = describe(record, left)
        if self._bar:
            self._bar.update(self._task, completed=int(record["step"]), text=text)
        else:
            self.say(f"step {record['step']}/{self._total}  {text}")

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar:
            self._bar.stop()


def describe(record: Mapping[str, float | int | str | None], seconds_left: float | None) -> str:
    """One line of a record: "loss 3.2100  12,345 tokens/s  MFU 41.2 %  3 min left"."""
    parts = []
    for name, shown in (
        ("loss", "loss {:.4f}"),
        ("eval_loss", "eval loss {:.4f}"),
        ("eval_bits_per_char", "{:.3f} bits/char"),
        ("reward", "reward {:.3f}"),
        ("kl", "KL {:.2f}"),
        ("response_length", "{:.0f} tokens an answer"),
        ("eval_reward", "eval reward {:.3f}"),
        ("accuracy", "accuracy {:.3f}"),
        ("reward_accuracy", "accuracy {:.3f}"),
    ):
        if isinstance(record.get(name), float):
            parts.append(shown.format(record[name]))
    if record.get("tokens_per_second"):
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record.get("mfu"):
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    if record.get("nonfinite"):
        parts.append(f"{record['nonfinite']} steps skipped")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """A time as people say it: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
