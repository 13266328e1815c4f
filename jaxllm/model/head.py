"""The language-model head: logits, and the loss that never makes them all."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxllm.layout import vocabulary
from jaxllm.layout.layers import LayerSums
from jaxllm.layout.layout import constrain, current_layout, reshard
from jaxllm.layout.log_probs import TokenLogProbs, token_log_probs
from jaxllm.layout.scope import tensor_scope
from jaxllm.layout.sequence import to_device_order, to_text_order
from jaxllm.layout.zero import gather_for_use
from jaxllm.model.config import ModelConfig
from jaxllm.model.linear import Linear
from jaxllm.model.mlp import ACTIVATIONS
from jaxllm.model.names import name_of
from jaxllm.model.norms import Norm


class Mean(NamedTuple):
    """A metric as a sum and what to divide it by, so that those of a batch's parts add up."""

    total: Float[Array, ""]
    count: Float[Array, ""]


class Loss(NamedTuple):
    """A sum and what to divide it by. The shared machinery divides once, by the weight of the whole batch."""

    total: Float[Array, ""]
    weight: Float[Array, ""]
    statistics: dict[str, Array] | None = None  # further sums, by layer, of which metrics are made
    metrics: dict[str, Mean] | None = None  # what else is told of a step
    rows: Any = None  # what is said of each row, [batch, …]; only of what is run forward (train/forward.py)

    def plus(self, sums: LayerSums | None) -> "Loss":
        """With what the layers add."""
        if sums is None:
            return self
        return self._replace(total=self.total + sums.loss.sum(), statistics=sums.statistics)


class Table(nnx.Module):
    """A row of numbers a token: the embedding, and the head where it is not tied."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.embed_dim)
        values = config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.table = nnx.Param(values, axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "batch length"], dtype: jnp.dtype) -> Float[Array, "batch length embed"]:
        with tensor_scope(name_of(self.table), self.table.axes):
            return vocabulary.lookup(self.table[...], tokens, dtype)


class HeadTransform(nnx.Module):
    """norm(activation(dense(x))), what BERT does before its head (Devlin et al. 2019, in their code)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        shape, bias_axes = (config.embed_dim,) * 2, ("mlp",) if config.use_bias else None
        self.dense = Linear("btd,df->btf", ("embed", "mlp"), shape, bias_axes=bias_axes, std=config.init_std, rngs=rngs)
        self.norm = Norm(config)

    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        hidden = ACTIVATIONS[self.activation](self.dense(x))
        return self.norm(reshard(hidden, ("batch", "length", "embed"), ("batch", "length", "mlp")))


class HeadBias(nnx.Module):
    """A number a token, added to its logit."""

    def __init__(self, config: ModelConfig):
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), jnp.float32), axes=("vocab",))


class Head:
    """Predictions from the last activations with the table `table` (the embedding's, when tied)."""

    def __init__(self, table: nnx.Param, z_loss: float, bias: nnx.Param | None = None):
        self.table, self.z_loss, self.bias = table, z_loss, bias

    def logits(self, hidden: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
        """Float32 logits at every position, in text order: for generation and tests, not training."""
        hidden, layout = to_text_order(hidden), current_layout()
        table = gather_for_use(layout, self.table[...], self.table.axes).astype(hidden.dtype)
        logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
        if self.bias is not None:
            logits += gather_for_use(layout, self.bias[...], self.bias.axes).astype(jnp.float32)
        return constrain(logits, "batch", "length", "vocab")

    def next_token_loss(
        self,
        hidden: Float[Array, "batch length embed"],
        tokens: Int[Array, "batch length"],
        loss_mask: Bool[Array, "batch length"],
    ) -> Loss:
        """Summed cross-entropy, in nats, of the tokens where `loss_mask` is true, each from the position before it.

        `hidden` is in device order, as the model returns it; tokens and mask are in text order.
        """
        return self.token_loss(
            hidden, jnp.roll(tokens, -1, axis=1), jnp.roll(loss_mask, -1, axis=1).at[:, -1].set(False)
        )

    def token_loss(
        self,
        hidden: Float[Array, "batch length embed"],
        targets: Int[Array, "batch length"],
        loss_mask: Bool[Array, "batch length"],
    ) -> Loss:
        """Summed cross-entropy, in nats, of the targets where `loss_mask` is true, each from its own position."""
        weights = loss_mask.astype(jnp.float32)
        placed = to_device_order(targets), to_device_order(weights)
        bias = None if self.bias is None else self.bias[...]
        with tensor_scope(name_of(self.table), self.table.axes):
            total = vocabulary.cross_entropy(hidden, self.table[...], *placed, self.z_loss, bias=bias)
        return Loss(total, weights.sum())

    def log_probs(
        self,
        hidden: Float[Array, "batch length embed"],
        targets: Int[Array, "batch length"],
        *,
        temperature: float = 1.0,
        num_tokens: int | None = None,
    ) -> TokenLogProbs:
        """Of each target its log-probability where `hidden` predicts it, and the entropy there; all in device order.

        `where_predicted` brings what is said of tokens to the places that predict them.
        """
        bias = None if self.bias is None else self.bias[...]
        with tensor_scope(name_of(self.table), self.table.axes):
            return token_log_probs(
                hidden, self.table[...], targets, temperature=temperature, num_tokens=num_tokens, bias=bias
            )


def where_predicted(x: Shaped[Array, "batch length"]) -> Shaped[Array, "batch length"]:
    """What is said of each token, in text order, at the place before it, in device order: where it is predicted.

    Nothing is predicted in the last place: 0.
    """
    return to_device_order(jnp.roll(x, -1, axis=1).at[:, -1].set(jnp.zeros((), x.dtype)))


def where_written(x: Shaped[Array, "batch length"]) -> Shaped[Array, "batch length"]:
    """The other way round. Nothing predicts the first token: 0."""
    return jnp.roll(to_text_order(x), 1, axis=1).at[:, 0].set(0)
