"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.layout.rules import RESIDUAL_AXES
from jaxllm.layout.scope import Axes, tensor_scope
from jaxllm.layout.weights import small_weight
from jaxllm.model.config import ModelConfig
from jaxllm.model.names import name_of


class Norm(nnx.Module):
    """Normalises the last axis, statistics in float32, then scales (and shifts, for LayerNorm with biases)."""

    def __init__(self, config: ModelConfig):
        self.is_layernorm, self.epsilon = config.norm == "layernorm", config.norm_epsilon
        self.activation_axes: Axes = RESIDUAL_AXES
        self.scale = nnx.Param(jnp.ones((config.embed_dim,), jnp.float32), axes=("embed",))
        with_bias = self.is_layernorm and config.use_bias
        self.bias = nnx.Param(jnp.zeros((config.embed_dim,), jnp.float32), axes=("embed",)) if with_bias else None

    def __call__(self, x: Float[Array, "batch length *heads width"]) -> Float[Array, "batch length *heads width"]:
        with tensor_scope("", self.activation_axes):
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


class HeadNorm(Norm):
    """RMSNorm of each head of a query or a key, all with one scale."""

    def __init__(self, config: ModelConfig, heads: str):
        self.is_layernorm, self.epsilon = False, config.norm_epsilon
        self.activation_axes = ("batch", "length", heads, "head_dim")
        self.scale = nnx.Param(jnp.ones((config.head_dim,), jnp.float32), axes=("head_dim",))
        self.bias = None
