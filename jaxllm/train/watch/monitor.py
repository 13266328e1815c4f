"""Reads the metrics of finished steps, counts what went wrong, and writes what is to be logged."""

import functools
import statistics
import time
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.remote.copy import push
from jaxllm.train.checkpoint.checkpoints import SaveFailed
from jaxllm.train.checkpoint.errors import write_failure
from jaxllm.train.flops import flops_per_token, peak_flops
from jaxllm.train.metrics import MetricsWriter, Stopwatch
from jaxllm.train.prepare import Prepared
from jaxllm.train.watch.roll_call import Told, any_process

Record = dict[str, float | int | str | None]

# Metrics of a step that a record has in its own way; all others go in as they are.
SHOWN_APART = ("loss", "weight", "grad_norm", "learning_rate", "nonfinite", "loss_scale")
RECENT = 50  # steps that tell how long one usually takes
SLOW = 3.0  # times the usual
STRAGGLER = 2.0  # times what the median process needs besides its devices' time ...
NOTICED = 0.05  # ... and so much of a step


class Dispatched(NamedTuple):
    """A step that the devices were given; its metrics may not be there yet."""

    step: int
    metrics: dict[str, jax.Array]
    tokens_hash: int  # of all tokens consumed up to this step
    called: jax.Array | np.ndarray | None  # what the processes had to tell (RollCall)


class Monitor:
    """What the loop tells about finished steps. On processes other than the first it writes nothing."""

    def __init__(self, run: Prepared, start_step: int, nonfinite: int):
        """`start_step` and `nonfinite` (steps without an update) are those of the state that the run begins with."""
        self._workdir, self._report, self._events, self._watchdog = run.workdir, run.report, run.events, run.watchdog
        self._wandb = run.config.train.wandb_project
        self._writer = MetricsWriter(run.workdir, start_step, self._wandb) if jax.process_index() == 0 else None
        self._watch = Stopwatch()
        self.tokens_a_step = run.config.data.batch_size * run.source.length
        peak = peak_flops(jax.devices()[0])
        self._flops, self._peak = flops_per_token(run.spec, run.source.length), peak and peak * jax.device_count()
        self._nonfinite, self.step = nonfinite, start_step  # of the last step that was read
        self._told: Record = {}
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._last_read: float | None = None
        self._spent: dict[int, list[Told]] = {}  # since the last line
        self.nonfinite_on_end = 0  # steps, up to the last one read

    @property
    def usual_seconds(self) -> float | None:
        """What a step usually takes."""
        return statistics.median(self._seconds) if self._seconds else None

    def read(self, dispatched: Dispatched, heard: Sequence[Told], logs: bool) -> Record:
        """Waits until a step is finished and returns its record; with tokens a second and MFU where it is logged.

        Args:
          heard: what the processes told with it.
        """
        metrics = {name: float(value) for name, value in jax.device_get(dispatched.metrics).items()}
        self._watch.step_done()
        self.step = dispatched.step
        self._report.step(self.step)
        self._time(heard)
        nonfinite = round(metrics["nonfinite"])
        skipped = nonfinite > self._nonfinite
        self.nonfinite_on_end = self.nonfinite_on_end + 1 if skipped else 0
        self._nonfinite = nonfinite
        if skipped:
            self._events.note("skipped", self.step, f"step {self.step} made no update", loss=str(metrics["loss"]))
        seconds = self._watch.lap() if logs else None
        rate = None if seconds is None else self.tokens_a_step / seconds
        return {
            "step": self.step,
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
            "time": round(time.time(), 3),
            **(self._by_process(seconds) if logs else {}),
        }

    def _time(self, heard: Sequence[Told]) -> None:
        """How long the step took, and whom it waited for."""
        now = time.monotonic()
        before, self._last_read = self._last_read, now
        for told in heard:
            self._spent.setdefault(told.process, []).append(told)
        if before is None:
            return
        usual, seconds = self.usual_seconds, now - before
        if usual and len(self._seconds) >= RECENT // 2 and seconds > max(SLOW * usual, usual + 1):
            worst = max(heard, key=lambda told: told.data_seconds)
            waited = f"; process {worst.process} waited {worst.data_seconds:.2g} s for data"
            self._events.note(
                "slow_step", self.step, f"step {self.step} took {seconds:.3g} s, usually {usual:.2g}{waited}"
            )
        self._seconds.append(seconds)
        self._watchdog.usual(self.usual_seconds)

    def _by_process(self, seconds: float | None) -> Record:
        """Seconds a step that the slowest process waited for data, and worked besides, since the last line."""
        means = {
            process: (statistics.fmean(t.data_seconds for t in told), statistics.fmean(t.host_seconds for t in told))
            for process, told in self._spent.items()
        }
        self._spent = {}
        slowest = max(means, key=lambda process: sum(means[process]))
        usual, worst = statistics.median(map(sum, means.values())), sum(means[slowest])
        if seconds and worst > STRAGGLER * usual and worst > NOTICED * seconds:
            data, host = means[slowest]
            self._events.note(
                "straggler",
                self.step,
                f"process {slowest} needs {worst:.3g} s of a step besides its devices' time ({data:.3g} for data, "
                f"{host:.3g} else), the median process {usual:.3g} s",
            )
        record = {
            "data_wait": max(data for data, _ in means.values()),
            "host_seconds": max(h for _, h in means.values()),
        }
        return record | ({"slowest_process": slowest} if len(means) > 1 else {})

    def tell(self, found: Record) -> None:
        """What else the next record that is logged is to say."""
        self._told |= found

    def pause(self) -> None:
        """What comes now (an evaluation, a save) is not training time."""
        self._watch.pause()
        self._last_read = None

    def rewind(self, step: int, nonfinite: int) -> None:
        """The run goes on from an earlier step."""
        self.pause()
        self.close()
        self._writer = MetricsWriter(self._workdir, step, self._wandb) if self._writer else None
        self._nonfinite, self.step, self.nonfinite_on_end, self._spent, self._told = nonfinite, step, 0, {}, {}

    def log(self, record: Record) -> None:
        """Writes and shows a record."""
        if self._writer:
            record, self._told = record | self._told, {}
            self._writer.write(record)
            self._report.logged(record, record["seconds_per_step"])

    def sync(self) -> None:
        """Puts everything logged on disk, or into the bucket. Raises SaveFailed, in all processes, where that fails."""
        failure = None
        try:
            if self._writer:
                self._writer.sync()
                push(self._workdir)
        except OSError as error:
            failure = write_failure(error)
        if any_process(failure is not None):
            raise SaveFailed(
                f"metrics.jsonl could not be written: {failure or 'by the first process'}.\n"
                "Free space and run the same command again to go on."
            )

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
