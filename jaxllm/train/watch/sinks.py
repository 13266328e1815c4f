"""Where the metrics of a run go: WORKDIR/metrics.jsonl, WORKDIR/tensorboard/ and, if asked, Weights & Biases."""

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from jaxllm.errors import UserError
from jaxllm.remote.place import with_addresses

Value = float | int | str


class Sink(Protocol):
    """Takes records, each of which holds its `step`."""

    def write(self, record: Mapping[str, Value | None]) -> None:
        """Takes one. Never fails for the storage's sake."""

    def sync(self) -> None:
        """Puts what was written on disk."""

    def close(self) -> None:
        """Ends it."""


class JsonLines:
    """One JSON object a line. What a full disk does not take is kept, and written as soon as there is room."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting: list[bytes] = []

    def write(self, record: Mapping[str, Value | None]) -> None:
        self._waiting.append((json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode())
        with contextlib.suppress(OSError):
            self._flush()

    def sync(self) -> None:
        """Raises an OSError where something could not be written: then no checkpoint may follow."""
        self._flush()
        os.fsync(self._file)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._flush()
        os.close(self._file)

    def _flush(self) -> None:
        """Writes whole lines only: one that is cut short is taken back."""
        while self._waiting:
            size = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, self._waiting[0])
                if written < len(self._waiting[0]):
                    os.write(self._file, self._waiting[0][written:])  # says why not
            except OSError:
                os.ftruncate(self._file, size)
                raise
            self._waiting.pop(0)


class TensorBoard:
    """Scalars, in a folder that TensorBoard reads.

    Written at once: tensorboardX's own thread for it dies of a full disk, and the next record would wait for ever.
    """

    def __init__(self, folder: Path, restored_step: int):
        self._writer: EventsWriter | None = None
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(event_pb2.Event(session_log=start, step=restored_step + 1))

    def write(self, record: Mapping[str, Value | None]) -> None:
        numbers = {n: v for n, v in record.items() if n not in ("step", "time") and isinstance(v, (int, float))}
        with contextlib.suppress(OSError):
            for name, value in numbers.items() if self._writer else ():
                event = event_pb2.Event(summary=scalar(name, value), step=record["step"])
                event.wall_time = record.get("time", 0.0)
                self._writer.write_event(event)

    def sync(self) -> None:
        with contextlib.suppress(OSError):
            if self._writer:
                self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._writer:
                self._writer.close()


class WeightsAndBiases:
    """A run named like its folder, which goes on where it was."""

    def __init__(self, project: str, workdir: Path):
        """Raises a UserError where the package is not installed."""
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"config.train.wandb_project={project} needs the wandb package: pip install wandb, or set it to ''."
            ) from None
        identity = f"{workdir.name}-{zlib.crc32(with_addresses(str(workdir.absolute())).encode()):08x}"
        self._run: Any = wandb.init(project=project, name=workdir.name, id=identity, resume="allow", dir=str(workdir))

    def write(self, record: Mapping[str, Value | None]) -> None:
        self._run.log(dict(record), step=record["step"])

    def sync(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()
