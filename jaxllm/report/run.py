"""Reads a run's folder: its config, what it logged, what happened to it, and the state it is in."""

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.errors import UserError
from jaxllm.written import lasted

Record = dict[str, Any]

BEGINNINGS = ("started", "resumed")
PREPARATIONS = ("planned", "compiled")  # written before a beginning
ENDINGS = ("done", "preempted", "stopped", "crashed", "hung")
ORDINARY = (*BEGINNINGS, *PREPARATIONS, "measured", "saved", "done")  # all others are faults
SILENT_SECONDS = 600.0
SILENT_STEPS = 20
MOST_SAMPLES = 100  # that are read; a run may have written one file a step


class Event(NamedTuple):
    """A line of events.jsonl."""

    time: float | None  # unix seconds
    step: int | None
    name: str
    message: str
    figures: Mapping[str, Any]  # what else the line holds

    @property
    def is_fault(self) -> bool:
        return self.name not in ORDINARY


class Sample(NamedTuple):
    """A line of samples/STEP.jsonl: what the model of an alignment run answered."""

    step: int  # the first that learned from it
    prompt: str
    text: str
    reward: float | None


class Run(NamedTuple):
    """Everything that a page or a table shows of a run."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    metrics: Sequence[Record]  # each with a whole `step`
    events: Sequence[Event]
    samples: Sequence[Sample]  # those of the newest rollouts, the newest first
    active: float | None  # unix seconds of the last sign of life
    state: str  # done | preempted | stopped | crashed | hung | running | silent | untrained
    why: str  # the state in a sentence; "": its name says it

    @property
    def step(self) -> int:
        """The last one that is known of."""
        return self.metrics[-1]["step"] if self.metrics else max((event.step or 0 for event in self.events), default=0)

    @property
    def steps(self) -> int | None:
        """Those that the run is to take."""
        return _steps(self.config)

    @property
    def restarts(self) -> int:
        return max(0, sum(event.name in BEGINNINGS for event in self.events) - 1)

    def last(self, metric: str) -> float | None:
        """The newest value; not a number where the newest was not finite, None where there is none."""
        for record in reversed(self.metrics):
            if metric in record:
                return record[metric] if is_number(record[metric]) else math.nan
        return None

    def last_event(self, *names: str) -> Event | None:
        """The newest event of one of these names."""
        return next((event for event in reversed(self.events) if event.name in names), None)


def is_number(value: Any) -> bool:
    """Whether it is one that can be drawn: finite, and no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def read_run(folder: Path, now: float | None = None) -> Run:
    """The run in `folder`, as it stands at `now` (unix seconds; default: the clock's).

    Raises:
      UserError: no config.json of a run is there.
    """
    config = _read_config(folder)
    metrics = [record for record in json_lines(folder / "metrics.jsonl") if _is_step(record.get("step"))]
    events = [_event(line) for line in json_lines(folder / "events.jsonl") if isinstance(line.get("event"), str)]
    samples = list(itertools.islice(_samples(folder / "samples"), MOST_SAMPLES))
    active = _last_sign(folder, metrics, events)
    state, why = _state(config, metrics, events, active, time.time() if now is None else now)
    return Run(folder, _name(folder), config, metrics, events, samples, active, state, why)


def json_lines(file: Path) -> Iterator[Record]:
    """The objects of a file with one a line; lines that are something else, or cut short, are passed over."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _samples(folder: Path) -> Iterator[Sample]:
    """Of the newest step first."""
    by_step = {int(file.stem): file for file in folder.glob("*.jsonl") if file.stem.isdecimal()}
    for step in sorted(by_step, reverse=True):
        for line in json_lines(by_step[step]):
            reward = line.get("reward") if is_number(line.get("reward")) else None
            yield Sample(step, str(line.get("prompt", "")), str(line.get("answer", "")), reward)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: no run is there: no config.json in it. It is what jaxllm train --workdir wrote."
        ) from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is broken: it is not JSON.") from None
    if not isinstance(config, dict) or not all(isinstance(config.get(group), dict) for group in ("model", "train")):
        raise UserError(f"{file} is not that of a run: it has no groups model and train.")
    return config


def _name(folder: Path) -> str:
    """The folder's; of an adapter its base's too."""
    parts = folder.absolute().parts
    return "/".join(parts[-3:] if parts[-2:-1] == ("adapters",) else parts[-1:])


def _event(line: Record) -> Event:
    figures = {name: value for name, value in line.items() if name not in ("time", "step", "event", "message")}
    step = line["step"] if _is_step(line.get("step")) else None
    return Event(_moment(line), step, line["event"], str(line.get("message", "")), figures)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _moment(line: Mapping[str, Any]) -> float | None:
    """When a line was written; None where it does not say so, or nonsense."""
    moment = line.get("time")
    return float(moment) if is_number(moment) and 0 < moment < 1e11 else None


def moments(metrics: Sequence[Record], events: Sequence[Event]) -> list[float]:
    """The times of all lines that have one, in order."""
    found = [_moment(record) for record in metrics] + [event.time for event in events]
    return sorted(moment for moment in found if moment is not None)


def _steps(config: Mapping[str, Any]) -> int | None:
    steps = config["train"].get("steps")
    return steps if _is_step(steps) else None


def _last_sign(folder: Path, metrics: Sequence[Record], events: Sequence[Event]) -> float | None:
    """The newest line's time; where no line has one, when the files were last written."""
    written = moments(metrics, events)
    if written:
        return written[-1]
    files = [folder / name for name in ("metrics.jsonl", "events.jsonl", "config.json")]
    return max((file.stat().st_mtime for file in files if file.exists()), default=None)


def _state(
    config: Mapping[str, Any], metrics: Sequence[Record], events: Sequence[Event], active: float | None, now: float
) -> tuple[str, str]:
    """The state, and why it is that one."""
    ending = _ending(metrics, events)
    if ending:
        process = ending.figures.get("process")
        return ending.name, ending.message if process is None else f"process {process}: {ending.message}"
    steps = _steps(config)
    if not events and metrics and steps and metrics[-1]["step"] >= steps:
        return "done", ""
    silent = now - active if active is not None else 0.0
    if silent < _patience(config, metrics):
        return "running", ""
    if not metrics and not events:
        return "untrained", "it has logged nothing"
    return "silent", f"killed, or hangs: nothing written for {lasted(silent)}"


def _ending(metrics: Sequence[Record], events: Sequence[Event]) -> Event | None:
    """The event with which the run ended; None where it went on after that.

    Of those of several processes the first: one fails for a reason of its own, and the others for want of it.
    """
    known = [event for event in events if event.name in (*ENDINGS, *BEGINNINGS, *PREPARATIONS)]
    logged = _moment(metrics[-1]) if metrics else None
    found: dict[int | None, Event] = {}  # by process
    for event in itertools.takewhile(lambda event: event.name in ENDINGS, reversed(known)):
        process = event.figures.get("process")
        goes_on = logged is not None and event.time is not None and logged > event.time + 1
        if goes_on or (found and (process is None or None in found or process in found)):
            break
        found[process] = event
    return list(found.values())[-1] if found else None


def _patience(config: Mapping[str, Any], metrics: Sequence[Record]) -> float:
    """Seconds of silence in which a run may still be at work: a line is not due before log_every steps."""
    log_every = config["train"].get("log_every")
    steps = max(SILENT_STEPS, 2 * log_every) if _is_step(log_every) else SILENT_STEPS
    seconds = next((r["seconds_per_step"] for r in reversed(metrics) if is_number(r.get("seconds_per_step"))), 0.0)
    return max(SILENT_SECONDS, steps * seconds)
