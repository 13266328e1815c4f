"""Attention of packed documents, by two backends that must agree.

`xla` is written here: a few blocks of queries, each against the keys it may see some of, so that the upper triangle is
never computed, with the softmax recomputed in the backward pass from its log-normaliser (Dao et al. 2022). `cudnn` is
NVIDIA's fused kernel (model/attention_cudnn.py). A sequence that is split over devices takes the same blocks as `xla`,
by layout/ring_attention.py.
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
from jaxllm.layout.layout import chosen_layout, constrain, current_layout, platform
from jaxllm.layout.ring_attention import Attended, Keys, OutputGradient, Queries, context_attention
from jaxllm.model.attention_cudnn import cudnn_attention
from jaxllm.model.attention_pattern import CAUSAL, Pattern
from jaxllm.model.dropout import DropoutKey, keep_mask

BACKENDS = ("xla", "cudnn")
QUERY_AXES = ("batch", "length", "heads", "head_dim")
KEY_AXES = ("batch", "length", "kv_heads", "head_dim")
MAX_QUERY_BLOCKS = 8
MIN_QUERY_BLOCK = 64
MASKED = -1e30  # a logit whose exponential is 0; not -inf, so that a row with nothing to attend stays finite


def choose_backend(
    name: str, platform: str, *, compute: str, dropout: float, context: int = 1, pattern: Pattern = CAUSAL
) -> str:
    """The backend that `config.layout.attention=name` means on a platform (`platform_of`).

    Args:
      context: into how many parts the sequence is split.
      pattern: cudnn is not used with ALiBi.

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
    if name == "cudnn" and pattern.alibi_heads:
        raise UserError("config.layout.attention='cudnn' has no ALiBi (config.model.positions). Use 'auto' or 'xla'.")
    fits = compute in ("bfloat16", "float16") and not dropout and context == 1 and not pattern.alibi_heads
    runs = platform == "gpu" and fits
    if name == "cudnn" and not runs:
        raise UserError(
            "config.layout.attention='cudnn' needs a GPU (Hopper or later: documents are packed), bfloat16 or float16 "
            f"compute and attention_dropout=0 (here: {platform}, {compute}, {dropout}). Use 'xla' or 'auto'."
        )
    return ("cudnn" if runs else "xla") if name == "auto" else name


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"] | None,
    pattern: Pattern = CAUSAL,
    *,
    dropout_rate: float = 0.0,
    dropout_key: DropoutKey | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim) + bias) value over the tokens of the same segment that `pattern` shows.

    Where the layout splits the sequence, all arguments and the result are in device order (layout/sequence.py).
    """
    layout = chosen_layout()
    name = layout.attention if layout else "xla"
    dropout_rate = dropout_rate if dropout_key is not None else 0.0  # an evaluation drops nothing
    if name == "auto":
        compute = query.dtype.name
        name = choose_backend(name, platform(), compute=compute, dropout=dropout_rate, pattern=pattern)
    if layout and key.shape[2] % layout.size("heads"):  # fewer key heads than parts: each part gets those it needs
        repeats = query.shape[2] // key.shape[2]
        key, value = (constrain(jnp.repeat(a, repeats, axis=2), *QUERY_AXES) for a in (key, value))
    key_rows = dropout_key.rows if dropout_key is not None and dropout_rate else None
    if layout and layout.size("length") > 1:
        return context_attention(layout, Blocks(dropout_rate, pattern), query, key, value, segment_ids, key_rows)
    if name == "cudnn":
        return checkpoint_name(cudnn_attention(current_layout(), pattern, query, key, value, segment_ids), "attention")
    return _flash(Blocks(dropout_rate, pattern), query, key, value, segment_ids, key_rows)


def cached_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch slots kv_heads head_dim"],
    value: Float[Array, "batch slots kv_heads head_dim"],
    query_segments: Int[Array, "batch length"],
    slot_segments: Int[Array, "batch slots"],
    first_slot: Int[Array, ""],
    pattern: Pattern = CAUSAL,
) -> Float[Array, "batch length heads head_dim"]:
    """Attention of new tokens, which lie in the slots from `first_slot` on, to the slots filled up to each."""
    batch, length, heads, head_dim = query.shape
    groups = heads // key.shape[2]
    grouped = query.reshape(batch, length, key.shape[2], groups, head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
    slots, mine = jnp.arange(key.shape[1]), first_slot + jnp.arange(length)
    if pattern.alibi_heads:
        bias = pattern.bias(jnp.arange(heads), mine, slots)
        logits += bias.reshape(key.shape[2], groups, length, -1)
    visible = pattern.visible(mine, slots) & (query_segments[:, :, None] == slot_segments[:, None, :])
    logits = jnp.where(visible[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(query.shape)


# --- xla ---------------------------------------------------------------------------------------------------------


def query_blocks(length: int) -> list[tuple[int, int]]:
    """Start and end of the blocks of queries: a few, so that the program stays small."""
    size = max(MIN_QUERY_BLOCK, math.ceil(length / MAX_QUERY_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(blocks, query, key, value, segment_ids, key_rows):
    return _flash_forward(blocks, query, key, value, segment_ids, key_rows)[0]


def _flash_forward(blocks, query, key, value, segment_ids, key_rows):
    queries, keys = _whole(query, key, value, segment_ids, key_rows)
    output, log_z = blocks.forward(queries, keys, aligned=True)
    output = constrain(checkpoint_name(output.astype(query.dtype), "attention"), *QUERY_AXES)
    log_z = checkpoint_name(log_z, "attention_statistics")
    return output, (query, key, value, segment_ids, key_rows, output, log_z)


def _flash_backward(blocks, residuals, d_output):
    query, key, value, segment_ids, key_rows, output, log_z = residuals
    queries, keys = _whole(query, key, value, segment_ids, key_rows)
    delta = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), -1)
    gradient = OutputGradient(d_output, log_z, delta)
    d_query, (d_key, d_value) = blocks.backward(queries, keys, gradient, aligned=True)
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
    pattern: Pattern = CAUSAL

    @property
    def causal(self) -> bool:
        return self.pattern.causal

    def forward(self, queries: Queries, keys: Keys, *, aligned: bool) -> Attended:
        # JAX moves out of a loop over layers what is the same in each, the masks: all of them, whole, in memory at
        # once. It leaves alone what is marked to be computed again.
        return jax.checkpoint(functools.partial(self._forward, aligned=aligned), prevent_cse=False)(queries, keys)

    def _forward(self, queries: Queries, keys: Keys, *, aligned: bool) -> Attended:
        outputs, normalisers = [], []
        groups = queries.query.shape[2] // keys.key.shape[2]
        for (start, end), (first, last) in self._blocks(queries, keys, aligned):
            block, seen = queries.part(start, end), keys.part(first, last)
            logits = self._logits(block, seen)
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
        self, queries: Queries, keys: Keys, gradient: OutputGradient, *, aligned: bool
    ) -> tuple[Array, tuple[Array, Array]]:
        groups, scale = queries.query.shape[2] // keys.key.shape[2], 1 / math.sqrt(queries.query.shape[3])
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_query, d_key, d_value = [], [], []
        for (start, end), (first, last) in self._blocks(queries, keys, aligned):
            seen = keys.part(first, last)
            block, (d_output, log_z, delta) = queries.part(start, end), gradient.part(start, end)
            q, d_out = _rows(block.query, groups), _rows(d_output, groups)
            z, d_total = (_rows(a[..., None], groups) for a in (log_z, delta))
            weights = jnp.exp(self._logits(block, seen) - z)
            d_weights = self._drop(einsum("bkrh,bksh->bkrs", d_out, seen.value.swapaxes(1, 2)), block, seen)
            d_logits = (weights * (d_weights - d_total) * scale).astype(q.dtype)
            dropped = self._drop(weights, block, seen).astype(q.dtype)
            d_query.append(_tokens(einsum("bkrs,bksh->bkrh", d_logits, seen.key.swapaxes(1, 2)), groups))
            d_key.append((first, einsum("bkrs,bkrh->bksh", d_logits, q)))
            d_value.append((first, einsum("bkrs,bkrh->bksh", dropped, d_out)))
        length = keys.key.shape[1]
        d_keys = tuple(_sum_parts(parts, length).swapaxes(1, 2) for parts in (d_key, d_value))
        return jnp.concatenate(d_query, axis=1), d_keys

    def _blocks(self, queries: Queries, keys: Keys, aligned: bool) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Start and end of each block of queries, and of the keys that it may see some of."""
        length = keys.key.shape[1]
        for start, end in query_blocks(queries.query.shape[1]):
            yield (start, end), self.pattern.keys_seen(start, end, length) if aligned else (0, length)

    def _logits(self, queries: Queries, keys: Keys) -> Float[Array, "batch kv_heads rows keys"]:
        kv_heads = keys.key.shape[2]
        groups = queries.query.shape[2] // kv_heads
        q, k = _rows(queries.query, groups), keys.key.swapaxes(1, 2)
        logits = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
        bias = self.pattern.bias(queries.heads, queries.indices, keys.indices)
        if bias is not None:
            logits += bias.reshape(kv_heads, -1, bias.shape[-1])
        visible = self.pattern.visible(queries.indices, keys.indices)
        visible = None if visible is None else visible[None]
        if queries.segment_ids is not None:
            same = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
            visible = same if visible is None else visible & same
        return logits if visible is None else jnp.where(jnp.tile(visible, (1, groups, 1))[:, None], logits, MASKED)

    def _drop(self, x: Float[Array, "batch kv_heads rows keys"], queries: Queries, keys: Keys) -> Array:
        """Dropout on attention weights or their gradients: an element's indices are (query, head, key)."""
        if queries.streams is None or self.dropout_rate == 0:
            return x
        indices = (queries.indices, queries.heads, keys.indices)
        keep = keep_mask(DropoutKey(queries.streams), indices, self.dropout_rate)
        return jnp.where(_rows(keep, queries.heads.size // x.shape[1]), x / (1 - self.dropout_rate), 0)


def _rows(x: Float[Array, "batch length heads size"], groups: int) -> Float[Array, "batch kv_heads rows size"]:
    batch, length, heads, size = x.shape
    x = x.reshape(batch, length, heads // groups, groups, size).transpose(0, 2, 3, 1, 4)
    return x.reshape(batch, heads // groups, groups * length, size)


def _tokens(x: Float[Array, "batch kv_heads rows size"], groups: int) -> Float[Array, "batch length heads size"]:
    batch, kv_heads, rows, size = x.shape
    x = x.reshape(batch, kv_heads, groups, rows // groups, size).transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, rows // groups, kv_heads * groups, size)


def _sum_parts(parts: list[tuple[int, Array]], length: int) -> Array:
    """The sum of arrays that belong at these starts of axis 2, which is `length` long."""
    if all(start == 0 for start, _ in parts):  # each longer than the one before: nothing is padded
        total = parts[0][1]
        for _, part in parts[1:]:
            known = total.shape[2]
            total = jnp.concatenate([part[:, :, :known] + total, part[:, :, known:]], axis=2)
        return total
    total = jnp.zeros((*parts[0][1].shape[:2], length, parts[0][1].shape[3]), jnp.float32)
    for start, part in parts:
        total = total.at[:, :, start : start + part.shape[2]].add(part)
    return total
