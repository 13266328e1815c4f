"""Causal attention of packed documents, by two backends that must agree.

`xla` is written here: a few blocks of queries, each against the keys up to its own end, so that the upper triangle is
never computed, with the softmax recomputed in the backward pass from its log-normaliser (Dao et al. 2022). `cudnn` is
NVIDIA's fused kernel; packed documents go in as offsets, which needs a Hopper GPU or later.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxllm.config import one_of
from jaxllm.errors import UserError
from jaxllm.layout.layout import Layout, chosen_layout, constrain, current_layout, on_each_device
from jaxllm.model.dropout import DropoutKey, keep_mask

BACKENDS = ("xla", "cudnn")
QUERY_AXES = ("batch", "length", "heads", "head_dim")
KEY_AXES = ("batch", "length", "kv_heads", "head_dim")
# Documents a row that the packed kernel is compiled for. More would be wrong, so they give NaN: never silently less.
MAX_DOCUMENTS = 128
MAX_QUERY_BLOCKS = 8
MIN_QUERY_BLOCK = 64
MASKED = -1e30  # a logit whose exponential is 0; not -inf, so that a row with nothing to attend stays finite


def choose_backend(name: str, platform: str, *, compute: str, dropout: float) -> str:
    """The backend that `config.layout.attention=name` means on a platform ("cpu", "gpu").

    Raises:
      UserError: an unknown name, or cudnn where it cannot run.
    """
    if name != "auto":
        one_of("config.layout.attention", name, ("auto", *BACKENDS))
    runs = platform == "gpu" and compute in ("bfloat16", "float16") and not dropout
    if name == "cudnn" and not runs:
        raise UserError(
            "config.layout.attention='cudnn' needs a GPU, bfloat16 or float16 compute and attention_dropout=0 "
            f"(here: {platform}, {compute}, {dropout}). Use 'xla' or 'auto'."
        )
    return ("cudnn" if runs else "xla") if name == "auto" else name


def causal_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"] | None,
    *,
    dropout_rate: float = 0.0,
    dropout_key: DropoutKey | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value over the earlier tokens of the same segment."""
    layout = chosen_layout()
    name = layout.attention if layout else "xla"
    dropout_rate = dropout_rate if dropout_key is not None else 0.0  # an evaluation drops nothing
    if name == "auto":
        name = choose_backend(name, jax.default_backend(), compute=query.dtype.name, dropout=dropout_rate)
    if layout and key.shape[2] % layout.size("heads"):  # fewer key heads than parts: each part gets those it needs
        repeats = query.shape[2] // key.shape[2]
        key, value = (constrain(jnp.repeat(a, repeats, axis=2), *QUERY_AXES) for a in (key, value))
    if name == "cudnn":
        return checkpoint_name(_cudnn(current_layout(), query, key, value, segment_ids), "attention")
    key_rows = dropout_key.rows if dropout_rate else None
    return _flash(dropout_rate, query, key, value, segment_ids, key_rows)


def cached_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch slots kv_heads head_dim"],
    value: Float[Array, "batch slots kv_heads head_dim"],
    query_segments: Int[Array, "batch length"],
    slot_segments: Int[Array, "batch slots"],
    first_slot: Int[Array, ""],
) -> Float[Array, "batch length heads head_dim"]:
    """Attention of new tokens, which lie in the slots from `first_slot` on, to all slots filled up to each."""
    batch, length, heads, head_dim = query.shape
    groups = heads // key.shape[2]
    grouped = query.reshape(batch, length, key.shape[2], groups, head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
    slots = jnp.arange(key.shape[1])
    visible = slots <= (first_slot + jnp.arange(length))[:, None]
    visible = visible & (query_segments[:, :, None] == slot_segments[:, None, :])
    logits = jnp.where(visible[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(query.shape)


# --- xla ---------------------------------------------------------------------------------------------------------


def query_blocks(length: int) -> list[tuple[int, int]]:
    """Start and end of the blocks of queries: a few, so that the program stays small."""
    size = max(MIN_QUERY_BLOCK, math.ceil(length / MAX_QUERY_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(dropout_rate, query, key, value, segment_ids, key_rows):
    return _flash_forward(dropout_rate, query, key, value, segment_ids, key_rows)[0]


# Inside, arrays are [batch, kv_heads, rows, …] where the rows of a block are its queries of every head of the group,
# group by group: batched matmuls of two plain matrices, whatever the grouping.


def _flash_forward(dropout_rate, query, key, value, segment_ids, key_rows):
    groups = query.shape[2] // key.shape[2]
    k, v = key.swapaxes(1, 2), value.swapaxes(1, 2)
    outputs, normalisers = [], []
    for start, end in query_blocks(query.shape[1]):
        q = _rows(query[:, start:end], groups)
        logits = _block_logits(q, k[:, :, :end], segment_ids, start, end)
        top = logits.max(-1, keepdims=True)
        exps = jnp.exp(logits - top)
        total = exps.sum(-1, keepdims=True)
        weights = _drop(exps, dropout_rate, key_rows, start, groups).astype(value.dtype)
        output = jnp.einsum("bkrs,bksh->bkrh", weights, v[:, :, :end], preferred_element_type=jnp.float32)
        outputs.append(_tokens((output / total).astype(query.dtype), groups))
        normalisers.append(top + jnp.log(total))
    output = checkpoint_name(jnp.concatenate(outputs, axis=1), "attention")
    output = constrain(output, *QUERY_AXES)
    log_z = tuple(checkpoint_name(z, "attention_statistics") for z in normalisers)
    return output, (query, key, value, segment_ids, key_rows, output, log_z)


def _flash_backward(dropout_rate, residuals, d_output):
    query, key, value, segment_ids, key_rows, output, log_z = residuals
    groups = query.shape[2] // key.shape[2]
    k, v = key.swapaxes(1, 2), value.swapaxes(1, 2)
    delta = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), -1, keepdims=True)
    d_query, d_key, d_value = [], [], []
    scale = 1 / math.sqrt(query.shape[-1])
    for (start, end), z in zip(query_blocks(query.shape[1]), log_z, strict=True):
        q, d_out, d_total = (_rows(a[:, start:end], groups) for a in (query, d_output, delta))
        weights = jnp.exp(_block_logits(q, k[:, :, :end], segment_ids, start, end) - z)
        d_weights = jnp.einsum("bkrh,bksh->bkrs", d_out, v[:, :, :end], preferred_element_type=jnp.float32)
        d_weights = _drop(d_weights, dropout_rate, key_rows, start, groups)
        d_logits = (weights * (d_weights - d_total) * scale).astype(q.dtype)
        dropped = _drop(weights, dropout_rate, key_rows, start, groups).astype(q.dtype)
        d_query.append(_tokens(jnp.einsum("bkrs,bksh->bkrh", d_logits, k[:, :, :end]), groups))
        d_key.append(jnp.einsum("bkrs,bkrh->bksh", d_logits, q, preferred_element_type=jnp.float32))
        d_value.append(jnp.einsum("bkrs,bkrh->bksh", dropped, d_out, preferred_element_type=jnp.float32))
    d_key, d_value = (_sum_prefixes(blocks).swapaxes(1, 2).astype(key.dtype) for blocks in (d_key, d_value))
    axes = QUERY_AXES if groups == 1 else KEY_AXES
    d_query = constrain(jnp.concatenate(d_query, axis=1), *QUERY_AXES)
    return d_query, constrain(d_key, *axes), constrain(d_value, *axes), None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _rows(x: Float[Array, "batch length heads size"], groups: int) -> Float[Array, "batch kv_heads rows size"]:
    batch, length, heads, size = x.shape
    x = x.reshape(batch, length, heads // groups, groups, size).transpose(0, 2, 3, 1, 4)
    return x.reshape(batch, heads // groups, groups * length, size)


def _tokens(x: Float[Array, "batch kv_heads rows size"], groups: int) -> Float[Array, "batch length heads size"]:
    batch, kv_heads, rows, size = x.shape
    x = x.reshape(batch, kv_heads, groups, rows // groups, size).transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, rows // groups, kv_heads * groups, size)


def _sum_prefixes(blocks: list[Array]) -> Array:
    """The sum of arrays of which each is longer than the one before along axis 2 and belongs at the start."""
    total = blocks[0]
    for block in blocks[1:]:
        known = total.shape[2]
        total = jnp.concatenate([block[:, :, :known] + total, block[:, :, known:]], axis=2)
    return total


def _block_logits(q: Array, k: Array, segment_ids: Array | None, start: int, end: int) -> Float[Array, "b k rows keys"]:
    logits = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    groups = q.shape[2] // (end - start)
    visible = (jnp.arange(start, end)[:, None] >= jnp.arange(end))[None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])
    return jnp.where(jnp.tile(visible, (1, groups, 1))[:, None], logits, MASKED)


def _drop(x: Array, rate: float, key_rows: Array | None, start: int, groups: int) -> Float[Array, "b k rows keys"]:
    """Dropout on a block of attention weights whose first query is number `start`."""
    if key_rows is None or rate == 0:
        return x
    batch, kv_heads, rows, keys = x.shape
    keep = keep_mask(DropoutKey(key_rows), (batch, rows // groups, kv_heads * groups, keys), rate, offset=start)
    return jnp.where(_rows(keep, groups), x / (1 - rate), 0)


# --- cudnn -------------------------------------------------------------------------------------------------------


def _cudnn(layout: Layout | None, query, key, value, segment_ids):
    """cuDNN attention on each device's rows and heads; its own partitioning rule does not hold in every context.

    Key heads are split as the query heads are, whatever the rules: each device needs those of its own query heads.
    """
    if layout is None:
        return _cudnn_local(query, key, value, segment_ids)
    heads, rows = layout.spec(("batch", None, "heads", None)), layout.spec(("batch", None))
    specs = (heads, heads, heads) if segment_ids is None else (heads, heads, heads, rows)
    local = jax.checkpoint(on_each_device(layout, _cudnn_local, specs, heads))  # no residuals of a nested shard_map
    return local(query, key, value) if segment_ids is None else local(query, key, value, segment_ids)


def _cudnn_local(query, key, value, segment_ids=None):
    if segment_ids is None:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
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
        mask_type=MaskType.PADDING_CAUSAL,
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
