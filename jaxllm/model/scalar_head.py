"""The scalar head: a number for each token, of all that the model has seen up to it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.layout.scope import tensor_scope
from jaxllm.layout.weights import small_weight
from jaxllm.model.adapters import AddedParam
from jaxllm.model.config import ModelConfig
from jaxllm.model.names import name_of


class ScalarHead(nnx.Module):
    """hidden @ kernel, in float32: the score of a reward model at the end of a text, the values of a critic.

    Without a bias, like the `score` of transformers' sequence classifiers. It starts from a normal of standard
    deviation 1 / sqrt(embed_dim + 1) (Stiennon et al. 2020).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        std = (config.embed_dim + 1) ** -0.5
        values = std * jax.random.normal(rngs.score(), (config.embed_dim,), jnp.float32)
        self.kernel = AddedParam(values, axes=("embed",))

    def __call__(self, hidden: Float[Array, "batch length embed"]) -> Float[Array, "batch length"]:
        with tensor_scope(name_of(self.kernel), self.kernel.axes):
            kernel = small_weight(self.kernel[...], self.kernel.axes)
            return (hidden.astype(jnp.float32) * kernel).sum(-1)
