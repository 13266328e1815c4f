"""The log-probability of each token and the entropy of what it was one of, with the vocabulary over the mesh.

What reinforcement learning and preference losses are functions of. As in layout/vocabulary.py the logits exist a chunk
of the sequence at a time; here they are computed a second time in the backward pass, since what the loss makes of the
log-probabilities is not known in the first.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.layout.layout import Layout, current_layout, platform
from jaxllm.layout.vocabulary import Place, chunk_length


class TokenLogProbs(NamedTuple):
    """Of each token, float32, in nats."""

    log_probs: Float[Array, "batch length"]
    entropy: Float[Array, "batch length"]


class _Settings(NamedTuple):
    layout: Layout | None
    vocab_size: int
    num_tokens: int
    temperature: float
    table_dtype: str
    bias_dtype: str | None


def token_log_probs(
    hidden: Float[Array, "batch length embed"],
    table: Float[Array, "vocab embed"],
    targets: Int[Array, "batch length"],
    *,
    temperature: float = 1.0,
    num_tokens: int | None = None,
    bias: Float[Array, "vocab"] | None = None,
) -> TokenLogProbs:
    """log softmax(hidden @ table.T / temperature)[target], and the entropy of that softmax.

    Args:
      hidden: the last activations, any float dtype.
      table: the head, rows by token; matmuls are in the dtype of `hidden`.
      targets: token ids.
      num_tokens: rows of the table from here on are no tokens: they have no probability. Default: all are.
      bias: added to the logits before they are divided by the temperature.
    """
    settings = _Settings(
        layout=current_layout(),
        vocab_size=table.shape[0],
        num_tokens=num_tokens or table.shape[0],
        temperature=temperature,
        table_dtype=table.dtype.name,
        bias_dtype=None if bias is None else bias.dtype.name,
    )
    return TokenLogProbs(*_log_probs(settings, hidden, (table, bias), targets))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(settings: _Settings, hidden, head, targets):
    place, head, head_specs = _placed(settings, hidden, head)
    tokens = place.tokens_spec()

    def local(hidden, head, targets):
        def one_chunk(_, inputs):
            hidden, targets = inputs
            logits, log_z = _logits(place, settings, hidden, head)
            picked = place.sum_vocab(jnp.where(_is_target(place, logits, targets), logits, 0).sum(-1))
            return None, (picked - log_z, log_z - _mean_logit(place, logits, log_z))

        return _by_chunk(one_chunk, None, (hidden, targets), head[0].shape[0])[1]

    return place.run(local, (place.tokens_spec(None), head_specs, tokens), (tokens, tokens), hidden, head, targets)


def _forward(settings, hidden, head, targets):
    results = _log_probs(settings, hidden, head, targets)
    return results, (hidden, head, targets, results[1])


def _backward(settings, residuals, gradients):
    hidden, head, targets, entropy = residuals
    place, placed, head_specs = _placed(settings, hidden, head)
    tokens, acts = place.tokens_spec(), place.tokens_spec(None)

    def local(hidden, head, *per_token):
        return _local_gradients(place, settings, hidden, head, per_token)

    d_specs = (acts, (place.reduce_spec(hidden.shape[-1]), head_specs[1]))
    arguments = (hidden, placed, targets, entropy, *(g.astype(jnp.float32) for g in gradients))
    d_hidden, (d_table, d_bias) = place.run(local, (acts, head_specs, *[tokens] * 4), d_specs, *arguments)
    d_table = place.finish_table(d_table, jnp.dtype(settings.table_dtype))
    if d_bias is not None:
        d_bias = place.finish_bias(d_bias).astype(settings.bias_dtype)
    return d_hidden, (d_table, d_bias), None


_log_probs.defvjp(_forward, _backward)


def _local_gradients(place: Place, settings: _Settings, hidden, head, per_token: tuple[Array, ...]):
    """One device's gradients, for its tokens and for its rows of the head."""
    table, bias = head

    def one_chunk(carry, inputs):
        d_table, d_bias = carry
        hidden, targets, entropy, d_log_prob, d_entropy = inputs
        logits, log_z = _logits(place, settings, hidden, head)
        log_p = logits - log_z[..., None]
        p = jnp.exp(log_p)
        # dH/dz_j = -p_j (log p_j + H); a token without probability has a logit of -inf.
        d_logits = -p * d_log_prob[..., None]
        d_logits -= d_entropy[..., None] * jnp.where(p > 0, p * (log_p + entropy[..., None]), 0)
        d_logits += jnp.where(_is_target(place, logits, targets), d_log_prob[..., None], 0)
        d_logits /= settings.temperature
        d_bias = None if d_bias is None else d_bias + d_logits.sum((0, 1))
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("btv,vd->btd", d_logits, table, preferred_element_type=jnp.float32)
        d_table += jnp.einsum("btd,btv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return (d_table, d_bias), place.sum_vocab(d_hidden.astype(hidden.dtype))

    start = jnp.zeros(table.shape[::-1], jnp.float32), None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    (d_table, d_bias), d_hidden = _by_chunk(one_chunk, start, (hidden, *per_token), table.shape[0])
    if platform() == "cpu":  # as in layout/vocabulary.py
        (d_table,) = jax.lax.optimization_barrier((d_table,))
    return d_hidden, (place.reduce_table(d_table.T), None if bias is None else place.sum_tokens(d_bias))


def _placed(settings: _Settings, hidden, head) -> tuple[Place, tuple, tuple]:
    """Where the head lies, the head in the dtype of compute there, and its sharding."""
    place, (table, bias) = Place(settings.layout, settings.vocab_size), head
    placed = place.pad(table.astype(hidden.dtype)), None if bias is None else place.pad_bias(bias)
    return place, placed, (place.table_spec(), None if bias is None else place.bias_spec())


def _logits(place: Place, settings: _Settings, hidden, head) -> tuple[Array, Array]:
    """One device's float32 logits, divided by the temperature, and log(Z) over all devices."""
    table, bias = head
    logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)
    logits /= settings.temperature
    if place.padded_size > settings.num_tokens:
        logits = jnp.where(_rows(place, logits) < settings.num_tokens, logits, -jnp.inf)
    top = place.max_vocab(logits.max(-1))
    return logits, jnp.log(place.sum_vocab(jnp.exp(logits - top[..., None]).sum(-1))) + top


def _mean_logit(place: Place, logits: Array, log_z: Array) -> Array:
    p = jnp.exp(logits - log_z[..., None])
    return place.sum_vocab(jnp.where(p > 0, p * logits, 0).sum(-1))


def _rows(place: Place, logits: Array) -> Array:
    return place.first_row() + jnp.arange(logits.shape[-1])


def _is_target(place: Place, logits: Array, targets: Array) -> Array:
    return _rows(place, logits) == targets[..., None]


def _by_chunk(one_chunk, carry: Any, per_token: tuple[Array, ...], rows: int) -> tuple[Any, Any]:
    """`one_chunk` over the sequence, a chunk of tokens at a time: arrays [batch, length, …] in and out."""
    batch, length = per_token[0].shape[:2]
    chunk = chunk_length(batch, length, rows)
    if chunk == length:
        return one_chunk(carry, per_token)
    split = lambda a: a.reshape(batch, length // chunk, chunk, *a.shape[2:]).swapaxes(0, 1)  # noqa: E731
    whole = lambda a: a.swapaxes(0, 1).reshape(batch, length, *a.shape[3:])  # noqa: E731
    carry, results = jax.lax.scan(one_chunk, carry, jax.tree.map(split, per_token))
    return carry, jax.tree.map(whole, results)
