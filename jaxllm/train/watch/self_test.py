"""A short matrix product on each device at the start: is one of them slow, does one compute something else?

BLOOM lost 5 % for days to one slow GPU of 384, and found it by halving the cluster again and again.
"""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

SIZE = 4096  # on a GPU: 137 GFLOP, a tenth to a half of a millisecond
REPEATS = 20
SLOW = 1.15  # times the median


class Tested(NamedTuple):
    """What one device did."""

    device: int
    process: int
    seconds: float
    result: float


def self_test(devices: Sequence[jax.Device], size: int = SIZE) -> list[Tested]:
    """Tests the devices of this process one after the other, and gathers what all processes found."""
    mine = [_test(device, size) for device in devices if device.process_index == jax.process_index()]
    rows = np.array(mine, np.float64)
    if jax.process_count() > 1:
        rows = multihost_utils.process_allgather(rows.astype(np.float32))
    return [
        Tested(int(row[0]), int(row[1]), *map(float, row[2:])) for row in np.reshape(rows, (-1, len(Tested._fields)))
    ]


def _test(device: jax.Device, size: int) -> Tested:
    place = jax.sharding.SingleDeviceSharding(device)
    values = np.random.default_rng(0).standard_normal((size, size)).astype(jnp.bfloat16)
    matrix = jax.device_put(values, place)
    multiply = jax.jit(lambda a: (a @ a) / size)
    total = jax.jit(lambda a: jnp.sum(a.astype(jnp.float32) ** 2))
    result = float(total(multiply(matrix)))
    start = time.perf_counter()
    product = matrix
    for _ in range(REPEATS):
        product = multiply(matrix)
    product.block_until_ready()
    return Tested(device.id, device.process_index, (time.perf_counter() - start) / REPEATS, result)


def findings(tested: Sequence[Tested]) -> tuple[str, list[str]]:
    """One line of what is usual, and one for each device that is not."""
    usual = statistics.median(test.seconds for test in tested)
    common = statistics.mode(test.result for test in tested)
    odd = [
        f"device {test.device} (process {test.process}) takes {test.seconds / usual:.2f} times as long as the median: "
        "every step waits for it"
        for test in tested
        if test.seconds > SLOW * usual
    ]
    odd += [
        f"device {test.device} (process {test.process}) computes {test.result!r} where the others compute {common!r}: "
        "take it out of the cluster"
        for test in tested
        if test.result != common
    ]
    slowest = max(test.seconds for test in tested)
    return (
        f"self-test: a matrix product takes {usual * 1e3:.3g} ms (median), {slowest * 1e3:.3g} ms on the slowest",
        odd,
    )
