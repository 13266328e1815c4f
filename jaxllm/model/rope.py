"""Rotary positions (Su et al. 2021), and how they are stretched to a longer context than was trained on.

| rope_scaling | frequencies                                                                                |
| ------------ | ------------------------------------------------------------------------------------------ |
| none         | theta^(-2i / head_dim)                                                                     |
| linear       | all divided by `rope_factor` (Chen et al. 2023, position interpolation)                    |
| dynamic      | of a larger theta the longer the text is, beyond `rope_original_length` ("dynamic NTK")    |
| yarn         | fast kept, slow divided, a ramp between; cosine and sine scaled too (Peng et al. 2023)     |
| llama3       | the same with a ramp over wavelengths (Grattafiori et al. 2024, Llama 3.1)                 |

All agree with the functions of the same names in Hugging Face transformers (`modeling_rope_utils`).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.model.config import ModelConfig

ROPE_SCALINGS = ("none", "linear", "dynamic", "yarn", "llama3")


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles, float32."""

    cos: Float[Array, "batch length half"]
    sin: Float[Array, "batch length half"]


def rotation(
    positions: Int[Array, "batch length"], config: ModelConfig, lengths: Int[Array, " batch"] | None = None
) -> Rotation:
    """The angles position * frequency of a resolved config's rope.

    Args:
      lengths: of the texts that the positions are a part of; default: up to the last of them.
    """
    lengths = positions.max(-1) + 1 if lengths is None else lengths
    angles = positions[..., None].astype(jnp.float32) * frequencies(config, lengths)
    factor = attention_factor(config)
    return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x: Float[Array, "batch length heads head_dim"], by: Rotation) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the pairs (x[i], x[i + head_dim/2]): the half-split order of Llama checkpoints in Hugging Face form."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = by.cos[:, :, None, :], by.sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def frequencies(config: ModelConfig, lengths: Int[Array, " batch"]) -> Float[Array, "..."]:
    """Radians a position, float32: [half], or [batch, 1, half] where they depend on the lengths of the rows."""
    dim, theta, factor = config.head_dim, config.rope_theta, config.rope_factor
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    plain = theta**-exponents
    match config.rope_scaling:
        case "none":
            return plain
        case "linear":
            return plain / factor
        case "dynamic":
            original = config.rope_original_length
            length = jnp.maximum(lengths[:, None, None], original).astype(jnp.float32)
            stretched = factor * length / original - (factor - 1)
            return (theta * stretched ** (dim / (dim - 2))) ** -exponents
        case "yarn":
            return plain / factor + (plain - plain / factor) * _yarn_kept(config)
        case "llama3":
            return plain / factor + (plain - plain / factor) * _llama3_kept(config, plain)
        case unknown:
            raise ValueError(f"rope_scaling={unknown!r} is none of {ROPE_SCALINGS}")


def attention_factor(config: ModelConfig) -> float:
    """What cosine and sine are multiplied with (Peng et al. 2023, equation 22)."""
    if config.rope_scaling != "yarn":
        return 1.0
    return config.rope_attention_factor or 0.1 * math.log(max(config.rope_factor, 1.0)) + 1.0


def _yarn_kept(config: ModelConfig) -> Float[Array, " half"]:
    """How much of each frequency is kept: 1 the fast ones, 0 the slow ones."""

    def turning(turns: float) -> float:
        """The index of the frequency that makes so many turns in the original context."""
        return (
            config.head_dim
            * math.log(config.rope_original_length / (turns * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low = max(math.floor(turning(config.rope_beta_fast)), 0)
    high = min(math.ceil(turning(config.rope_beta_slow)), config.head_dim - 1)
    ramp = (jnp.arange(config.head_dim // 2, dtype=jnp.float32) - low) / max(high - low, 0.001)
    return 1 - jnp.clip(ramp, 0, 1)


def _llama3_kept(config: ModelConfig, plain: Float[Array, " half"]) -> Float[Array, " half"]:
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    turns = config.rope_original_length * plain / (2 * math.pi)
    return jnp.clip((turns - low) / (high - low), 0, 1)
