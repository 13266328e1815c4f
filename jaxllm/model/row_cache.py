"""A KV cache whose rows go their own ways: each has as many tokens as it has, the token at position p in slot p.

One array a layer, so that a step writes a few numbers in place and copies nothing. (The cache of model/cache.py, whose
rows fill their slots together, is one array for all layers.)
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.layout.layout import constrain
from jaxllm.model.attention_backends import MASKED
from jaxllm.model.attention_pattern import Pattern
from jaxllm.model.config import ModelConfig

AXES = ("batch", "kv_heads", None, "head_dim")


class RowLayerCache(NamedTuple):
    """One layer's keys and values. What a row has in slots after its newest token is never looked at."""

    keys: Float[Array, "batch kv_heads slots head_dim"]
    values: Float[Array, "batch kv_heads slots head_dim"]

    def extended(
        self,
        key: Float[Array, "batch length kv_heads head_dim"],
        value: Float[Array, "batch length kv_heads head_dim"],
        positions: Int[Array, "batch length"],
    ) -> "RowLayerCache":
        """With new tokens, which follow each other in their row."""
        first = positions[:, 0]
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=1))
        turned = (a.swapaxes(1, 2) for a in (key, value))
        return RowLayerCache(*(constrain(write(a, n, first), *AXES) for a, n in zip(self, turned, strict=True)))

    def attend(
        self,
        query: Float[Array, "batch length heads head_dim"],
        positions: Int[Array, "batch length"],
        pattern: Pattern,
    ) -> Float[Array, "batch length heads head_dim"]:
        """Attention of new tokens, which the cache has already, to those of their row up to each."""
        batch, length, heads, head_dim = query.shape
        kv_heads = self.keys.shape[1]
        grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
        logits = jnp.einsum("bkgth,bksh->bkgts", grouped, self.keys, preferred_element_type=jnp.float32)
        logits /= math.sqrt(head_dim)
        slots = jnp.arange(self.keys.shape[2])
        if pattern.alibi_heads:
            bias = jax.vmap(lambda mine: pattern.bias(jnp.arange(heads), mine, slots))(positions)
            logits += bias.reshape(batch, kv_heads, heads // kv_heads, length, -1)
        visible = pattern.visible(positions, slots)
        logits = jnp.where(visible[:, None, None], logits, MASKED)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.values.dtype)
        attended = jnp.einsum("bkgts,bksh->bkgth", weights, self.values)
        return attended.transpose(0, 3, 1, 2, 4).reshape(query.shape)


RowCache = tuple[RowLayerCache, ...]  # by layer


def empty_row_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> RowCache:
    """A cache for up to `slots` tokens a row."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    zeros = lambda: constrain(jnp.zeros(shape, dtype), *AXES)  # noqa: E731
    return tuple(RowLayerCache(zeros(), zeros()) for _ in range(config.num_layers))
