"""Causal attention of packed documents, by two backends that must agree.

`xla` is written here: a few blocks of queries, each against the keys up to its own end, so that the upper triangle is
never computed, with the softmax recomputed in the backward pass from its log-normaliser (Dao et al. 2022). `cudnn` is
NVIDIA's fused kernel; packed documents go in as offsets, which needs a Hopper GPU or later. A sequence that is split
over devices takes the same blocks as `xla`, by layout/ring_attention.py.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxllm.config import one_of
from jaxllm.errors import UserError
from jaxllm.layout.layout import Layout, chosen_layout, constrain, current_layout, on_each_device
from jaxllm.layout.ring_attention import Attended, Keys, OutputGradient, Queries, context_attention
from jaxllm.model.dropout import DropoutKey, keep_mask

BACKENDS = ("xla", "cudnn")
QUERY_AXES = ("batch", "length", "heads", "head_dim")
KEY_AXES = ("batch", "length", "kv_heads", "head_dim")
# Documents a row that the packed kernel is compiled for. More would be wrong, so they give NaN: never silently less.
MAX_DOCUMENTS = 128
MAX_QUERY_BLOCKS = 8
MIN_QUERY_BLOCK = 64
MASKED = -1e30  # a logit whose exponential is 0; not -inf, so that a row with nothing to attend stays finite


def choose_backend(name: str, platform: str, *, compute: str, dropout: float, context: int = 1) -> str:
    """The backend that `config.layout.attention=name` means on a platform ("cpu", "gpu").

    Args:
      context: into how many parts the sequence is split.

    Raises:
      UserError: an unknown name, or cudnn where it cannot run.
    """
    if name != "auto":
        one_of("config.layout.attention", name, ("auto", *BACKENDS))
    if name == "cudnn" and context > 1:
        raise UserError(
            f"config.layout.attention='cudnn' does not attend over a sequence that is split in {context} "
            "(config.mesh.context). Use 'auto' or 'xla'."
        )
    runs = platform == "gpu" and compute in ("bfloat16", "float16") and not dropout and context == 1
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
    """softmax(query key^T / sqrt(head_dim)) value over the earlier tokens of the same segment.

    Where the layout splits the sequence, all arguments and the result are in device order (layout/sequence.py).
    """
    layout = chosen_layout()
    name = layout.attention if layout else "xla"
    dropout_rate = dropout_rate if dropout_key is not None else 0.0  # an evaluation drops nothing
    if name == "auto":
        name = choose_backend(name, jax.default_backend(), compute=query.dtype.name, dropout=dropout_rate)
    if layout and key.shape[2] % layout.size("heads"):  # fewer key heads than parts: each part gets those it needs
        repeats = query.shape[2] // key.shape[2]
        key, value = (constrain(jnp.repeat(a, repeats, axis=2), *QUERY_AXES) for a in (key, value))
    key_rows = dropout_key.rows if dropout_key is not None and dropout_rate else None
    if layout and layout.size("length") > 1:
        return context_attention(layout, Blocks(dropout_rate), query, key, value, segment_ids, key_rows)
    if name == "cudnn":
        return checkpoint_name(_cudnn(current_layout(), query, key, value, segment_ids), "attention")
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


def _flash_forward(dropout_rate, query, key, value, segment_ids, key_rows):
    queries, keys = _whole(query, key, value, segment_ids, key_rows)
    output, log_z = Blocks(dropout_rate).forward(queries, keys, causal=True)
    output = constrain(checkpoint_name(output.astype(query.dtype), "attention"), *QUERY_AXES)
    log_z = checkpoint_name(log_z, "attention_statistics")
    return output, (query, key, value, segment_ids, key_rows, output, log_z)


def _flash_backward(dropout_rate, residuals, d_output):
    query, key, value, segment_ids, key_rows, output, log_z = residuals
    queries, keys = _whole(query, key, value, segment_ids, key_rows)
    delta = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), -1)
    gradient = OutputGradient(d_output, log_z, delta)
    d_query, (d_key, d_value) = Blocks(dropout_rate).backward(queries, keys, gradient, causal=True)
    axes = QUERY_AXES if key.shape[2] == query.shape[2] else KEY_AXES
    d_query = constrain(d_query.astype(query.dtype), *QUERY_AXES)
    return d_query, *(constrain(d.astype(key.dtype), *axes) for d in (d_key, d_value)), None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _whole(query, key, value, segment_ids, key_rows) -> tuple[Queries, Keys]:
    """All of a text, in text order."""
    indices = jnp.arange(query.shape[1])
    queries = Queries(query, indices, segment_ids, jnp.arange(query.shape[2]), key_rows)
    return queries, Keys(key, value, indices, segment_ids)


@dataclass(frozen=True)
class Blocks:
    """Attention of queries to keys, both whole on the device or left to the partitioner, a part of the queries at once.

    It is the `BlockAttention` of layout/ring_attention.py. Inside, arrays are [batch, kv_heads, rows, …] where the rows
    are the queries of every head of the group, group by group: batched matmuls of two plain matrices, whatever the
    grouping.
    """

    dropout_rate: float

    def forward(self, queries: Queries, keys: Keys, *, causal: bool) -> Attended:
        # JAX moves out of a loop over layers what is the same in each, the masks: all of them, whole, in memory at
        # once. It leaves alone what is marked to be computed again.
        return jax.checkpoint(functools.partial(self._forward, causal=causal), prevent_cse=False)(queries, keys)

    def _forward(self, queries: Queries, keys: Keys, *, causal: bool) -> Attended:
        outputs, normalisers = [], []
        groups = queries.query.shape[2] // keys.key.shape[2]
        for (start, end), seen in _blocks(queries, keys, causal):
            block = queries.part(start, end)
            logits = _logits(block, seen)
            top = logits.max(-1, keepdims=True)
            exps = jnp.exp(logits - top)
            total = exps.sum(-1, keepdims=True)
            weights = self._drop(exps, block, seen).astype(seen.value.dtype)
            output = jnp.einsum(
                "bkrs,bksh->bkrh", weights, seen.value.swapaxes(1, 2), preferred_element_type=jnp.float32
            )
            outputs.append(_tokens(output / total, groups))
            normalisers.append(_tokens(top + jnp.log(total), groups)[..., 0])
        return Attended(jnp.concatenate(outputs, axis=1), jnp.concatenate(normalisers, axis=1))

    def backward(
        self, queries: Queries, keys: Keys, gradient: OutputGradient, *, causal: bool
    ) -> tuple[Array, tuple[Array, Array]]:
        groups, scale = queries.query.shape[2] // keys.key.shape[2], 1 / math.sqrt(queries.query.shape[3])
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_query, d_key, d_value = [], [], []
        for (start, end), seen in _blocks(queries, keys, causal):
            block, (d_output, log_z, delta) = queries.part(start, end), gradient.part(start, end)
            q, d_out = _rows(block.query, groups), _rows(d_output, groups)
            z, d_total = (_rows(a[..., None], groups) for a in (log_z, delta))
            weights = jnp.exp(_logits(block, seen) - z)
            d_weights = self._drop(einsum("bkrh,bksh->bkrs", d_out, seen.value.swapaxes(1, 2)), block, seen)
            d_logits = (weights * (d_weights - d_total) * scale).astype(q.dtype)
            dropped = self._drop(weights, block, seen).astype(q.dtype)
            d_query.append(_tokens(einsum("bkrs,bksh->bkrh", d_logits, seen.key.swapaxes(1, 2)), groups))
            d_key.append(einsum("bkrs,bkrh->bksh", d_logits, q))
            d_value.append(einsum("bkrs,bkrh->bksh", dropped, d_out))
        d_keys = tuple(_sum_prefixes(blocks).swapaxes(1, 2) for blocks in (d_key, d_value))
        return jnp.concatenate(d_query, axis=1), d_keys

    def _drop(self, x: Float[Array, "batch kv_heads rows keys"], queries: Queries, keys: Keys) -> Array:
        """Dropout on attention weights or their gradients: an element's indices are (query, head, key)."""
        if queries.streams is None or self.dropout_rate == 0:
            return x
        indices = (queries.indices, queries.heads, keys.indices)
        keep = keep_mask(DropoutKey(queries.streams), indices, self.dropout_rate)
        return jnp.where(_rows(keep, queries.heads.size // x.shape[1]), x / (1 - self.dropout_rate), 0)


def _blocks(queries: Queries, keys: Keys, causal: bool) -> Iterator[tuple[tuple[int, int], Keys]]:
    """Start and end of each block of queries, and the keys that it may see some of."""
    for start, end in query_blocks(queries.query.shape[1]):
        yield (start, end), keys.part(0, end) if causal else keys


def _logits(queries: Queries, keys: Keys) -> Float[Array, "batch kv_heads rows keys"]:
    groups = queries.query.shape[2] // keys.key.shape[2]
    q, k = _rows(queries.query, groups), keys.key.swapaxes(1, 2)
    logits = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    visible = (queries.indices[:, None] >= keys.indices)[None]
    if queries.segment_ids is not None:
        visible = visible & (queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :])
    return jnp.where(jnp.tile(visible, (1, groups, 1))[:, None], logits, MASKED)


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
