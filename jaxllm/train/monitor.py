"""Reads the metrics of finished steps, counts what went wrong, and writes what is to be logged."""

import functools
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.model.spec import ModelSpec
from jaxllm.train.flops import flops_per_token, peak_flops
from jaxllm.train.metrics import MetricsWriter, ProgressReport, Stopwatch

Record = dict[str, float | int | str | None]


# Metrics of a step that a record has in its own way; all others go in as they are.
SHOWN_APART = ("loss", "weight", "grad_norm", "learning_rate", "nonfinite", "loss_scale")


class Dispatched(NamedTuple):
    """A step that the devices were given; its metrics may not be there yet."""

    step: int
    metrics: dict[str, jax.Array]
    tokens_hash: int  # of all tokens consumed up to this step


class Monitor:
    """What the loop tells about finished steps. On processes other than the first it writes nothing."""

    def __init__(
        self,
        workdir: Path,
        report: ProgressReport,
        spec: ModelSpec,
        tokens_a_step: int,
        length: int,
        start_step: int,
        nonfinite: int,
    ):
        """`start_step` and `nonfinite` (steps skipped so far) are those of the state that the run begins with."""
        first = jax.process_index() == 0
        self._writer = MetricsWriter(workdir, start_step) if first else None
        self._report, self._watch, self._tokens_a_step = report, Stopwatch(), tokens_a_step
        peak = peak_flops(jax.devices()[0])
        self._flops, self._peak = flops_per_token(spec, length), peak and peak * jax.device_count()
        self._nonfinite = nonfinite
        self._told: Record = {}
        self.nonfinite_on_end = 0  # steps, up to the last one read

    def read(self, dispatched: Dispatched, logs: bool) -> Record:
        """Waits until a step is finished and returns its record; with tokens a second and MFU where it is logged."""
        metrics = {name: float(value) for name, value in jax.device_get(dispatched.metrics).items()}
        self._watch.step_done()
        self._report.step(dispatched.step)
        nonfinite = round(metrics["nonfinite"])
        self.nonfinite_on_end = self.nonfinite_on_end + 1 if nonfinite > self._nonfinite else 0
        self._nonfinite = nonfinite
        seconds = self._watch.lap() if logs else None
        rate = None if seconds is None else self._tokens_a_step / seconds
        return {
            "step": dispatched.step,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "learning_rate": metrics["learning_rate"],
            "tokens_per_second": rate,
            "mfu": rate * self._flops / self._peak if rate and self._peak else None,
            "seconds_per_step": seconds,
            "counted_tokens": round(metrics["weight"]),
            "nonfinite": nonfinite,
            "loss_scale": metrics["loss_scale"],
            **{name: value for name, value in metrics.items() if name not in SHOWN_APART},
            "tokens_hash": f"{dispatched.tokens_hash:08x}",
        }

    def tell(self, found: Record) -> None:
        """What else the next record that is logged is to say."""
        self._told |= found

    def pause(self) -> None:
        """What comes now (an evaluation, a save) is not training time."""
        self._watch.pause()

    def log(self, record: Record) -> None:
        """Writes and shows a record."""
        if self._writer:
            record, self._told = record | self._told, {}
            self._writer.write(record)
            self._report.logged(record, record["seconds_per_step"])

    def sync(self) -> None:
        """Puts everything logged on disk."""
        if self._writer:
            self._writer.sync()

    def close(self) -> None:
        """Closes the files."""
        if self._writer:
            self._writer.close()


def hash_tokens(batch: Any, before: int) -> int:
    """A checksum over all that this process has consumed: that of the steps before, and this batch.

    With one process it covers the global batch and is the same under every layout.
    """
    return functools.reduce(lambda so_far, leaf: zlib.crc32(_local(leaf), so_far), jax.tree.leaves(batch), before)


def _local(leaf: jax.Array) -> Any:
    if leaf.is_fully_addressable:
        return np.ascontiguousarray(leaf)
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    ordered = sorted(shards, key=lambda shard: [part.start or 0 for part in shard.index])
    return b"".join(np.ascontiguousarray(shard.data).tobytes() for shard in ordered)
