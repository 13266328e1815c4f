"""Rows that hold several texts, each a segment: what is said of tokens as something said of texts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.layout.sequence import to_device_order


def sums_by_segment(
    x: Float[Array, "batch length"], segment_ids: Int[Array, "batch length"], num_segments: int
) -> Float[Array, "batch segments"]:
    """The sum over the tokens of each segment 1, 2, …; both in one order. What belongs to none is left out."""
    return jnp.einsum("bt,bts->bs", x, jax.nn.one_hot(segment_ids - 1, num_segments, dtype=x.dtype))


def ends_of_segments(segment_ids: Int[Array, "batch length"]) -> Bool[Array, "batch length"]:
    """True on the last token of each segment, in device order; `segment_ids` in text order."""
    following = jnp.roll(segment_ids, -1, axis=1).at[:, -1].set(0)
    return to_device_order((segment_ids > 0) & (segment_ids != following))


def of_pairs(x: Float[Array, "batch segments"]) -> tuple[Float[Array, "batch pairs"], Float[Array, "batch pairs"]]:
    """What is said of segments 1, 3, 5, … and of 2, 4, 6, …: of the chosen and of the rejected texts."""
    return x[:, 0::2], x[:, 1::2]
