"""The order of a sequence that is split over devices: zigzag, so that causal attention is the same work for each.

A text split over N devices is cut in 2N chunks, and device i holds chunks i and 2N - 1 - i: an early one, whose tokens
see few others, and a late one, whose tokens see many. Between the embedding and the head all activations are in this
*device order*; tokens, targets and logits, outside, are in *text order*.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from jaxllm.layout.layout import Layout, constrain, current_layout


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


# Both permutations are slices and a reversal: a gather is more than the partitioner can split inside a pipeline.


def to_device_order(x: Shaped[Array, "batch length *rest"]) -> Shaped[Array, "batch length *rest"]:
    """What is in text order in device order, split over the devices."""
    layout = current_layout()
    parts = 1 if layout is None else layout.size("length")
    if parts == 1:
        return x
    chunks = x.reshape(x.shape[0], 2, parts, -1, *x.shape[2:])
    paired = jnp.stack([chunks[:, 0], jnp.flip(chunks[:, 1], axis=1)], axis=2)
    return constrain(paired.reshape(x.shape), "batch", "length", *[None] * (x.ndim - 2))


def to_text_order(x: Shaped[Array, "batch length *rest"]) -> Shaped[Array, "batch length *rest"]:
    """The inverse of `to_device_order`: the whole sequence on each device. This one communicates."""
    layout = current_layout()
    parts = 1 if layout is None else layout.size("length")
    if parts == 1:
        return x
    x = constrain(x, "batch", *[None] * (x.ndim - 1))
    paired = x.reshape(x.shape[0], parts, 2, -1, *x.shape[2:])
    chunks = jnp.concatenate([paired[:, :, 0], jnp.flip(paired[:, :, 1], axis=1)], axis=1)
    return chunks.reshape(x.shape)
