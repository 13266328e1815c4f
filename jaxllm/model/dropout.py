"""Dropout, and noise on embeddings, as functions of coordinates.

Whether an element is dropped depends on the seed, the step, the row of the global batch, the layer, the place in the
layer and the element's own indices: never on the mesh, the microbatches or the order of computation. The mask is
computed where it is used, from indices alone, so it costs no memory and no communication.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32


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


def keep_mask(key: DropoutKey, indices: Sequence[Int[Array, "_"]], rate: float) -> Bool[Array, "batch *rest"]:
    """A mask that is true with probability 1 - rate, a function of the row's stream and of an element's indices.

    Args:
      indices: of each axis after the batch: which number each of its elements has, 0, 1, 2, … where all are there.
    """
    return _bits(key, indices) >= jnp.uint32(int(rate * 2**32))


def dropout(
    x: Float[Array, "batch length *rest"],
    rate: float,
    key: DropoutKey | None,
    places: Int[np.ndarray, " length"] | None = None,
) -> Float[Array, "batch length *rest"]:
    """`x` with elements zeroed at `rate` and the others scaled by 1 / (1 - rate); unchanged without a key.

    Args:
      places: the index in the text of each token, where they are in another order.
    """
    if key is None or rate == 0:
        return x
    length, *rest = (jnp.arange(size) for size in x.shape[1:])
    keep = keep_mask(key, (length if places is None else places, *rest), rate)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def neftune(
    x: Float[Array, "batch length embed"],
    alpha: float,
    key: DropoutKey | None,
    lengths: Int[Array, "batch length"],
    places: Int[np.ndarray, " length"] | None = None,
) -> Float[Array, "batch length embed"]:
    """`x` + Uniform(-1, 1) alpha / sqrt(L d), noise on embeddings (Jain et al. 2023); unchanged without a key.

    Args:
      lengths: L, the tokens of the example that each token is in.
      places: the index in the text of each token, where they are in another order.
    """
    if key is None or alpha == 0:
        return x
    length, width = (jnp.arange(size) for size in x.shape[1:])
    noise = _bits(key, (length if places is None else places, width)).astype(jnp.float32) * 2.0**-31 - 1
    scale = alpha * jax.lax.rsqrt(lengths.astype(jnp.float32) * x.shape[-1])
    return (x + noise * scale[..., None]).astype(x.dtype)


def example_lengths(
    positions: Int[Array, "batch length"], segment_ids: Int[Array, "batch length"]
) -> Int[Array, "batch length"]:
    """How many tokens the example has in which each token is; of padding any number."""
    index = jnp.arange(positions.shape[1], dtype=jnp.int32)
    is_last = jnp.roll(segment_ids, -1, axis=1) != segment_ids
    last = jax.lax.cummin(jnp.where(is_last, index, index[-1]), axis=1, reverse=True)
    return positions + last - index + 1


def _bits(key: DropoutKey, indices: Sequence[Int[Array, "_"]]) -> UInt32[Array, "batch *rest"]:
    """Random bits of each element, a function of the row's stream and of the element's indices."""
    bits = key.rows
    for axis, index in enumerate(indices, start=1):
        number = jnp.asarray(index, jnp.uint32).reshape(*(1,) * axis, -1)
        bits = _mix(bits[..., None] + jnp.uint32(0x9E3779B9) * (number + 1))
    return bits


def _mix(x: Array) -> Array:
    """A bijection of 32-bit integers whose every output bit depends on every input bit.

    The constants are those of `lowbias32` in its later form (bias 0.107), found by C. Wellons's hash-prospector search.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)
