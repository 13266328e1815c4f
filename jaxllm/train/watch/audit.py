"""Whether arrays that several devices hold are the same on all of them, bit for bit.

Replicas drift apart where a device computes wrongly, or where a reduction was forgotten (BLOOM's layer norms did, over
its tensor-parallel ranks); no loss tells. Each device sums up the bits that it holds; the host compares.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

from jaxllm.layout.mesh import in_order
from jaxllm.train.checkpoint.tree_hash import bits_and_positions


class Difference(NamedTuple):
    """A shard of an array that is not the same on two devices."""

    path: str
    device: jax.Device  # which the fewest devices agree with
    other: jax.Device

    def __str__(self) -> str:
        return (
            f"{self.path} on device {self.device.id} (process {self.device.process_index}) is not what it is on "
            f"device {self.other.id} (process {self.other.process_index})"
        )


class Audit:
    """Compares the replicas of every array of a tree on `mesh`; compiled once. `abstract` has its shardings."""

    def __init__(self, abstract: Any, mesh: Mesh):
        leaves, _ = jax.tree_util.tree_flatten_with_path(abstract)
        leaves = [(path, leaf) for path, leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
        self._paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        self._leaves = [leaf for _, leaf in leaves]
        self._mesh = mesh
        specs = tuple(leaf.sharding.spec for leaf in self._leaves)

        def sums(*shards: Array) -> UInt32[Array, "1 leaves"]:
            return jnp.stack([_sum_of_bits(shard) for shard in shards])[None]

        local = jax.shard_map(sums, mesh=mesh, in_specs=specs, out_specs=P(mesh.axis_names), check_vma=False)
        self._sums = jax.jit(local, out_shardings=NamedSharding(mesh, P()))

    def differences(self, tree: Any) -> list[Difference]:
        """Of a tree like `abstract`: the same answer in all processes. Waits for the devices."""
        leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf.sharding, NamedSharding)]
        sums = np.asarray(in_order(self._sums(*leaves)))
        devices = list(self._mesh.devices.flat)
        found = []
        for column, (path, leaf) in enumerate(zip(self._paths, self._leaves, strict=True)):
            of_device = dict(zip(devices, sums[:, column].tolist(), strict=True))
            found += [Difference(path, *pair) for pair in _odd_ones(leaf, of_device)]
        return found


def _odd_ones(leaf: jax.ShapeDtypeStruct, of_device: dict[jax.Device, int]) -> list[tuple[jax.Device, jax.Device]]:
    """(a device that differs, one that most agree with) of each shard."""
    holders: dict[tuple, dict[int, list[jax.Device]]] = defaultdict(lambda: defaultdict(list))
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        key = tuple(part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
        holders[key][of_device[device]].append(device)
    odd = []
    for by_sum in holders.values():
        most, *others = sorted(by_sum.values(), key=len, reverse=True)
        odd += [(device, most[0]) for group in others for device in group]
    return odd


def _sum_of_bits(shard: Array) -> UInt32[Array, ""]:
    """Of the bits of each element, each weighed by an odd number of its position."""
    bits, position = bits_and_positions(shard)
    return jnp.sum(bits * (position * jnp.uint32(0x9E3779B1) * 2 + 1), dtype=jnp.uint32)
