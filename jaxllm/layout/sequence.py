"""The order of a sequence that is split over devices: zigzag, so that causal attention is the same work for each.

A text split over N devices is cut in 2N chunks, and device i holds chunks i and 2N - 1 - i: an early one, whose tokens
see few others, and a late one, whose tokens see many. Between the embedding and the head all activations are in this
*device order*; tokens, targets and logits, outside, are in *text order*.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

from jaxllm.layout.layout import Layout, current_layout, on_each_device


def token_order(layout: Layout | None, length: int) -> Int[np.ndarray, " length"] | None:
    """The index in the text of each place of the device order; None where the sequence is not split.

    Twice the number of parts must divide `length`.
    """
    parts = 1 if layout is None else layout.size("length")
    return None if parts == 1 else np.concatenate([text_indices(part, parts, length // parts) for part in range(parts)])


def text_indices(part: int | Int[Array, ""], parts: int, length: int) -> Int[Array | np.ndarray, " length"]:
    """The index in the text of each of the `length` tokens that part number `part` of `parts` holds."""
    chunk = length // 2
    first, second = part * chunk, (2 * parts - 1 - part) * chunk
    in_chunk = np.arange(chunk, dtype=np.int32)
    together = np if isinstance(part, int) else jnp
    return together.concatenate([first + in_chunk, second + in_chunk])


# Both are written for one device: left to the partitioner, the tokens would be permuted after they are split.


def to_device_order(x: Shaped[Array, "batch length *rest"]) -> Shaped[Array, "batch length *rest"]:
    """What is in text order, whole, in device order: each device keeps its part, and nothing is sent."""
    layout = current_layout()
    if layout is None or layout.size("length") == 1:
        return x
    axes, parts = layout.mesh_axes("length"), layout.size("length")

    def local(x):
        part, chunk = jax.lax.axis_index(axes), x.shape[1] // (2 * parts)
        chunks = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for i in (part, 2 * parts - 1 - part))
        return jnp.concatenate(list(chunks), axis=1)

    return on_each_device(layout, local, _spec(layout, x, None), _spec(layout, x, "length"))(x)


def to_text_order(x: Shaped[Array, "batch length *rest"]) -> Shaped[Array, "batch length *rest"]:
    """What is in device order, split, in text order: gathered on each device."""
    layout = current_layout()
    if layout is None or layout.size("length") == 1:
        return x
    axes = layout.mesh_axes("length")

    def local(x):
        pairs = jax.lax.all_gather(x.reshape(x.shape[0], 2, -1, *x.shape[2:]), axes, axis=2)
        chunks = jnp.concatenate([pairs[:, 0], jnp.flip(pairs[:, 1], axis=1)], axis=1)
        return chunks.reshape(x.shape[0], -1, *x.shape[2:])

    return on_each_device(layout, local, _spec(layout, x, "length"), _spec(layout, x, None))(x)


def _spec(layout: Layout, x: Array, length: str | None) -> P:
    return layout.spec(("batch", length, *[None] * (x.ndim - 2)))
