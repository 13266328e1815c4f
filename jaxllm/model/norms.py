"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.layout.rules import RESIDUAL_AXES
from jaxllm.layout.scope import tensor_scope
from jaxllm.layout.weights import small_weight
from jaxllm.model.config import ModelConfig
from jaxllm.model.names import name_of


class Norm(nnx.Module):
    """Normalises the last axis, statistics in float32, then scales (and shifts, for LayerNorm with biases)."""

    def __init__(self, config: ModelConfig):
        self.is_layernorm = config.norm == "layernorm"
        self.epsilon = config.norm_epsilon
        self.scale = nnx.Param(jnp.ones((config.embed_dim,), jnp.float32), axes=("embed",))
        with_bias = self.is_layernorm and config.use_bias
        self.bias = nnx.Param(jnp.zeros((config.embed_dim,), jnp.float32), axes=("embed",)) if with_bias else None

    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        with tensor_scope("", RESIDUAL_AXES):
            y = x.astype(jnp.float32)
            if self.is_layernorm:
                y = y - y.mean(-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.epsilon)
            with tensor_scope(name_of(self.scale), self.scale.axes):
                y = y * small_weight(self.scale[...], self.scale.axes)
            if self.bias is not None:
                with tensor_scope(name_of(self.bias), self.bias.axes):
                    y = y + small_weight(self.bias[...], self.bias.axes)
        return y.astype(x.dtype)
