"""WORKDIR/skips.json: from which checkpoints a run went on with later data, and with which.

A run that rolled back leaves out the data that led to a spike. Should it be interrupted before its next checkpoint, it
must leave out the same.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import jax

from jaxllm.remote.copy import push

MAX_ROLLBACKS = 3  # to one checkpoint


class Skips:
    """The data that a run leaves out. All processes read it, the first writes it."""

    def __init__(self, workdir: Path):
        self._path = workdir / "skips.json"
        self._skips: list[dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else []

    def after(self, step: int, loader: dict[str, Any] | None) -> dict[str, Any] | None:
        """Where the source of the batches goes on after the checkpoint of `step`, which holds `loader`."""
        return next((skip["data"] for skip in reversed(self._skips) if skip["step"] == step), loader)

    def count(self, step: int) -> int:
        """How often the run rolled back to this checkpoint."""
        return sum(skip["step"] == step for skip in self._skips)

    def add(self, step: int, data: dict[str, Any]) -> None:
        """After the checkpoint of `step` goes on with `data`, the state of a source of batches."""
        self._skips.append({"step": step, "data": data})
        if jax.process_index() == 0:
            new = self._path.with_suffix(".json.new")
            with new.open("w", encoding="utf-8") as file:
                json.dump(self._skips, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
            with contextlib.suppress(OSError):  # then it is brought a minute later
                push(self._path.parent)
