"""A training run from its config to its last checkpoint, top to bottom."""

import contextlib
import errno
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.data.dataset import Dataset, prepare
from jaxllm.errors import UserError
from jaxllm.layout.compile_check import compile_checked
from jaxllm.layout.layout import Layout, make_layout
from jaxllm.layout.mesh import in_order
from jaxllm.model.spec import model_spec
from jaxllm.steps import STEPS
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.checks import check
from jaxllm.train.config import Config, config_dict
from jaxllm.train.initial import (
    carry_origin,
    check_initial,
    prompt_tokens,
    refuse_new_tokenizer,
    refuse_parameters_alone,
    restore_base,
    restore_initial,
)
from jaxllm.train.initial_adapter import check_initial_adapter, restore_initial_adapter
from jaxllm.train.metrics import ProgressReport
from jaxllm.train.monitor import Dispatched, Monitor, hash_tokens
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.preemption import PreemptionNotice
from jaxllm.train.resume import differences, refuse_breaking
from jaxllm.train.start import data_config, describe_run
from jaxllm.train.state import TrainState, abstract_base, abstract_state, frozen_state, init_state, init_state_from
from jaxllm.train.step_trace import StepTrace
from jaxllm.train.train_step import abstract_batch, make_eval_step, make_train_step

DONE, FAILED, PREEMPTED = 0, 1, 75


def train(
    config: Config, workdir: str | Path, *, devices: Sequence[jax.Device] | None = None, quiet: bool = False
) -> int:
    """Trains a model in `workdir`, or goes on from its newest checkpoint that can be read.

    Args:
      devices: default all.
      quiet: print nothing; metrics.jsonl holds the figures all the same.

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
        length = config.data.length or config.model.max_length
        kind = STEPS[config.train_step].batch
        rows = {"length": length, "kind": kind, "places": config.adapter.places}
        data = prepare(data_config(config, stored, workdir), **rows, progress=not quiet)
        spec = model_spec(config.model.resolved(data.tokenizer.vocab_size), config.adapter)
        if spec.config.vocab_size < data.tokenizer.vocab_size:
            raise UserError(
                f"config.model.vocab_size={spec.config.vocab_size} is below the {data.tokenizer.vocab_size} pieces "
                f"of the tokenizer. Set it to 0 (as many as those) or to {data.tokenizer.vocab_size} or more."
            )
        if config.train.init_from and stored is None:
            check_initial(config, spec, data.tokenizer)
            if config.adapter.init_from:
                check_initial_adapter(config)
        layout = make_layout(
            config.mesh, config.layout, reduce_dtype=config.precision.gradients, devices=devices and list(devices)
        )
        batch_sharding = layout.sharding("batch", None)
        loader = data.train_loader(batch_sharding, batch_size=config.data.batch_size, seed=config.seed)
        stack.callback(loader.close)
        schedule = make_schedule(config.optimizer, config.train.steps)
        optimizer = make_optimizer(config.optimizer, config.train.steps, spec.trained_axes)

        # The steps. What the compiler makes of the layout is checked before any step runs.
        abstract = abstract_state(spec, optimizer, layout, config.precision.compute)
        for line in [*data.describe(), *describe_run(config, spec, layout, abstract, data)]:
            report.say(line)
        step_function = STEPS[config.train_step]
        train_step = compile_checked(
            make_train_step(step_function, spec, optimizer, schedule, config, layout)
            .trace(abstract, abstract_batch(config, layout))
            .lower(),
            layout,
            spec.parameters,
            allow_replication=config.layout.allow_replication,
            warn=report.say,
        )
        eval_step = make_eval_step(step_function, spec, config, layout)

        # State: restored, or fresh from the seed.
        restored = checkpoints.restore(abstract)
        start, tokens_hash, base = 0, 0, None
        compute = config.precision.compute
        if restored is None and config.train.init_from:
            base = restore_initial(config.train.init_from, abstract_base(spec, layout), report.say)
            adapter = None
            if config.adapter.init_from:
                adapter = restore_initial_adapter(config, base, abstract, report.say)
            prompt = prompt_tokens(config.adapter, data.tokenizer)
            state = init_state_from(base.params, spec, optimizer, layout, config.seed, compute, prompt, adapter)
        elif restored is None:
            state = init_state(spec, optimizer, layout, config.seed, compute)
        else:
            state, start, tokens_hash = restored.state, restored.step, restored.data["tokens_hash"]
            if spec.is_adapted:
                place = (restored.run["base"], abstract_base(spec, layout))
                base = restore_base(workdir, config, *place, report.say)
                state = state._replace(frozen=frozen_state(base.params, spec, layout, compute))
            loader.restore(restored.data["loader"])
            report.say(f"resumed at step {start}, parameter hash {restored.run['parameter_hash']} as saved")
        identity = base.identity if base and spec.is_adapted else {}
        del base  # its parameters are given up: what is needed of them is in the state
        _write_run(config, data, workdir)

        # What watches the run.
        tokens_a_step = config.data.batch_size * length
        monitor = Monitor(workdir, report, spec, tokens_a_step, length, start, nonfinite=int(state.nonfinite))
        stack.callback(monitor.close)
        notice = stack.enter_context(PreemptionNotice())
        trace = StepTrace(config.train, workdir)
        stack.callback(trace.close)
        stack.callback(gc.unfreeze)
        report.start(config.train.steps, start)
        unread: Dispatched | None = None

        for step in range(start + 1, config.train.steps + 1):
            batch = next(loader)
            tokens_hash = hash_tokens(batch, tokens_hash)
            trace.before(step, state)
            state, metrics = train_step(state, batch)

            # The devices have step n; only now wait for the metrics of step n - 1, so that they are never idle.
            if unread:
                record = monitor.read(unread, logs=unread.step % config.train.log_every == 0)
                if unread.step % config.train.log_every == 0:
                    monitor.log(record)
                if monitor.nonfinite_on_end > config.train.max_nonfinite:
                    report.say(_too_many_nonfinite(unread.step, monitor.nonfinite_on_end, checkpoints.steps()))
                    return FAILED
            in_order(state)  # after the reading, which takes the time of step n - 1
            unread = Dispatched(step, metrics, tokens_hash)
            if step == start + 1:
                gc.collect()
                gc.freeze()  # what is alive now stays alive: collections need not look at it again

            last = step == config.train.steps
            evaluates = data.held_out and (last or _due(step, config.train.eval_every))
            preempted = (jax.process_count() == 1 or _due(step, config.train.log_every)) and notice.agreed()
            saves = last or preempted or _due(step, config.train.checkpoint_every)
            if not (evaluates or saves):
                continue

            # At an evaluation or a save the devices are waited for.
            logs = bool(evaluates) or last or _due(step, config.train.log_every)
            record = monitor.read(unread, logs)
            unread = None
            monitor.pause()
            if monitor.nonfinite_on_end > config.train.max_nonfinite:
                if logs:
                    monitor.log(record)
                report.say(_too_many_nonfinite(step, monitor.nonfinite_on_end, checkpoints.steps()))
                return FAILED
            evaluation = evaluate(eval_step, state, data, config, layout) if evaluates else {}
            if logs:
                monitor.log(record | evaluation)
            if saves:
                monitor.sync()  # no checkpoint without the lines that lead to it
                data_state = {"loader": loader.state(), "tokens_hash": tokens_hash}
                checkpoints.save(state, data_state, config_dict(config), evaluation, identity)
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


def evaluate(
    eval_step: Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]],
    state: TrainState,
    data: Dataset,
    config: Config,
    layout: Layout,
) -> dict[str, float]:
    """eval_loss (nats a token of the held-out split) and, where every token is predicted, eval_bits_per_char.

    Batches have the size of a microbatch, so that an evaluation never needs more memory than training (a pipeline takes
    whole ones, and splits them); a limit of `eval_batches` counts whole ones, so that it covers the same rows whatever
    the microbatches.
    """
    microbatches = 1 if layout.num_stages > 1 else config.layout.num_microbatches
    batches = data.eval_batches(layout.sharding("batch", None), batch_size=config.data.batch_size // microbatches)
    nats, weight = np.float64(0), np.float64(0)
    waiting: list[tuple[jax.Array, jax.Array]] = []
    with contextlib.closing(batches):
        for batch in islice(batches, config.train.eval_batches * microbatches or None):
            waiting.append(in_order(eval_step(state.params, state.held, batch)))
            if len(waiting) > 1:  # one in work, one dispatched
                total, count = jax.device_get(waiting.pop(0))
                nats, weight = nats + np.float64(total), weight + np.float64(count)
    for total, count in jax.device_get(waiting):
        nats, weight = nats + np.float64(total), weight + np.float64(count)
    loss = float(nats / weight)
    if not STEPS[config.train_step].predicts_every_token:
        return {"eval_loss": loss}
    return {"eval_loss": loss, "eval_bits_per_char": data.bits_per_character(loss)}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _write_run(config: Config, data: Dataset, workdir: Path) -> None:
    """WORKDIR/config.json and WORKDIR/tokenizer: a run is complete in itself."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        data.tokenizer.save(workdir / "tokenizer")  # also over what a run without a checkpoint left there
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
