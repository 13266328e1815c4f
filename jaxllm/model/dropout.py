"""Dropout as a function of coordinates.

Whether an element is dropped depends on the seed, the step, the row of the global batch, the layer, the place in the
layer and the element's own indices: never on the mesh, the microbatches or the order of computation. The mask is
computed where it is used, from indices alone, so it costs no memory and no communication.
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


class DropoutKey(NamedTuple):
    """A stream of random bits a row of the batch."""

    rows: UInt32[Array, "batch"]

    def fold(self, place: str, layer: Int[Array, ""] | int = 0) -> "DropoutKey":
        """The stream of one place in one layer."""
        salt = jnp.uint32(zlib.crc32(place.encode())) + jnp.uint32(0x9E3779B9) * jnp.uint32(layer)
        return DropoutKey(_mix(self.rows ^ _mix(salt)))


def dropout_key(seed: int, step: Int[Array, ""], rows: Int[Array, "batch"]) -> DropoutKey:
    """The stream of each row of a step's batch; `rows` are indices into the global batch."""
    low, high = jnp.uint32(seed % 2**32), jnp.uint32(seed // 2**32 % 2**32)
    start = _mix(low ^ _mix(high) ^ _mix(step.astype(jnp.uint32) + jnp.uint32(0x632BE5AB)))
    return DropoutKey(_mix(start + jnp.uint32(0x9E3779B9) * rows.astype(jnp.uint32)))


def keep_mask(key: DropoutKey, shape: tuple[int, ...], rate: float, offset: int = 0) -> Array:
    """A boolean mask `[batch, …]` that is true with probability 1 - rate. `offset` is added to the second index."""
    assert shape[0] == key.rows.shape[0], "the first axis of a dropout mask is the batch"
    bits = key.rows
    for axis, size in enumerate(shape[1:], start=1):
        index = jax.lax.broadcasted_iota(jnp.uint32, (*(1,) * axis, size), axis) + jnp.uint32(offset * (axis == 1))
        bits = _mix(bits[..., None] + jnp.uint32(0x9E3779B9) * (index + 1))
    return bits >= jnp.uint32(int(rate * 2**32))


def dropout(x: Float[Array, "batch *rest"], rate: float, key: DropoutKey | None) -> Float[Array, "batch *rest"]:
    """`x` with elements zeroed at `rate` and the others scaled by 1 / (1 - rate); unchanged without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(keep_mask(key, x.shape, rate), x / (1 - rate), 0).astype(x.dtype)


def _mix(x: Array) -> Array:
    """A bijection of 32-bit integers whose every output bit depends on every input bit.

    The constants are those of `lowbias32` in its later form (bias 0.107), found by C. Wellons's hash-prospector search.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)
