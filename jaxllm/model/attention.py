"""Self-attention: MHA, GQA (Ainslie et al. 2023) and MQA (Shazeer 2019) are one thing with num_kv_heads."""

import math
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layout.layout import constrain
from jaxllm.layout.scope import tensor_scope
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.attention_backends import QUERY_AXES, attend, cached_attention
from jaxllm.model.attention_pattern import pattern_of
from jaxllm.model.config import ModelConfig
from jaxllm.model.dropout import DropoutKey
from jaxllm.model.linear import Linear, apply_together
from jaxllm.model.norms import HeadNorm
from jaxllm.model.prompts import Prefix, Prefixed
from jaxllm.model.rope import Rotation, rotate
from jaxllm.model.row_cache import RowLayerCache


class LayerCache(NamedTuple):
    """One layer's part of a KV cache (model/cache.py)."""

    keys: Float[Array, "batch slots kv_heads head_dim"]
    values: Float[Array, "batch slots kv_heads head_dim"]


class CacheSlots(NamedTuple):
    """What the layers of a KV cache share: the segment of every slot, new tokens included, and where those begin."""

    segment_ids: Int[Array, "batch slots"]
    first: Int[Array, ""]


class Attention(nnx.Module):
    """Projections around attention."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dropout_rate, self.pattern = config.attention_dropout, pattern_of(config)
        embed, head_dim = config.embed_dim, config.head_dim

        def project(heads: str, num_heads: int) -> Linear:
            bias_axes = (heads, "head_dim") if config.use_bias or config.qkv_bias else None
            axes, shape = ("embed", heads, "head_dim"), (embed, num_heads, head_dim)
            return Linear("btd,dnh->btnh", axes, shape, bias_axes=bias_axes, std=config.init_std, rngs=rngs)

        self.query = project("heads", config.num_heads)
        self.key = project("kv_heads", config.num_kv_heads)
        self.value = project("kv_heads", config.num_kv_heads)
        self.query_norm = HeadNorm(config, "heads") if config.qk_norm else None
        self.key_norm = HeadNorm(config, "kv_heads") if config.qk_norm else None
        self.out = Linear(
            "btnh,nhd->btd",
            ("heads", "head_dim", "embed"),
            (config.num_heads, head_dim, embed),
            bias_axes=("embed",) if config.use_bias else None,
            std=config.init_std / math.sqrt(2 * config.num_layers),  # Radford et al. 2019, section 2.3
            rngs=rngs,
        )
        self.prefix = nnx.data(None)

    def adapt(self, model: ModelConfig, adapter: AdapterConfig, rngs: nnx.Rngs) -> None:
        """Puts a prefix before every document."""
        self.prefix = Prefix(model, adapter, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        segment_ids: Int[Array, "batch length"] | None,
        rotation: Rotation | None,
        *,
        dropout: DropoutKey | None = None,
        cache: LayerCache | RowLayerCache | None = None,
        slots: CacheSlots | Int[Array, "batch length"] | None = None,
        prefixed: Prefixed | None = None,
    ) -> tuple[Float[Array, "batch length embed"], LayerCache | RowLayerCache | None]:
        """Args: slots: of a `RowLayerCache` the positions of the tokens."""
        query, key, value = apply_together(x, [self.query, self.key, self.value], dropout)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if self.prefix is not None:
            key, value = self.prefix(key, value, prefixed)
        query = constrain(query, "batch", "length", "heads", "head_dim")
        key, value = (constrain(a, "batch", "length", "kv_heads", "head_dim") for a in (key, value))
        if cache is None:
            rate, stream = self.dropout_rate, dropout.fold("attention") if dropout else None
            with tensor_scope("", QUERY_AXES):
                output = attend(query, key, value, segment_ids, self.pattern, dropout_rate=rate, dropout_key=stream)
        elif isinstance(cache, RowLayerCache):
            cache = cache.extended(key, value, slots)
            output = cache.attend(query, slots, self.pattern)
        else:
            write = lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, slots.first, axis=1)  # noqa: E731
            cache = LayerCache(write(cache.keys, key), write(cache.values, value))
            seen = (cache.keys, cache.values, segment_ids, slots.segment_ids, slots.first)
            output = cached_attention(query, *seen, self.pattern)
        return self.out(output, dropout), cache
