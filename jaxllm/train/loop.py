"""A training run from its first step, or its last checkpoint, to its end."""

import contextlib
import errno
import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DONE, PREEMPTED, STOPPED, UserError
from jaxllm.layout.mesh import in_order
from jaxllm.remote.copy import fresh_copy, pushed_now_and_then
from jaxllm.train.checkpoint.interval import advice
from jaxllm.train.checkpoint.saver import Saver
from jaxllm.train.config import Config, config_dict
from jaxllm.train.initial import carry_origin
from jaxllm.train.metrics import ProgressReport
from jaxllm.train.prepare import Prepared, prepare
from jaxllm.train.source import DatasetSource, OpenSource
from jaxllm.train.state import TrainState
from jaxllm.train.watch.audit import Audit
from jaxllm.train.watch.events import Events
from jaxllm.train.watch.expectation import Expects, measured
from jaxllm.train.watch.monitor import Dispatched, Monitor, Record, hash_tokens
from jaxllm.train.watch.preemption import PreemptionNotice
from jaxllm.train.watch.roll_call import RollCall, Told
from jaxllm.train.watch.skips import MAX_ROLLBACKS, Skips
from jaxllm.train.watch.spikes import Spikes
from jaxllm.train.watch.step_trace import StepTrace


def train(
    config: Config,
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    quiet: bool = False,
    open_source: OpenSource = DatasetSource,
    expects: Expects | None = None,
) -> int:
    """Trains a model in `workdir`, a folder or an address, or goes on from its newest checkpoint that can be read.

    Args:
      devices: default all.
      quiet: print nothing; metrics.jsonl holds the figures all the same.
      open_source: where the batches come from; for steps whose model writes them, jaxllm.rollout's.
      expects: what a planner expects; printed beside what the compiler and the devices then do.

    Returns:
      The exit code: 0 done, 1 stopped for a reason that is said (the gradient stayed non-finite, replicas differ), 75
      preempted (SIGTERM, SIGUSR1) after a good save.

    Raises:
      UserError: a mistake in config, data or workdir, or a disk that stayed full.
    """
    workdir = fresh_copy(workdir)
    how = {"devices": devices, "quiet": quiet, "open_source": open_source, "expects": expects}
    report = ProgressReport(quiet=quiet or jax.process_index() > 0)
    events = Events(workdir, report.say)
    # How it fails is written first: what the stack closes may wait for processes that are gone.
    with contextlib.ExitStack() as stack, events.failures_written(), _full_disk_is_told(workdir):
        if jax.process_index() == 0:
            stack.enter_context(pushed_now_and_then(workdir))
        stack.callback(report.close)
        stack.callback(events.close)
        return Run(prepare(config, workdir, stack, report=report, events=events, **how)).go()


class _Spiked(Exception):
    """The run is to go back."""


class Run:
    """The steps of a run, one after the other: `go`."""

    state: TrainState
    step: int  # of the newest batch that the devices were given
    tokens_hash: int
    identities: dict[str, dict[str, Any]]  # of the parameters held beside those trained
    dispatched: Dispatched  # the newest step
    unread: Dispatched | None = None  # the newest step whose metrics are still to be read
    heard: Sequence[Told] = ()  # from all processes, at the newest step that is read
    saves: int = 0
    working_since: float | None = None  # when this process began to work for its next step
    evaluation: Mapping[str, float] = MappingProxyType({})  # the newest

    def __init__(self, run: Prepared):
        config, stack, layout = run.config.train, run.stack, run.layout
        self.run, self.config, self.source, self.events = run, config, run.source, run.events
        run.watchdog.alive("starting", starting=True)
        self.spikes = Spikes(config.spike_window, config.spike_z)
        self.skips = Skips(run.workdir)
        self._begin()
        _write_run(run.config, run.source.tokenizer, run.workdir)

        self.saver = Saver(run.checkpoints, run.events, config.checkpoint_every, config.max_unsaved_minutes)
        self.audit = Audit(run.abstract, layout.mesh)
        self.roll_call = RollCall(layout.mesh)
        self.monitor = Monitor(run, self.step, nonfinite=int(self.state.nonfinite))
        stack.callback(self.monitor.close)
        self.notice = stack.enter_context(PreemptionNotice())
        self.trace = StepTrace(config, run.workdir)
        stack.callback(self.trace.close)
        stack.callback(gc.unfreeze)
        self.awaits_measure, self.awaits_advice = run.expected is not None, True
        self.events.note("resumed" if self.step else "started", self.step, devices=layout.mesh.size)
        run.report.start(config.steps, self.step)

    def go(self) -> int:
        """Runs to the end. Returns the exit code."""
        while self.step < self.config.steps:
            try:
                code = self._advance()
            except _Spiked as spiked:
                code = self._roll_back(str(spiked))
            if code is not None:
                return code
        self.saver.finish(self.step, self._save)
        newest = self.run.checkpoints.steps()
        step = newest[-1] if newest else self.step
        self.events.tell("done", self.step, f"done: {self.run.workdir}, checkpoint of step {step}")
        return DONE

    def _begin(self, skipped: dict[str, Any] | None = None) -> None:
        """From the newest checkpoint, or from the start. `skipped`: go on with the data of this state of the source."""
        run = self.run
        begun = run.beginner.begin(run.checkpoints, run.abstract, run.source.abstract_arrays())
        if skipped is not None:
            self.skips.add(begun.step, skipped)
        data = begun.data or {"loader": None, "tokens_hash": 0}
        loader = self.skips.after(begun.step, data["loader"])
        run.source.begin(begun.state, loader, begun.arrays, begun.identities["base"].get("parameter_hash", ""))
        self.state, self.step, self.identities = begun.state, begun.step, begun.identities
        self.events.step = begun.step
        self.tokens_hash = data["tokens_hash"]
        self.spikes.restore(data.get("spikes", []))

    def _advance(self) -> int | None:
        """One step. Returns an exit code where the run ends with it."""
        first = self.unread is None and self.working_since is None
        self._dispatch()
        if self.unread:  # the devices have step n; only now wait for step n - 1, so that they are never idle
            logs = _due(self.unread.step, self.config.log_every)
            record = self._read(logs)
            if logs:
                self._log(record)
            if (code := self._judge()) is not None:
                return code
        in_order(self.state)  # after the reading, which takes the time of step n - 1
        self.unread = self.dispatched._replace(called=self.roll_call.call(self._told()))
        self.working_since = time.perf_counter()
        if first:
            gc.collect()
            gc.freeze()  # what is alive now stays alive: collections need not look at it again

        config, step = self.config, self.step
        if any(told.save_failed for told in self._told_by_all()):
            self.saver.settle(step)
        last = step == config.steps
        evaluates = self.source.evaluates and (last or _due(step, config.eval_every))
        stops = any(told.stop for told in self._told_by_all())
        saves = last or stops or _due(step, config.checkpoint_every) or self.saver.retries(step)
        audits = _due(step, config.audit_every)
        return self._pause(evaluates, audits, saves, stops) if evaluates or saves or audits else None

    def _dispatch(self) -> None:
        """Gives the devices their next batch."""
        step, begun = self.step + 1, time.perf_counter()
        starts = self.working_since is None
        self.run.watchdog.alive(f"waiting for the data of step {step}", starts)
        batch = self.source.next(self.state)
        self.data_seconds = time.perf_counter() - begun
        self.tokens_hash = hash_tokens(batch, self.tokens_hash)
        self.trace.before(step, self.state)
        limits = (self.spikes.limits(step),) if self.config.spike == "skip" else ()
        self.run.watchdog.alive(f"computing step {step}", starts)
        self.state, metrics = self.run.train_step(self.state, batch, *limits)
        self.host_seconds = 0.0 if starts else time.perf_counter() - self.working_since - self.data_seconds
        self.source.stepped(metrics)
        self.monitor.tell(self.source.told())
        self.step, self.dispatched = step, Dispatched(step, metrics, self.tokens_hash, None)
        self.events.step = step

    def _told(self) -> Told:
        stop, failed = self.notice.received is not None, self.saver.save_failed
        return Told(jax.process_index(), stop, failed, self.data_seconds, self.host_seconds)

    def _told_by_all(self) -> Sequence[Told]:
        """What all processes know that all have told; alone, what is known now."""
        return self.heard if jax.process_count() > 1 else [self._told()]

    def _read(self, logs: bool) -> Record:
        """Waits for the metrics that are not yet read."""
        step, self.heard = self.unread.step, RollCall.heard(self.unread.called)
        record = self.monitor.read(self.unread, self.heard, logs)
        self.unread = None
        score = self.spikes.read(step, record["loss"], record["grad_norm"])
        if score > self.config.spike_z:
            of = f"loss {record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}"
            self.events.tell("spike", step, f"step {step}: a spike: {of}, {score:.1f} deviations above the mean")
        return record

    def _log(self, record: Record) -> None:
        self.monitor.log(record)
        expected = self.run.expected
        if expected and self.awaits_measure:
            found = measured(expected, record, self.monitor.tokens_a_step)
            if found:
                self.events.tell("measured", record["step"], **found)
            self.awaits_measure = False

    def _judge(self) -> int | None:
        """Whether the run ends, or goes back, for what the newest steps came to."""
        config, useless = self.config, self.monitor.nonfinite_on_end
        if config.spike == "rollback" and self.spikes.on_end >= config.spike_steps:
            raise _Spiked(f"{self.spikes.on_end} spikes on end")
        if useless <= config.max_nonfinite:
            return None
        if config.spike == "rollback":
            raise _Spiked(f"the gradient was not finite for {useless} steps on end")
        why = "the gradient was not finite" + (" or a spike" if config.spike == "skip" else "")
        saved = self.run.checkpoints.steps()
        last = f"The last checkpoint is that of step {saved[-1]}." if saved else "There is no checkpoint yet."
        return self._stop(
            f"{why} for {useless} steps on end (config.train.max_nonfinite). {last} "
            "Lower config.optimizer.learning_rate or look at the data."
        )

    def _stop(self, why: str) -> int:
        self.events.tell("stopped", self.monitor.step, f"stopped at step {self.monitor.step}: {why}")
        return STOPPED

    def _roll_back(self, why: str) -> int | None:
        """Goes on from before the spike, with the data that comes after it."""
        step, checkpoints = self.step, self.run.checkpoints
        data = self.source.state()
        self.saver.settle(step)
        checkpoints.forget_after(self.monitor.step - max(self.spikes.on_end, self.monitor.nonfinite_on_end))
        saved = checkpoints.steps()
        if self.skips.count(saved[-1] if saved else 0) >= MAX_ROLLBACKS:
            return self._stop(f"{why}, and the run has gone back {MAX_ROLLBACKS} times to the same checkpoint.")
        self.unread = self.working_since = self.state = None
        self._begin(skipped=data)
        self.monitor.rewind(self.step, int(self.state.nonfinite))
        self.events.tell(
            "rolled_back",
            step,
            f"step {step}: {why}. Rolled back to step {self.step}, without the data of the steps after it.",
            to=self.step,
        )
        return None

    def _pause(self, evaluates: bool, audits: bool, saves: bool, stops: bool) -> int | None:
        """What the devices are waited for. Returns an exit code where the run ends here."""
        step, last = self.step, self.step == self.config.steps
        logs = evaluates or last or _due(step, self.config.log_every)
        record = self._read(logs)
        self.monitor.pause()
        code = self._judge()
        if code is None and audits:
            code = self._audit()
        if code is not None:
            if logs:
                self._log(record)
            return code
        self.run.watchdog.alive("evaluating")
        evaluation = self.source.evaluate(self.state) if evaluates else {}
        if logs:
            self._log(record | evaluation)
        if saves:
            self.run.watchdog.alive("saving")
            self.evaluation = evaluation
            self._advise(self.saver.save(step, self._save))
        if stops and not last:
            self.saver.finish(step, self._save)
            signal = self.notice.received or "A signal to another process"
            self.events.tell("preempted", step, f"{signal}: saved step {step}. Run again to go on.")
            return PREEMPTED
        self.working_since = time.perf_counter()
        return None

    def _save(self) -> None:
        self.monitor.sync()  # no checkpoint without the lines that lead to it
        data = {"loader": self.source.state(), "tokens_hash": self.tokens_hash, "spikes": self.spikes.state()}
        config, identities = config_dict(self.run.config), self.identities
        self.run.checkpoints.save(self.state, data, config, self.evaluation, identities, self.source.arrays())

    def _audit(self) -> int | None:
        self.run.watchdog.alive("comparing replicas")
        differences = self.audit.differences(self.state)
        if not differences:
            return None
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        self.events.note("replicas_differ", self.step, "; ".join(map(str, differences[:20])))
        return self._stop(
            f"replicas differ: {differences[0]}{more}. A device computes wrongly, or a reduction is missing. The last "
            "checkpoint may hold it too; those before are in checkpoints/ as config.train.keep says."
        )

    def _advise(self, blocked: float) -> None:
        """Says once how often to save, where a step's time is known. The first save compiles what it needs."""
        seconds, self.saves = self.monitor.usual_seconds, self.saves + 1
        under_way = self.run.checkpoints.save_under_way and self.config.checkpoint_every
        if self.awaits_advice and seconds and under_way and self.saves > 1:
            self.awaits_advice = False
            devices = self.run.layout.mesh.size
            self.events.say(advice(blocked, seconds, devices, self.config.checkpoint_every))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _write_run(config: Config, tokenizer: Tokenizer, workdir: Path) -> None:
    """WORKDIR/config.json and WORKDIR/tokenizer: a run is complete in itself."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(workdir / "tokenizer")  # also over what a run without a checkpoint left there
        carry_origin(config.train.init_from, workdir)
        new = workdir / "config.json.new"
        new.write_text(json.dumps(config_dict(config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(workdir / "config.json")


@contextlib.contextmanager
def _full_disk_is_told(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left on the disk of {workdir} ({error.filename or error}).\n"
            "Free space and run the same command again to go on from the last checkpoint."
        ) from error
