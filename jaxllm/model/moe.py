"""Mixture of experts: each token goes to a few of many feed-forward networks (Shazeer et al. 2017; Jiang et al. 2024).

The load-balancing loss is that of Switch (Fedus et al. 2022, equation 4), taken over each row of the batch and not over
the batch: E * sum over experts of (choices a token) * (mean probability), which is k where all is even; the mean over
rows and layers. A mean over rows is the same number whatever the layout and the microbatches; one over the batch is
not. Rows weigh as many as the tokens that are to be predicted in them, as in the loss that this one is added to.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxllm.layout.experts import Dispatch, run_experts
from jaxllm.layout.layers import LayerSums
from jaxllm.layout.layout import constrain, current_layout
from jaxllm.layout.nf4 import NF4
from jaxllm.layout.scope import tensor_scope
from jaxllm.layout.weights import small_weight, whole_weight
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.adapters import LoRA
from jaxllm.model.config import ModelConfig
from jaxllm.model.mlp import ACTIVATIONS
from jaxllm.model.names import name_of

Statistics = dict[str, Float[Array, "..."]]


class Kernel(nnx.Module):
    """A matrix, or one for each expert."""

    def __init__(self, axes: tuple[str, ...], shape: tuple[int, ...], std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)
        self.lora = nnx.data(None)

    def adapt(self, config: AdapterConfig, rngs: nnx.Rngs) -> None:
        """Puts a LoRA beside each expert's matrix."""
        self.lora = LoRA(self.kernel.axes, self.kernel.shape, 1, config, rngs=rngs)

    @property
    def is_derived(self) -> bool:
        """True where the matrices to multiply with are made of what is held: of 4 bits, or with an adapter."""
        return self.lora is not None or isinstance(self.kernel[...], NF4)

    def matrices(self, dtype: jnp.dtype) -> Float[Array, "..."]:
        """The matrices to multiply with."""
        if self.lora is not None:
            return self.lora.merged(self.kernel)
        if self.is_derived:
            return whole_weight(current_layout(), self.kernel[...], self.kernel.axes, dtype)
        return self.kernel[...]


class MoE(nnx.Module):
    """Sum over a token's experts of probability * down(activation(gate x) * up x), or without the gate."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        experts, embed, hidden = config.num_experts, config.embed_dim, config.mlp_dim
        self.router = Kernel(("embed", None), (embed, experts), config.init_std, rngs)
        widen, narrow = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        self.gate = Kernel(widen, (experts, embed, hidden), config.init_std, rngs) if config.gated_mlp else None
        self.up = Kernel(widen, (experts, embed, hidden), config.init_std, rngs)
        down_std = config.init_std / math.sqrt(2 * config.num_layers)  # Radford et al. 2019, section 2.3
        self.down = Kernel(narrow, (experts, hidden, embed), down_std, rngs)
        self.dispatch = Dispatch(experts, config.capacity_factor, config.expert_dispatch == "dropless")

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        segment_ids: Int[Array, "batch length"] | None,
        predicted: Float[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch length embed"], LayerSums]:
        """Also returns the router's losses and what it did, summed over the tokens that are not padding.

        Args:
          predicted: how many tokens of each row are to be predicted; default all.
        """
        config = self.config
        # In float32: bfloat16 has 8 bits, and experts are often closer than that (Fedus et al. 2022, section 2.4).
        kernel = self.router.kernel
        with tensor_scope(name_of(kernel), kernel.axes, ("batch", "length")):
            router = small_weight(kernel[...], kernel.axes)
            logits = constrain(jnp.einsum("btd,de->bte", x.astype(jnp.float32), router), "batch", "length", None)
        real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
        probabilities = jax.nn.softmax(logits, axis=-1)
        choices, chosen = top_k(probabilities, config.experts_per_token)
        shares = jnp.einsum("bte,btke->btk", probabilities, chosen)
        if config.router_renormalize:
            shares /= shares.sum(-1, keepdims=True)
        choices = jnp.where(real[..., None], choices, config.num_experts)
        y, dropped = self._run_experts(x, choices, shares)
        return y, self._sums(logits, probabilities, chosen, real, dropped, predicted)

    def _run_experts(self, x, choices, shares):
        kernels = [k for k in (self.gate, self.up, self.down) if k is not None]
        graph, weights = nnx.split(kernels)

        def run(x, shares, weights):
            kernels = nnx.merge(graph, weights)
            return run_experts(
                self.dispatch,
                FeedForward(self.config.activation, self.config.gated_mlp),
                x,
                choices,
                shares,
                tuple(kernel.matrices(x.dtype) for kernel in kernels),
                tuple(kernel.kernel.axes for kernel in kernels),
                tuple(name_of(kernel.kernel) for kernel in kernels),
            )

        # Matrices that are made for the occasion are made again in the backward pass, not kept for all layers.
        derived = any(kernel.is_derived for kernel in kernels)
        return (jax.checkpoint(run) if derived else run)(x, shares, weights)

    def _sums(self, logits, probabilities, chosen, real: Bool[Array, "batch length"], dropped, predicted) -> LayerSums:
        config, real = self.config, real.astype(jnp.float32)
        tokens = real.sum(1)
        load = jnp.einsum("btke,bt->be", chosen, real)
        mean = jnp.einsum("bte,bt->be", probabilities, real)  # times the tokens of the row
        # Each row's loss times its tokens, and these sums.
        balance = config.num_experts / jnp.maximum(tokens, 1) * jnp.sum(load * mean, axis=1)
        log_z = jnp.sum(real * jax.nn.logsumexp(logits, axis=-1) ** 2, axis=1)
        weights = 1.0 if predicted is None else predicted / jnp.maximum(tokens, 1)
        losses = config.router_balance_loss * balance + config.router_z_loss * log_z
        loss = jnp.sum(weights * losses) / config.num_layers
        statistics = {
            "load": load.sum(0),
            "balance": balance.sum() / config.experts_per_token,
            "log_z_squared": log_z.sum(),
            "dropped": dropped.sum(),
            "tokens": tokens.sum(),
        }
        return LayerSums(loss, jax.lax.stop_gradient(statistics))


@dataclass(frozen=True)
class FeedForward:
    """The `Experts` of layout/experts.py: the feed-forward networks of a device's experts."""

    activation: str
    gated: bool

    def __call__(self, rows, weights):
        activate = ACTIVATIONS[self.activation]
        *widen, down = weights
        hidden = activate(expert_matmul(rows, widen[0]))
        if self.gated:
            hidden = hidden * expert_matmul(rows, widen[1])
        return expert_matmul(hidden, down)


@jax.custom_vjp
def expert_matmul(
    rows: Float[Array, "experts rows inner"], weights: Float[Array, "experts inner outer"]
) -> Float[Array, "experts rows outer"]:
    """Rows times the matrix of their expert, in the dtype of `rows`; the gradient of `weights` is summed in float32."""
    return jnp.einsum("erd,edf->erf", rows, weights.astype(rows.dtype))


def _matmul_forward(rows, weights):
    return expert_matmul(rows, weights), (rows, weights)


def _matmul_backward(residuals, gradient):
    rows, weights = residuals
    d_rows = expert_matmul(gradient, weights.swapaxes(1, 2))
    return d_rows, jnp.einsum("erd,erf->edf", rows, gradient, preferred_element_type=jnp.float32)


expert_matmul.defvjp(_matmul_forward, _matmul_backward)


def top_k(
    probabilities: Float[Array, "batch length experts"], k: int
) -> tuple[Int[Array, "batch length k"], Float[Array, "batch length k experts"]]:
    """The k likeliest experts, the likeliest first and of equals the first, and the same as rows of 0 and 1.

    One maximum after the other, which the partitioner leaves where the tokens are.
    """
    left = jax.lax.stop_gradient(probabilities)
    numbers, chosen = [], []
    for _ in range(k):
        numbers.append(jnp.argmax(left, axis=-1).astype(jnp.int32))
        chosen.append(jax.nn.one_hot(numbers[-1], left.shape[-1]))
        left = jnp.where(chosen[-1] > 0, -1.0, left)
    return jnp.stack(numbers, -1), jnp.stack(chosen, -2)


def router_metrics(statistics: Statistics | None) -> dict[str, Float[Array, ""]]:
    """What a step reports of its routers, from the statistics of all layers, each [layers, …].

    router_balance: the load-balancing loss before its weight, divided by k: 1 where all is even. router_z: mean squared
    log(Z). router_max_load: tokens of the fullest expert of any layer, as a multiple of an even share. router_dropped:
    the part of all choices that no expert had room for.
    """
    if not statistics:
        return {}
    tokens = jnp.maximum(statistics["tokens"].sum(), 1)
    load = statistics["load"]
    even = jnp.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    return {
        "router_balance": statistics["balance"].sum() / tokens,
        "router_z": statistics["log_z_squared"].sum() / tokens,
        "router_max_load": (load / even).max(),
        "router_dropped": statistics["dropped"].sum() / jnp.maximum(load.sum(), 1),
    }
