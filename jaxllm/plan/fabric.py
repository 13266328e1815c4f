"""How fast the network at hand is: the collectives of each mesh axis, measured, beside the cluster's table."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxllm.layout.mesh import in_order, node_of
from jaxllm.plan.clusters import Cluster

REPEATS = 5


class Measured(NamedTuple):
    """One collective over one mesh axis."""

    axis: str
    size: int
    crosses_nodes: bool
    collective: str
    num_bytes: int  # of a device's whole array
    seconds: float
    gigabytes_per_second: float  # that a device sends, in one direction
    expected: float | None  # the same, by the cluster's table

    @property
    def share(self) -> float | None:
        """Of what the table says."""
        return None if self.expected is None else self.gigabytes_per_second / self.expected


def measure_fabric(mesh: Mesh, num_bytes: int, cluster: Cluster | None) -> list[Measured]:
    """All-reduce, all-gather, reduce-scatter and permute over each axis of `mesh` that has more than one device.

    The bytes that a device sends are those of a ring of n devices (nccl-tests' bus bandwidth): 2 (n - 1)/n of the array
    for an all-reduce, (n - 1)/n for an all-gather and a reduce-scatter, all of it for a permute.
    """
    return [
        _measure(mesh, axis, name, num_bytes, cluster)
        for axis, size in mesh.shape.items()
        if size > 1
        for name in COLLECTIVES
    ]


def _measure(mesh: Mesh, axis: str, name: str, num_bytes: int, cluster: Cluster | None) -> Measured:
    size, (local, gathered_in, sent) = mesh.shape[axis], COLLECTIVES[name]
    elements = max(num_bytes // 4 // size, 1) * size
    others = tuple(a for a in mesh.axis_names if a != axis)
    spec = P(others, axis) if gathered_in else P(others, None)
    rows = mesh.size // size
    make = jax.jit(lambda: jnp.ones((rows, elements), jnp.float32), out_shardings=NamedSharding(mesh, spec))
    run = jax.jit(
        jax.shard_map(
            lambda x: local(x, axis, size), mesh=mesh, in_specs=spec, out_specs=P(others, axis), check_vma=False
        )
    )
    array = in_order(make())
    jax.block_until_ready(run(array))
    start = time.perf_counter()
    for _ in range(REPEATS):
        jax.block_until_ready(run(array))
    seconds = (time.perf_counter() - start) / REPEATS
    crosses = crosses_nodes(mesh, axis)
    rate = sent(size) * elements * 4 / seconds / 1e9
    expected = None if cluster is None else (cluster.network_bandwidth if crosses else cluster.gpu.link_bandwidth)
    return Measured(axis, size, crosses, name, elements * 4, seconds, rate, expected)


def crosses_nodes(mesh: Mesh, axis: str) -> bool:
    """Whether devices that differ along this axis alone are in several nodes."""
    lines = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1).reshape(-1, mesh.shape[axis])
    return any(len({node_of(device) for device in line}) > 1 for line in lines)


def _all_reduce(x: Array, axis: str, size: int) -> Array:
    return jax.lax.psum(x, axis)[:, : x.shape[1] // size]


def _all_gather(x: Array, axis: str, size: int) -> Array:
    return jax.lax.all_gather(x, axis, axis=1, tiled=True)[:, : x.shape[1]] + 1


def _reduce_scatter(x: Array, axis: str, size: int) -> Array:
    return jax.lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True)


def _permute(x: Array, axis: str, size: int) -> Array:
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])[:, : x.shape[1] // size]


# What runs on a device; whether its input is one part of the array; what it sends, as a part of the whole array.
COLLECTIVES: dict[str, tuple[Callable[..., Array], bool, Callable[[int], float]]] = {
    "all-reduce": (_all_reduce, False, lambda n: 2 * (n - 1) / n),
    "all-gather": (_all_gather, True, lambda n: (n - 1) / n),
    "reduce-scatter": (_reduce_scatter, False, lambda n: (n - 1) / n),
    "permute": (_permute, False, lambda n: 1.0),
}


def fabric_table(measured: Sequence[Measured]) -> str:
    """For people: one line a collective."""
    lines = [f"{'axis':<10}{'devices':>8}  {'over':<10}{'collective':<16}{'MB':>8}{'ms':>10}{'GB/s':>9}  of the table"]
    for m in measured:
        over = "the network" if m.crosses_nodes else "a node"
        share = "" if m.share is None else f"{m.share:.0%} of {m.expected:g}"
        lines.append(
            f"{m.axis:<10}{m.size:>8}  {over:<12}{m.collective:<16}{m.num_bytes / 1e6:>6.1f}{m.seconds * 1e3:>10.3f}"
            f"{m.gigabytes_per_second:>9.2f}  {share}"
        )
    return "\n".join(lines)
