"""Linear maps between named axes, the only kind of matrix in a block."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxllm.layout.scope import tensor_scope
from jaxllm.layout.weights import small_weight, weight_einsums
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.adapters import LoRA
from jaxllm.model.dropout import DropoutKey
from jaxllm.model.names import name_of


class Linear(nnx.Module):
    """`einsum(equation, x, kernel) + bias`.

    Args:
      equation: with the axes of x and of the kernel, for example "btd,dnh->btnh".
      axes, shape: logical axes and sizes of the kernel.
      bias_axes: those of the bias, the last axes of the output; None for no bias.
      std: standard deviation of the normal the kernel starts from.
    """

    def __init__(
        self,
        equation: str,
        axes: tuple[str, ...],
        shape: tuple[int, ...],
        *,
        bias_axes: tuple[str, ...] | None,
        std: float,
        rngs: nnx.Rngs,
    ):
        self.equation = equation
        self.lora = nnx.data(None)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)
        sizes = dict(zip(axes, shape, strict=True))
        bias = None if bias_axes is None else jnp.zeros(tuple(sizes[axis] for axis in bias_axes), jnp.float32)
        self.bias = None if bias is None else nnx.Param(bias, axes=bias_axes)

    def adapt(self, config: AdapterConfig, rngs: nnx.Rngs) -> None:
        """Puts a LoRA beside the kernel."""
        _, right, output = self.equation.replace("->", ",").split(",")
        num_inputs = sum(letter not in output for letter in right)
        self.lora = LoRA(self.kernel.axes, self.kernel.shape, num_inputs, config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch length ..."], stream: DropoutKey | None = None
    ) -> Float[Array, "batch length ..."]:
        """Args: stream: for the dropout of an adapter."""
        return apply_together(x, [self], stream)[0]


def apply_together(
    x: Float[Array, "batch length ..."], linears: Sequence[Linear], stream: DropoutKey | None = None
) -> list[Float[Array, "..."]]:
    """What each of `linears` makes of the same x; their gradients flow back into x together."""
    kernels = [linear.kernel for linear in linears]
    axes, names = [kernel.axes for kernel in kernels], [name_of(kernel) for kernel in kernels]
    ys = weight_einsums([linear.equation for linear in linears], x, [kernel[...] for kernel in kernels], axes, names)
    ys = [_adapted(linear, x, y, stream) for linear, y in zip(linears, ys, strict=True)]
    return [checkpoint_name(_with_bias(linear, y), "linear") for linear, y in zip(linears, ys, strict=True)]


def _adapted(linear: Linear, x: Array, y: Array, stream: DropoutKey | None) -> Array:
    return y if linear.lora is None else linear.lora(x, y, linear.equation, linear.kernel, stream)


def _with_bias(linear: Linear, y: Array) -> Array:
    if linear.bias is None:
        return y
    # In float32, so that the gradient, a sum over all tokens, is summed in float32 too.
    with tensor_scope(name_of(linear.bias), linear.bias.axes):
        return (y.astype(jnp.float32) + small_weight(linear.bias[...], linear.bias.axes)).astype(y.dtype)
