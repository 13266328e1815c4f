"""cuDNN's fused attention. Packed documents go in as offsets, which needs a Hopper GPU or later."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxllm.layout.layout import Layout, on_each_device
from jaxllm.model.attention_pattern import Pattern

# Documents a row that the packed kernel is compiled for. More would be wrong, so they give NaN: never silently less.
MAX_DOCUMENTS = 128


def cudnn_attention(layout: Layout | None, pattern: Pattern, query, key, value, segment_ids) -> Array:
    """cuDNN attention on each device's rows and heads; its own partitioning rule does not hold in every context.

    Key heads are split as the query heads are, whatever the rules: each device needs those of its own query heads.
    """
    local = functools.partial(_local, pattern)
    if layout is None:
        return local(query, key, value, segment_ids)
    heads, rows = layout.spec(("batch", None, "heads", None)), layout.spec(("batch", None))
    specs = (heads, heads, heads) if segment_ids is None else (heads, heads, heads, rows)
    local = jax.checkpoint(on_each_device(layout, local, specs, heads))  # no residuals of a nested shard_map
    return local(query, key, value) if segment_ids is None else local(query, key, value, segment_ids)


def _local(pattern: Pattern, query, key, value, segment_ids=None):
    if segment_ids is None:
        after = 0 if pattern.causal else pattern.window - 1
        window = (pattern.window - 1, after) if pattern.window else None
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=pattern.causal, local_window_size=window, implementation="cudnn"
        )
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    # The packed kernel takes its key stride from the query heads, so grouped keys are repeated.
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(a, repeats, axis=2) for a in (key, value))
    lengths, offsets, fits = document_offsets(segment_ids, MAX_DOCUMENTS)
    output = dot_product_attention(
        query,
        key,
        value,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=1 / math.sqrt(query.shape[-1]),
        mask_type=MaskType.PADDING_CAUSAL if pattern.causal else MaskType.PADDING,
        sliding_window_length=pattern.window or None,
    )
    return jnp.where(fits, output, jnp.nan)


def document_offsets(
    segment_ids: Int[Array, "batch length"], most: int
) -> tuple[Int[Array, "batch most"], Int[Array, "batch most+1"], Array]:
    """Lengths and offsets of each row's runs of equal segment ids, -1 where there are no more; and whether all fit."""
    batch, length = segment_ids.shape
    starts = jnp.concatenate([jnp.ones((batch, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    first = jax.vmap(lambda row: jnp.nonzero(row, size=most, fill_value=length)[0])(starts)
    after = jnp.concatenate([first[:, 1:], jnp.full((batch, 1), length)], axis=1)
    used = first < length
    lengths = jnp.where(used, after - first, -1).astype(jnp.int32)
    ends = jnp.where(used[:, -1:], length, -1)
    offsets = jnp.concatenate([jnp.where(used, first, -1), ends], axis=1)
    number = used.sum(1, keepdims=True)
    offsets = jnp.where(jnp.arange(most + 1) == number, length, offsets).astype(jnp.int32)
    return lengths, offsets, jnp.all(starts.sum(1) <= most)
