"""What a run needs before its first step: data, model, layout, the compiled step, each checked before the next."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import UserError
from jaxllm.layout.compile_check import bytes_of_step, compile_checked
from jaxllm.layout.layout import Layout, make_layout
from jaxllm.model.spec import ModelSpec
from jaxllm.steps import STEPS
from jaxllm.train.begin import Beginner
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.checks import check
from jaxllm.train.config import Config
from jaxllm.train.initial import check_initial, refuse_new_tokenizer, refuse_parameters_alone
from jaxllm.train.initial_adapter import check_initial_adapter
from jaxllm.train.learner import spec_of
from jaxllm.train.metrics import ProgressReport
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.reference import reference_kind
from jaxllm.train.resume import differences, refuse_breaking
from jaxllm.train.scorer import check_critic
from jaxllm.train.source import OpenSource, Setting, Source
from jaxllm.train.start import data_config, describe_run
from jaxllm.train.state import TrainState, abstract_state
from jaxllm.train.train_step import abstract_batch, abstract_limits, make_train_step
from jaxllm.train.watch.events import Events
from jaxllm.train.watch.expectation import Expectation, Expects, compiled_line, planned_line
from jaxllm.train.watch.self_test import findings, self_test
from jaxllm.train.watch.watchdog import Watchdog


class Prepared(NamedTuple):
    """A run that is ready to begin."""

    config: Config
    workdir: Path
    spec: ModelSpec
    layout: Layout
    source: Source
    train_step: jax.stages.Compiled
    abstract: TrainState
    beginner: Beginner
    checkpoints: Checkpoints
    expected: Expectation | None
    report: ProgressReport
    events: Events
    watchdog: Watchdog
    stack: contextlib.ExitStack  # closes what was opened


def prepare(
    config: Config,
    workdir: Path,
    stack: contextlib.ExitStack,
    *,
    report: ProgressReport,
    events: Events,
    devices: Sequence[jax.Device] | None,
    quiet: bool,
    open_source: OpenSource,
    expects: Expects | None,
) -> Prepared:
    """Reads, checks and compiles; says what it finds. The other arguments are those of `loop.train`.

    Args:
      stack: what is opened is closed with it.
      report, events: where it is said and written.

    Raises:
      UserError: a mistake in config, data or workdir.
    """
    check(config, len(devices or jax.devices()))
    write_end = functools.partial(events.write_end, "hung")
    watchdog = Watchdog(config.train.hang_timeout, ProgressReport(quiet=quiet).say, write_end)
    stack.enter_context(watchdog)
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep, config.train.keep_best, report.say)
    stack.enter_context(checkpoints)

    # What was here before.
    checkpoints.clean_up()
    stored = checkpoints.newest_run()
    _compare(config, stored, workdir, report)

    # Data, model, layout, optimizer.
    told = Setting(config, data_config(config, stored, workdir), workdir, report.say, not quiet, watchdog.goes_on)
    source = open_source(told)
    stack.callback(source.close)
    spec = spec_of(config, source.tokenizer.vocab_size)
    _check_vocabulary(spec, source.tokenizer)
    if stored is None:
        _check_start(config, spec, source.tokenizer)
    layout = make_layout(
        config.mesh, config.layout, reduce_dtype=config.precision.gradients, devices=devices and list(devices)
    )
    _test_devices(layout, events)
    optimizer = make_optimizer(config.optimizer, config.train.steps, spec.trained_axes)
    source.open(spec, layout)

    # The steps. What the compiler makes of the layout is checked before any step runs.
    reference = reference_kind(STEPS[config.train_step], config)
    abstract = abstract_state(spec, optimizer, layout, config.precision.compute, reference)
    for line in [*source.describe(), *describe_run(config, spec, layout, abstract, source)]:
        report.say(line)
    expected = expects(dataclasses.replace(config, model=spec.config), layout) if expects else None
    train_step = _compile(config, spec, optimizer, layout, source, abstract, expected, events)
    beginner = Beginner(config, workdir, spec, optimizer, layout, reference, source.tokenizer, report.say)
    made = (source, train_step, abstract, beginner, checkpoints, expected, report, events, watchdog, stack)
    return Prepared(config, workdir, spec, layout, *made)


def _compare(config: Config, stored: dict[str, Any] | None, workdir: Path, report: ProgressReport) -> None:
    """The run that is in the workdir with the one that is asked for."""
    if stored is not None:
        refuse_parameters_alone(stored, workdir)
        changed = differences(stored["config"], config)
        for name, (before, now) in changed.items():
            report.say(f"changed since the checkpoint: config.{name} was {before!r}, is {now!r}")
        refuse_breaking(changed, workdir)
    elif config.train.init_from:
        refuse_new_tokenizer(config)


def _compile(
    config: Config,
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    source: Source,
    abstract: TrainState,
    expected: Expectation | None,
    events: Events,
) -> jax.stages.Compiled:
    schedule = make_schedule(config.optimizer, config.train.steps)
    if expected:
        seconds = {} if expected.seconds is None else {"seconds": expected.seconds}
        events.tell("planned", 0, planned_line(expected), bytes=round(expected.counted_bytes), **seconds)
    step_function, num_tokens = STEPS[config.train_step], source.tokenizer.vocab_size
    train_step = compile_checked(
        make_train_step(step_function, spec, optimizer, schedule, config, layout, num_tokens)
        .trace(abstract, abstract_batch(config, layout), *abstract_limits(config, layout))
        .lower(),
        layout,
        spec.parameters,
        allow_replication=config.layout.allow_replication,
        warn=events.say,
    )
    if expected:
        events.tell("compiled", 0, compiled_line(expected, train_step), bytes=bytes_of_step(train_step))
    return train_step


def _test_devices(layout: Layout, events: Events) -> None:
    """On GPUs. Virtual CPU devices share the same cores: their times would say nothing."""
    devices = list(layout.mesh.devices.flat)
    if devices[0].platform != "gpu":
        return
    usual, odd = findings(self_test(devices))
    events.say(usual)
    for line in odd:
        events.tell("straggler", 0, line)


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
