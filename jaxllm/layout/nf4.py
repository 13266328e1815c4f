"""4-bit NormalFloat: frozen weights in a quarter of bfloat16's bytes (Dettmers et al. 2023, QLoRA, section 3).

A block of 64 weights along the axis `embed` shares a scale, its largest magnitude; a weight is the nearest of 16 levels
that a normal distribution fills equally. Two 4-bit codes lie in a byte, scales are bfloat16: 0.53 bytes a weight. Codes
and scales have the axes of the weight, so that a layout places them like any other array.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

BLOCK = 64
# Appendix E of the paper: quantiles of N(0, 1), scaled to [-1, 1], with an exact zero.
LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
BETWEEN = (LEVELS[1:] + LEVELS[:-1]) / 2


@jax.tree_util.register_pytree_node_class
class NF4:
    """A weight in 4 bits.

    Args:
      codes: two levels a byte, so the axis `axis` (`embed` of the weight) is half as long. The first half of a block
        are the low bits.
      scales: bfloat16, one a block.
    """

    def __init__(self, codes: UInt8[Array, "..."], scales: Float[Array, "..."], axis: int):
        self.codes, self.scales, self.axis = codes, scales, axis

    def tree_flatten(self) -> tuple[tuple[Array, Array], int]:
        return (self.codes, self.scales), self.axis

    @classmethod
    def tree_unflatten(cls, axis: int, children: tuple[Array, Array]) -> "NF4":
        return cls(*children, axis)

    def __getitem__(self, index: Any) -> "NF4":
        """Like an array's [...]: the whole."""
        assert index is Ellipsis, "a part of a weight in 4 bits"
        return self

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return tuple(size * (2 if i == self.axis % self.ndim else 1) for i, size in enumerate(self.codes.shape))

    @property
    def dtype(self) -> jnp.dtype:
        return self.codes.dtype


def block_size(size: int) -> int:
    """The weights of a block along an axis of `size`: 64, or the largest power of two that divides it."""
    return min(BLOCK, size & -size)


def packed_shapes(shape: tuple[int, ...], axis: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Codes and scales of a weight of `shape`."""

    def along(size: int) -> tuple[int, ...]:
        return (*shape[:axis], size, *shape[axis + 1 :])

    size = shape[axis]
    return (
        jax.ShapeDtypeStruct(along(size // 2), jnp.uint8),
        jax.ShapeDtypeStruct(along(size // block_size(size)), jnp.bfloat16),
    )


def quantize(w: Float[Array, "..."], axis: int) -> NF4:
    """The nearest levels of each block of `w` along `axis`."""
    blocks = _blocks(w.astype(jnp.float32), axis)
    scales = jnp.abs(blocks).max(axis + 1, keepdims=True).astype(jnp.bfloat16)
    units = blocks / jnp.maximum(scales.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)
    codes = jnp.searchsorted(jnp.asarray(BETWEEN), units, method="compare_all").astype(jnp.uint8)
    low, high = jnp.split(codes, 2, axis + 1)
    packed = (low | (high << 4)).reshape(packed_shapes(w.shape, axis)[0].shape)
    return NF4(packed, scales.squeeze(axis + 1), axis - w.ndim)


def dequantize(w: NF4, dtype: jnp.dtype) -> Float[Array, "..."]:
    """The levels times their scales."""
    axis, shape = w.axis % w.ndim, w.shape
    pairs = w.codes.reshape(*shape[:axis], w.scales.shape[axis], -1, *shape[axis + 1 :])
    codes = jnp.concatenate([pairs & 15, pairs >> 4], axis + 1)
    units = jnp.asarray(LEVELS)[codes]
    return (units * jnp.expand_dims(w.scales, axis + 1).astype(jnp.float32)).astype(dtype).reshape(shape)


def _blocks(w: Array, axis: int) -> Array:
    """[…, size, …] as […, block, place, …]."""
    return w.reshape(*w.shape[:axis], -1, block_size(w.shape[axis]), *w.shape[axis + 1 :])
