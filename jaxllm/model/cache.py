"""The KV cache: what attention has seen, a slot a token."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.layout.layout import constrain
from jaxllm.model.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values so far. All rows fill their slots together; slots of segment 0 are never attended."""

    keys: Float[Array, "layers batch slots kv_heads head_dim"]
    values: Float[Array, "layers batch slots kv_heads head_dim"]
    segment_ids: Int[Array, "batch slots"]
    filled: Int[Array, ""]  # slots in use


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """A cache for `slots` tokens a row, laid out like the keys of the layout in use."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    zeros = constrain(jnp.zeros(shape, dtype), "layers", "batch", None, "kv_heads", "head_dim")
    return KVCache(zeros, zeros, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))
