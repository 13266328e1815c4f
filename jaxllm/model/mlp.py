"""The feed-forward half of a block: plain, or gated (Shazeer 2020; with silu it is SwiGLU)."""

import math
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.layout.layout import constrain
from jaxllm.model.config import ModelConfig
from jaxllm.model.dropout import DropoutKey
from jaxllm.model.linear import Linear, apply_together

ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """`down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        embed, hidden = config.embed_dim, config.mlp_dim
        bias = config.use_bias
        self.activation = config.activation

        def widen() -> Linear:
            bias_axes = ("mlp",) if bias else None
            axes, shape = ("embed", "mlp"), (embed, hidden)
            return Linear("btd,df->btf", axes, shape, bias_axes=bias_axes, std=config.init_std, rngs=rngs)

        self.gate = widen() if config.gated_mlp else None
        self.up = widen()
        self.down = Linear(
            "btf,fd->btd",
            ("mlp", "embed"),
            (hidden, embed),
            bias_axes=("embed",) if bias else None,
            std=config.init_std / math.sqrt(2 * config.num_layers),  # Radford et al. 2019, section 2.3
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "batch length embed"], stream: DropoutKey | None = None
    ) -> Float[Array, "batch length embed"]:
        activate = ACTIVATIONS[self.activation]
        if self.gate is None:
            hidden = activate(self.up(x, stream))
        else:
            gate, up = apply_together(x, [self.gate, self.up], stream)
            hidden = activate(gate) * up
        return self.down(constrain(hidden, "batch", "length", "mlp"), stream)
