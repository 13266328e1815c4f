"""The language-model head: logits, and the loss that never makes them all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxllm.layout import vocabulary
from jaxllm.layout.layout import constrain, current_layout
from jaxllm.layout.scope import tensor_scope
from jaxllm.layout.sequence import to_device_order, to_text_order
from jaxllm.layout.zero import gather_for_use
from jaxllm.model.config import ModelConfig
from jaxllm.model.names import name_of


class Loss(NamedTuple):
    """A sum and what to divide it by. The shared machinery divides once, by the weight of the whole batch."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


class Table(nnx.Module):
    """A row of numbers a token: the embedding, and the head where it is not tied."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.embed_dim)
        values = config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.table = nnx.Param(values, axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "batch length"], dtype: jnp.dtype) -> Float[Array, "batch length embed"]:
        with tensor_scope(name_of(self.table), self.table.axes):
            return vocabulary.lookup(self.table[...], tokens, dtype)


class Head:
    """Predictions from the last activations with the table `table` (the embedding's, when tied)."""

    def __init__(self, table: nnx.Param, z_loss: float):
        self.table, self.z_loss = table, z_loss

    def logits(self, hidden: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
        """Float32 logits of the next token at every position, in text order: for generation and tests, not training."""
        hidden = to_text_order(hidden)
        table = gather_for_use(current_layout(), self.table[...], self.table.axes).astype(hidden.dtype)
        logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
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
        targets = jnp.roll(tokens, -1, axis=1)
        weights = jnp.roll(loss_mask, -1, axis=1).at[:, -1].set(False).astype(jnp.float32)
        placed = to_device_order(targets), to_device_order(weights)
        with tensor_scope(name_of(self.table), self.table.axes):
            total = vocabulary.cross_entropy(hidden, self.table[...], *placed, self.z_loss)
        return Loss(total, weights.sum())
