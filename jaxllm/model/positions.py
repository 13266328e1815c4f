"""Where a token stands: learned embeddings (GPT-2) or rotary embeddings (Su et al. 2021)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles, float32."""

    cos: Float[Array, "batch length half"]
    sin: Float[Array, "batch length half"]


def rotation(positions: Int[Array, "batch length"], head_dim: int, theta: float) -> Rotation:
    """The angles position * theta^(-2i / head_dim), i = 0 … head_dim/2 - 1."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "batch length heads head_dim"], by: Rotation) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the pairs (x[i], x[i + head_dim/2]): the half-split order of Llama checkpoints in Hugging Face form."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = by.cos[:, :, None, :], by.sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
