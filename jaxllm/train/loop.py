"""A training run from its config to its last checkpoint, top to bottom."""

import contextlib
import dataclasses
import errno
import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import UserError
from jaxllm.layout.compile_check import compile_checked
from jaxllm.layout.layout import make_layout
from jaxllm.layout.mesh import in_order
from jaxllm.model.spec import ModelSpec
from jaxllm.steps import STEPS
from jaxllm.train.begin import Beginner
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.checks import check
from jaxllm.train.config import Config, config_dict
from jaxllm.train.expectation import Expects, compiled_line, measured_line, planned_line
from jaxllm.train.initial import carry_origin, check_initial, refuse_new_tokenizer, refuse_parameters_alone
from jaxllm.train.initial_adapter import check_initial_adapter
from jaxllm.train.learner import spec_of
from jaxllm.train.metrics import ProgressReport
from jaxllm.train.monitor import Dispatched, Monitor, hash_tokens
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.preemption import PreemptionNotice
from jaxllm.train.reference import reference_kind
from jaxllm.train.resume import differences, refuse_breaking
from jaxllm.train.scorer import check_critic
from jaxllm.train.source import DatasetSource, OpenSource, Setting
from jaxllm.train.start import data_config, describe_run
from jaxllm.train.state import abstract_state
from jaxllm.train.step_trace import StepTrace
from jaxllm.train.train_step import abstract_batch, make_train_step

DONE, FAILED, PREEMPTED = 0, 1, 75


def train(
    config: Config,
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    quiet: bool = False,
    open_source: OpenSource = DatasetSource,
    expects: Expects | None = None,
) -> int:
    """Trains a model in `workdir`, or goes on from its newest checkpoint that can be read.

    Args:
      devices: default all.
      quiet: print nothing; metrics.jsonl holds the figures all the same.
      open_source: where the batches come from; for steps whose model writes them, jaxllm.rollout's.
      expects: what a planner expects; printed beside what the compiler and the devices then do.

    Returns:
      The exit code: 0 done, 1 the gradient stayed non-finite, 75 preempted (SIGTERM, SIGUSR1) after a good save.

    Raises:
      UserError: a mistake in config, data or workdir, or a full disk.
    """
    check(config, len(devices or jax.devices()))
    workdir = Path(workdir)
    report = ProgressReport(quiet=quiet or jax.process_index() > 0)
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep, config.train.keep_best, report.say)
    with _full_disk_is_told(workdir), contextlib.ExitStack() as stack:
        stack.enter_context(checkpoints)
        stack.callback(report.close)

        # What was here before.
        checkpoints.clean_up()
        stored = checkpoints.newest_run()
        if stored is not None:
            refuse_parameters_alone(stored, workdir)
            changed = differences(stored["config"], config)
            for name, (before, now) in changed.items():
                report.say(f"changed since the checkpoint: config.{name} was {before!r}, is {now!r}")
            refuse_breaking(changed, workdir)

        if config.train.init_from and stored is None:
            refuse_new_tokenizer(config)

        # Data, model, layout, optimizer.
        told = Setting(config, data_config(config, stored, workdir), workdir, report.say, progress=not quiet)
        source = open_source(told)
        stack.callback(source.close)
        spec = spec_of(config, source.tokenizer.vocab_size)
        _check_vocabulary(spec, source.tokenizer)
        if stored is None:
            _check_start(config, spec, source.tokenizer)
        layout = make_layout(
            config.mesh, config.layout, reduce_dtype=config.precision.gradients, devices=devices and list(devices)
        )
        schedule = make_schedule(config.optimizer, config.train.steps)
        optimizer = make_optimizer(config.optimizer, config.train.steps, spec.trained_axes)
        source.open(spec, layout)

        # The steps. What the compiler makes of the layout is checked before any step runs.
        step_function = STEPS[config.train_step]
        reference = reference_kind(step_function, config)
        abstract = abstract_state(spec, optimizer, layout, config.precision.compute, reference)
        for line in [*source.describe(), *describe_run(config, spec, layout, abstract, source)]:
            report.say(line)
        expected = expects(dataclasses.replace(config, model=spec.config), layout) if expects else None
        if expected:
            report.say(planned_line(expected))
        train_step = compile_checked(
            make_train_step(step_function, spec, optimizer, schedule, config, layout, source.tokenizer.vocab_size)
            .trace(abstract, abstract_batch(config, layout))
            .lower(),
            layout,
            spec.parameters,
            allow_replication=config.layout.allow_replication,
            warn=report.say,
        )
        if expected:
            report.say(compiled_line(expected, train_step))

        # State: restored, or fresh.
        beginner = Beginner(config, workdir, spec, optimizer, layout, reference, source.tokenizer, report.say)
        state, start, data_state, arrays, identities = beginner.begin(checkpoints, abstract, source.abstract_arrays())
        loader, tokens_hash = (data_state["loader"], data_state["tokens_hash"]) if data_state else (None, 0)
        source.begin(state, loader, arrays, identities["base"].get("parameter_hash", ""))
        del arrays
        _write_run(config, source.tokenizer, workdir)

        # What watches the run.
        tokens_a_step = config.data.batch_size * source.length
        monitor = Monitor(workdir, report, spec, tokens_a_step, source.length, start, nonfinite=int(state.nonfinite))
        stack.callback(monitor.close)
        notice = stack.enter_context(PreemptionNotice())
        trace = StepTrace(config.train, workdir)
        stack.callback(trace.close)
        stack.callback(gc.unfreeze)
        report.start(config.train.steps, start)
        unread: Dispatched | None = None

        for step in range(start + 1, config.train.steps + 1):
            batch = source.next(state)
            tokens_hash = hash_tokens(batch, tokens_hash)
            trace.before(step, state)
            state, metrics = train_step(state, batch)
            source.stepped(metrics)
            monitor.tell(source.told())

            # The devices have step n; only now wait for the metrics of step n - 1, so that they are never idle.
            if unread:
                record = monitor.read(unread, logs=unread.step % config.train.log_every == 0)
                if unread.step % config.train.log_every == 0:
                    monitor.log(record)
                    if expected and (line := measured_line(expected, record, tokens_a_step)):
                        report.say(line)
                    expected = None
                if monitor.nonfinite_on_end > config.train.max_nonfinite:
                    report.say(_too_many_nonfinite(unread.step, monitor.nonfinite_on_end, checkpoints.steps()))
                    return FAILED
            in_order(state)  # after the reading, which takes the time of step n - 1
            unread = Dispatched(step, metrics, tokens_hash)
            if step == start + 1:
                gc.collect()
                gc.freeze()  # what is alive now stays alive: collections need not look at it again

            last = step == config.train.steps
            evaluates = source.evaluates and (last or _due(step, config.train.eval_every))
            preempted = (jax.process_count() == 1 or _due(step, config.train.log_every)) and notice.agreed()
            saves = last or preempted or _due(step, config.train.checkpoint_every)
            if not (evaluates or saves):
                continue

            # At an evaluation or a save the devices are waited for.
            logs = evaluates or last or _due(step, config.train.log_every)
            record = monitor.read(unread, logs)
            unread = None
            monitor.pause()
            if monitor.nonfinite_on_end > config.train.max_nonfinite:
                if logs:
                    monitor.log(record)
                report.say(_too_many_nonfinite(step, monitor.nonfinite_on_end, checkpoints.steps()))
                return FAILED
            evaluation = source.evaluate(state) if evaluates else {}
            if logs:
                monitor.log(record | evaluation)
            if saves:
                monitor.sync()  # no checkpoint without the lines that lead to it
                data_state = {"loader": source.state(), "tokens_hash": tokens_hash}
                checkpoints.save(state, data_state, config_dict(config), evaluation, identities, source.arrays())
            if preempted:
                checkpoints.wait()
                report.say(
                    f"{notice.received or 'A signal to another process'}: saved step {step}. Run again to go on."
                )
                return PREEMPTED

        checkpoints.wait()
        newest = checkpoints.steps()
        report.say(f"done: {workdir}, checkpoint of step {newest[-1] if newest else start}")
        return DONE


def _check_vocabulary(spec: ModelSpec, tokenizer: Tokenizer) -> None:
    if spec.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"config.model.vocab_size={spec.config.vocab_size} is below the {tokenizer.vocab_size} pieces "
            f"of the tokenizer. Set it to 0 (as many as those) or to {tokenizer.vocab_size} or more."
        )


def _check_start(config: Config, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """What a fresh run starts from."""
    if config.train.init_from:
        check_initial(config, spec, tokenizer)
        if config.adapter.init_from:
            check_initial_adapter(config)
    if config.train.reference:
        check_initial(config, spec, tokenizer, "reference")
    check_critic(config, spec, tokenizer)


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


def _too_many_nonfinite(step: int, on_end: int, saved: list[int]) -> str:
    last = f"The last checkpoint is that of step {saved[-1]}." if saved else "There is no checkpoint yet."
    return (
        f"stopped at step {step}: the gradient was not finite for {on_end} steps on end "
        f"(config.train.max_nonfinite). {last} Lower config.optimizer.learning_rate or look at the data."
    )


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
