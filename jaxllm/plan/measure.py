"""Times a few training steps of a layout on the devices at hand, on synthetic tokens.

They run in another process: what XLA aborts takes only that one along, and the next layout gets a new one. On a GPU
every layout does, so that the peak of the memory is its own.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.data.batch import Batch, Vocabulary, row_random
from jaxllm.errors import UserError
from jaxllm.layout.compile_check import compile_checked
from jaxllm.layout.layout import Layout, make_layout
from jaxllm.steps import STEPS
from jaxllm.train.config import Config
from jaxllm.train.learner import spec_of
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.reference import reference_kind
from jaxllm.train.state import init_state
from jaxllm.train.train_step import make_train_step


class Measurement(NamedTuple):
    """A few steps of one layout."""

    tokens_per_second: float  # of all devices together
    compile_seconds: float
    compiled_bytes: int  # arguments and temporaries of the compiled step, on one device
    peak_bytes: int | None  # what the allocator of the first device saw; CPUs do not tell
    device: str  # the kind


class Failure(NamedTuple):
    """Why a layout was not timed."""

    reason: str


def measure(config: Config, num_devices: int, steps: int = 3) -> Measurement:
    """Compiles the train step of `config` for the first `num_devices` devices; times `steps` steps after one more."""
    devices = jax.devices()[:num_devices]
    layout = make_layout(config.mesh, config.layout, reduce_dtype=config.precision.gradients, devices=devices)
    spec = spec_of(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps, spec.trained_axes)
    schedule = make_schedule(config.optimizer, config.train.steps)
    reference = reference_kind(STEPS[config.train_step], config)
    state = init_state(spec, optimizer, layout, config.seed, config.precision.compute, reference)
    batch = synthetic_batch(config, layout)
    started = time.perf_counter()
    traced = make_train_step(STEPS[config.train_step], spec, optimizer, schedule, config, layout).trace(state, batch)
    step = compile_checked(
        traced.lower(), layout, spec.parameters, allow_replication=config.layout.allow_replication, warn=_warn
    )
    compiled = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    timed = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    seconds = (time.perf_counter() - timed) / steps
    memory = step.memory_analysis()
    return Measurement(
        tokens_per_second=jax.tree.leaves(batch)[0].size / seconds,
        compile_seconds=compiled - started,
        compiled_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        peak_bytes=(devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
        device=devices[0].device_kind,
    )


def _warn(message: str) -> None:
    print(message, file=sys.stderr)


def synthetic_batch(config: Config, layout: Layout) -> Any:
    """The step's batch of random tokens, one document a row."""
    length, kind = config.data.length or config.model.max_length, STEPS[config.train_step].batch
    vocabulary = Vocabulary(config.model.vocab_size, mask_id=0)
    positions = np.arange(length, dtype=np.int32)

    def row(number: int) -> Any:
        random = row_random(config.seed, number)
        tokens = random.randint(vocabulary.size, size=length, dtype=np.int32)
        text = Batch(tokens, positions, np.ones(length, np.int32), positions > config.adapter.places)
        return kind.make_row(text, random, vocabulary, config.data)

    rows = map(row, range(config.data.batch_size))
    return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *rows), layout.sharding("batch"))


def measure_all(
    layouts: Sequence[Config], num_devices: int, steps: int = 3
) -> Iterator[tuple[Config, Measurement | Failure]]:
    """`measure` of each layout in turn, as it is done; what fails gives its reason and the next one follows.

    Raises:
      UserError: fewer devices here than `num_devices`.
    """
    worker = _Worker()
    devices = worker.call(_devices_here)
    if isinstance(devices, Failure):
        raise UserError(f"the devices here cannot be used: {devices.reason}")
    if len(devices) < num_devices:
        worker.end()
        raise UserError(
            f"--devices={num_devices}: there are {len(devices)} here ({devices[0]}). "
            f"Set --devices={len(devices)}, or JAX_PLATFORMS=cpu for virtual ones."
        )
    for config in layouts:
        if devices[0] != "cpu" or not worker.is_alive:
            worker.end()
            worker = _Worker()
        yield config, worker.call(measure, config, num_devices, steps)
    worker.end()


def _devices_here() -> list[str]:
    """The platform of each device."""
    return [device.platform for device in jax.devices()]


class _Worker:
    """A process that runs the functions it is sent."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that its end closes when the process ends

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns there, or a Failure."""
        try:
            self._connection.send((function, arguments))
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            return Failure(f"the process ended with exit code {self._process.exitcode}")

    def end(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection) -> None:
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            result = function(*arguments)
        except Exception as error:  # whatever a compiler or an allocator may say
            told = " ".join(str(error).split())[:300]
            result = Failure(told if isinstance(error, UserError) else f"{type(error).__name__}: {told}")
        connection.send(result)
