"""The vocabulary over the mesh: embedding lookup and cross-entropy with the table split by rows (Shoeybi et al. 2019).

Both are written out for one device's shard and run under `shard_map`, so that the traffic is what the page says: the
lookup sums one activation over the vocabulary's mesh axes; the loss sums three numbers a token. A vocabulary that those
axes do not divide is padded with rows that no token has and that no probability reaches.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxllm.layout import zero
from jaxllm.layout.layout import Axes, Layout, axis_names, current_layout, on_each_device, pin, platform

TABLE = ("vocab", "embed")
# Float32 logits that a device holds at a time while it computes the loss.
LOGITS_BYTES = 2**28


def weight_dtype(axes: Sequence[str | None], compute: jnp.dtype) -> jnp.dtype:
    """The dtype in which a train step holds a weight: that of compute, but in float16 a table is float32.

    A gradient has the dtype of its weight. That of a row is a sum over tokens: with a loss scale that the gradients of
    single tokens need, it would not fit float16.
    """
    return jnp.dtype("float32") if compute == jnp.float16 and "vocab" in axes else compute


class Place:
    """What one device needs to know: the mesh axes of the vocabulary and of the batch, and its rows of the table.

    Args:
      axes: of the table. What is said of a vocabulary holds for whatever its rows are, the positions of tokens too.
    """

    def __init__(self, layout: Layout | None, vocab_size: int, axes: Axes = TABLE):
        self.layout, self.vocab_size, self.axes = layout, vocab_size, axes
        if layout:
            layout.spec(("batch", "length", axes[0]))  # refuses a mesh axis that splits tokens and vocabulary alike
        self.vocab_axes = layout.mesh_axes(axes[0]) if layout else ()
        self.batch_axes = layout.mesh_axes("batch") if layout else ()
        self.length_axes = layout.mesh_axes("length") if layout else ()
        self.token_axes = (*self.batch_axes, *self.length_axes)
        shards = layout.size(axes[0]) if layout else 1
        self.padded_size = math.ceil(vocab_size / shards) * shards
        self.rows = self.padded_size // shards

    def first_row(self) -> Array | int:
        return jax.lax.axis_index(self.vocab_axes) * self.rows if self.vocab_axes else 0

    def table_spec(self) -> P:
        return P(self.vocab_axes or None, None)

    def tokens_spec(self, *rest: None) -> P:
        return P(self.batch_axes or None, self.length_axes or None, *rest)

    def bias_spec(self) -> P:
        return P(self.vocab_axes or None)

    def sum_tokens(self, x: Array) -> Array:
        return jax.lax.psum(x, self.token_axes) if self.token_axes else x

    def sum_vocab(self, x: Array) -> Array:
        return jax.lax.psum(x, self.vocab_axes) if self.vocab_axes else x

    def max_vocab(self, x: Array) -> Array:
        return jax.lax.pmax(x, self.vocab_axes) if self.vocab_axes else x

    def run(self, local: Callable, in_specs: Any, out_specs: Any, *args: Array) -> Any:
        return on_each_device(self.layout, local, in_specs, out_specs)(*args)

    def pad(self, table: Array) -> Array:
        """The table whole but for its vocabulary, with rows added until the vocabulary's mesh axes divide it."""
        if self.padded_size > self.vocab_size:
            if self.layout is not None and zero.is_gathered_at_use(self.layout, self.axes, table.shape):
                # At rest its columns are split, over the vocabulary's mesh axes too. Those of each device are gathered
                # first, so that XLA finds its way from columns to rows: by an all-to-all. On CPUs that is permutes,
                # which every device must meet: a pipeline's first stage, alone with it, gathers the whole table.
                alone = "pipeline" in self.layout.manual and platform() == "cpu"
                table = pin(table, self.layout, P() if alone else self._split_columns(table.shape))
            table = jnp.pad(table, ((0, self.padded_size - self.vocab_size), (0, 0)))
        return table if self.layout is None else pin(table, self.layout, self.table_spec())

    def _split_columns(self, shape: tuple[int, ...]) -> P:
        """Where the table lies at rest but for what ZeRO has spread of it."""
        at_rest = [axis_names(part) for part in zero.state_spec(self.layout, self.axes, shape)]
        return P(*[tuple(axis for axis in part if axis in self.vocab_axes) or None for part in at_rest])

    def reduce_spec(self, embed_dim: int) -> P:
        """Where the gradient of the padded table is reduced to: as `zero.gradient_spec` says, where it can be reached.

        Summing over tokens can scatter over the mesh axes that split tokens; others come later, in `finish_table`.
        """
        if self.layout is None:
            return P(None, None)
        shape = (self.padded_size, embed_dim)
        return zero.scattered_spec(self.layout, self.axes, shape, self.table_spec(), self.token_axes)

    def reduce_table(self, gradient: Array) -> Array:
        """Sums a device's gradient of its rows over all devices that hold other tokens."""
        return zero.sum_scattered(gradient, self.reduce_spec(gradient.shape[1]), self.token_axes)

    def pad_bias(self, bias: Array) -> Array:
        """A bias of the logits as `pad` makes a table."""
        bias = jnp.pad(bias, (0, self.padded_size - self.vocab_size))
        return bias if self.layout is None else pin(bias, self.layout, self.bias_spec())

    def finish_bias(self, gradient: Array) -> Array:
        """Its gradient, as that of the bias itself."""
        return zero.reduce_gradient(self.layout, gradient[: self.vocab_size], ("vocab",), jnp.float32)

    def finish_table(self, gradient: Array, dtype: jnp.dtype) -> Array:
        """The padded table's gradient as that of the table itself."""
        return zero.reduce_gradient(self.layout, gradient[: self.vocab_size], self.axes, dtype)


def lookup(
    table: Float[Array, "vocab embed"], tokens: Int[Array, "batch length"], dtype: jnp.dtype, axes: Axes = TABLE
) -> Float[Array, "batch length embed"]:
    """Rows of a table of logical `axes`, in `dtype`. Token ids, or what else counts the rows, must lie in the table."""
    what = (jnp.dtype(dtype).name, table.shape[0], table.dtype.name, axes)
    return _lookup(current_layout(), *what, table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _lookup(layout, dtype, vocab_size, table_dtype, axes, table, tokens):
    place = Place(layout, vocab_size, axes)

    def local(table, tokens):
        row = tokens - place.first_row()
        if not place.vocab_axes:
            return table[row].astype(dtype)
        found = (row >= 0) & (row < place.rows)
        picked = jnp.where(found[..., None], table[jnp.where(found, row, 0)], 0).astype(dtype)
        return place.sum_vocab(picked)

    specs = (place.table_spec(), place.tokens_spec())
    return place.run(local, specs, place.tokens_spec(None), place.pad(table), tokens)


def _lookup_forward(layout, dtype, vocab_size, table_dtype, axes, table, tokens):
    return _lookup(layout, dtype, vocab_size, table_dtype, axes, table, tokens), tokens


def _lookup_backward(layout, dtype, vocab_size, table_dtype, axes, tokens, gradient):
    place = Place(layout, vocab_size, axes)

    def local(gradient, tokens):
        row = tokens - place.first_row()
        row = jnp.where((row >= 0) & (row < place.rows), row, place.rows)  # out of bounds: dropped
        zeros = jnp.zeros((place.rows, gradient.shape[-1]), jnp.float32)
        return place.reduce_table(zeros.at[row].add(gradient.astype(jnp.float32), mode="drop"))

    specs = (place.tokens_spec(None), place.tokens_spec())
    d_table = place.run(local, specs, place.reduce_spec(gradient.shape[-1]), gradient, tokens)
    return place.finish_table(d_table, jnp.dtype(table_dtype)), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def cross_entropy(
    hidden: Float[Array, "batch length embed"],
    table: Float[Array, "vocab embed"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    z_loss: float = 0.0,
    *,
    bias: Float[Array, "vocab"] | None = None,
) -> Float[Array, ""]:
    """Sum over tokens of weight * (-log softmax(hidden @ table.T)[target] + z_loss * log(Z)^2), in float32.

    The logits are computed a chunk of the sequence at a time, and the gradients in the same pass as the loss, so that
    `[batch, length, vocab]` never exists and no logit is computed twice. z-loss: Chowdhery et al. 2022
    (PaLM), section 5.

    Args:
      hidden: the last activations, any float dtype.
      table: the head, rows by token; matmuls are in the dtype of `hidden`.
      targets: token ids.
      weights: float32; 0 leaves a token out.
      bias: added to the logits.
    """
    dtypes = (table.dtype.name, None if bias is None else bias.dtype.name)
    return _cross_entropy(current_layout(), table.shape[0], dtypes, z_loss, hidden, (table, bias), targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _cross_entropy(layout, vocab_size, dtypes, z_loss, hidden, head, targets, weights):
    return _run_loss(layout, vocab_size, z_loss, hidden, head, targets, weights, gradients=False)[0]


def _cross_entropy_forward(layout, vocab_size, dtypes, z_loss, hidden, head, targets, weights):
    loss, *gradients = _run_loss(layout, vocab_size, z_loss, hidden, head, targets, weights, gradients=True)
    return loss, gradients


def _cross_entropy_backward(layout, vocab_size, dtypes, z_loss, residuals, gradient):
    # The head's in float32: sums over tokens, which float16 may hold only once they are scaled.
    d_hidden, (d_table, d_bias) = residuals
    scale = lambda d, dtype: (d.astype(jnp.float32) * gradient).astype(dtype)  # noqa: E731
    d_head = scale(d_table, dtypes[0]), None if d_bias is None else scale(d_bias, dtypes[1])
    return scale(d_hidden, d_hidden.dtype), d_head, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _run_loss(layout, vocab_size, z_loss, hidden, head, targets, weights, *, gradients: bool):
    place, (table, bias) = Place(layout, vocab_size), head

    def local(hidden, head, targets, weights):
        return _local_loss(place, z_loss, hidden, head, targets, weights, gradients)

    tokens, of_bias = place.tokens_spec(), None if bias is None else place.bias_spec()
    specs = (place.tokens_spec(None), (place.table_spec(), of_bias), tokens, tokens)
    d_specs = (place.tokens_spec(None), (place.reduce_spec(hidden.shape[-1]), of_bias)) if gradients else (None, None)
    head = place.pad(table.astype(hidden.dtype)), None if bias is None else place.pad_bias(bias)
    loss, d_hidden, d_head = place.run(local, specs, (P(), *d_specs), hidden, head, targets, weights)
    if gradients:
        d_table, d_bias = d_head
        d_head = place.finish_table(d_table, jnp.float32), None if bias is None else place.finish_bias(d_bias)
    return loss, d_hidden, d_head


def _local_loss(place: Place, z_loss: float, hidden, head, targets, weights, gradients: bool):
    """The loss of one device's tokens, with gradients for its tokens and for its rows of the head."""
    table, bias = head
    batch, length, embed = hidden.shape
    chunk = chunk_length(batch, length, table.shape[0])
    rows = place.first_row() + jnp.arange(table.shape[0])

    def one_chunk(carry, inputs):
        loss, d_table, d_bias = carry
        hidden, targets, weights = inputs
        logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
        if bias is not None:
            logits += bias.astype(jnp.float32)
        if place.padded_size > place.vocab_size:
            logits = jnp.where(rows < place.vocab_size, logits, -jnp.inf)
        top = place.max_vocab(logits.max(-1, keepdims=True))
        exps = jnp.exp(logits - top)
        total = place.sum_vocab(exps.sum(-1, keepdims=True))
        is_target = rows == targets[..., None]
        log_z = (jnp.log(total) + top)[..., 0]
        target_logit = place.sum_vocab(jnp.where(is_target, logits, 0).sum(-1))
        loss += jnp.sum(weights * (log_z - target_logit + z_loss * log_z**2))
        if not gradients:
            return (loss, d_table, d_bias), None
        scale = weights * (1 + 2 * z_loss * log_z)
        d_logits = exps * (scale[..., None] / total) - jnp.where(is_target, weights[..., None], 0)
        d_bias = None if bias is None else d_bias + d_logits.sum((0, 1))
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("btv,vd->btd", d_logits, table, preferred_element_type=jnp.float32)
        d_table += jnp.einsum("btd,btv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return (loss, d_table, d_bias), place.sum_vocab(d_hidden.astype(hidden.dtype))

    zeros = lambda shape: jnp.zeros(shape, jnp.float32) if gradients else None  # noqa: E731
    start = (jnp.zeros((), jnp.float32), zeros(table.shape[::-1]), None if bias is None else zeros(bias.shape))
    split = lambda a: a.reshape(batch, length // chunk, chunk, *a.shape[2:]).swapaxes(0, 1)  # noqa: E731
    if chunk == length:
        (loss, d_table, d_bias), d_hidden = one_chunk(start, (hidden, targets, weights))
    else:
        (loss, d_table, d_bias), d_hidden = jax.lax.scan(
            one_chunk, start, (split(hidden), split(targets), split(weights))
        )
    loss = place.sum_tokens(loss)
    if not gradients:
        return loss, None, None
    if chunk < length:
        d_hidden = d_hidden.swapaxes(0, 1).reshape(batch, length, embed)
    if platform() == "cpu":
        # Keeps XLA from swapping the factors of d_table: its CPU backend transposes the first, which is the narrow one.
        (d_table,) = jax.lax.optimization_barrier((d_table,))
    return loss, d_hidden, (place.reduce_table(d_table.T), None if bias is None else place.sum_tokens(d_bias))


def chunk_length(batch: int, length: int, vocab: int) -> int:
    """The longest divisor of `length` whose logits fit in LOGITS_BYTES."""
    limit = max(1, LOGITS_BYTES // (4 * batch * vocab))
    return max(chunk for chunk in range(1, length + 1) if length % chunk == 0 and chunk <= max(limit, 1))
