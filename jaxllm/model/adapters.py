"""LoRA: what is added to a frozen matrix is a product of two narrow ones, and those are trained (Hu et al. 2021).

With a matrix W from inputs to outputs, A from inputs to `rank` and B from there to outputs, the layer computes
x W + scale * dropout(x) A B. Also:

- DoRA (Liu et al. 2024): the columns of W + scale * A B are brought to lengths of their own, which are trained too.
- PiSSA (Meng et al. 2024): A and B start as the largest singular directions of W, which lose them. Here W is left as it
  is, and what A and B started from is subtracted: W may stay in 4 bits, and one base serves any number of adapters.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.errors import UserError, did_you_mean
from jaxllm.layout.layout import constrain, current_layout, pin
from jaxllm.layout.sequence import token_order
from jaxllm.layout.weights import small_weight, weight_einsums, whole_weight
from jaxllm.layout.zero import step_spec
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.dropout import DropoutKey, dropout
from jaxllm.model.names import name_of

STACKED = ("layers", "experts")  # axes along which a kernel is a stack of matrices


class AdapterParam(nnx.Param):
    """A weight that is trained while those of the model are frozen."""


class AddedParam(nnx.Param):
    """A weight that a run trains beside the language model or its adapter: of a scalar head, of a critic."""


class AdapterConstant(nnx.Param):
    """A weight that belongs to an adapter and is never trained."""


class Sides(NamedTuple):
    """The axes of a kernel: inputs, then outputs, after those of the stack."""

    num_stacked: int
    num_inputs: int


class LoRA(nnx.Module):
    """The narrow matrices of one kernel.

    Args:
      axes, shape: of the kernel.
      num_inputs: how many of its axes, after a stack's, are inputs.
    """

    def __init__(
        self, axes: tuple[str, ...], shape: tuple[int, ...], num_inputs: int, config: AdapterConfig, *, rngs: nnx.Rngs
    ):
        self.config = config
        stacked = sum(axis in STACKED for axis in axes)
        self.sides = Sides(stacked, num_inputs)
        stack, inputs, outputs = split_sides(axes, self.sides)
        sizes, fan_in = split_sides(shape, self.sides), math.prod(split_sides(shape, self.sides)[1])
        if config.init == "pissa" and config.rank > min(fan_in, math.prod(sizes[2])):
            raise UserError(
                f"config.adapter.rank={config.rank}: init='pissa' takes so many singular vectors of every matrix, and "
                f"one of {fan_in} x {math.prod(sizes[2])} has fewer. Lower the rank, or use init='kaiming'."
            )
        a_shape, b_shape = (*sizes[0], *sizes[1], config.rank), (*sizes[0], config.rank, *sizes[2])
        a_axes, b_axes = (*stack, *inputs, "rank"), (*stack, "rank", *outputs)
        self.a = AdapterParam(_first_a(config, a_shape, fan_in, rngs), axes=a_axes)
        self.b = AdapterParam(jnp.zeros(b_shape, jnp.float32), axes=b_axes)
        self.magnitude = nnx.data(None)
        if config.dora:
            self.magnitude = AdapterParam(jnp.ones((*sizes[0], *sizes[2]), jnp.float32), axes=(*stack, *outputs))
        self.start_a, self.start_b = nnx.data(None), nnx.data(None)
        if config.init == "pissa":
            self.start_a = AdapterConstant(jnp.zeros(a_shape, jnp.float32), axes=a_axes)
            self.start_b = AdapterConstant(jnp.zeros(b_shape, jnp.float32), axes=b_axes)

    def __call__(
        self,
        x: Float[Array, "batch length *inputs"],
        y: Float[Array, "batch length *outputs"],
        equation: str,
        kernel: nnx.Param,
        stream: DropoutKey | None,
    ) -> Float[Array, "batch length *outputs"]:
        """y = `einsum(equation, x, kernel)` as adapted."""
        key = stream.fold(name_of(self.a)) if stream else None
        dropped = dropout(x, self.config.dropout, key, token_order(current_layout(), x.shape[1]))
        added = _product(equation, dropped, self.a, self.b)
        if self.start_a is not None:
            added = added - _product(equation, x, self.start_a, self.start_b)
        y = y + (self.config.scale * added).astype(y.dtype)
        if self.magnitude is None:
            return y
        lengths = column_lengths(*map(jax.lax.stop_gradient, self._whole(kernel)), self.sides, self.config.scale)
        return (y * (small_weight(self.magnitude[...], self.magnitude.axes) / lengths)).astype(y.dtype)

    def _whole(self, kernel: nnx.Param) -> tuple[Array, Array, Array]:
        """Kernel, a and b in float32, whole but for tensor parallelism."""

        def whole(parameter: nnx.Param) -> Array:
            return whole_weight(current_layout(), parameter[...], parameter.axes, jnp.float32)

        a, b = whole(self.a), whole(self.b)
        if self.start_a is not None:
            a, b = gained(a, b, whole(self.start_a), whole(self.start_b), self.sides)
        return whole(kernel), a, b

    def merged(self, kernel: nnx.Param) -> Float[Array, "*axes"]:
        """The kernel with what is added to it, in the dtype of the narrow matrices: for experts."""
        dtype, layout = self.a[...].dtype, current_layout()
        w, a, b = self._whole(kernel)
        magnitude = None if self.magnitude is None else self.magnitude[...].astype(jnp.float32)
        total = merged_kernel(w, a, b, magnitude, self.sides, self.config.scale)
        total = total.astype(dtype)
        return total if layout is None else pin(total, layout, step_spec(layout, kernel.axes, total.shape))


def split_sides(values: tuple, sides: Sides) -> tuple[tuple, tuple, tuple]:
    """Axes or sizes of a kernel: those of the stack, of the inputs and of the outputs."""
    first = sides.num_stacked + sides.num_inputs
    return values[: sides.num_stacked], values[sides.num_stacked : first], values[first:]


def _first_a(config: AdapterConfig, shape: tuple[int, ...], fan_in: int, rngs: nnx.Rngs) -> Array:
    """Kaiming-uniform with a = sqrt(5), or N(0, 1 / rank^2): what PEFT starts from."""
    if config.init == "gaussian":
        return jax.random.normal(rngs.adapter(), shape, jnp.float32) / config.rank
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(rngs.adapter(), shape, jnp.float32, -bound, bound)


def _product(equation: str, x: Array, a: nnx.Param, b: nnx.Param) -> Array:
    """x A B. What lies between is whole on every device."""
    left, right, output = equation.replace("->", ",").split(",")
    inputs = "".join(letter for letter in right if letter not in output)
    outputs = "".join(letter for letter in right if letter in output)
    narrow = f"{left[:2]}r"
    (low,) = weight_einsums([f"{left},{inputs}r->{narrow}"], x, [a[...]], [a.axes], [name_of(a)])
    low = constrain(low, "batch", "length", "rank")
    (added,) = weight_einsums([f"{narrow},r{outputs}->{output}"], low, [b[...]], [b.axes], [name_of(b)])
    return added


def gained(a: Array, b: Array, start_a: Array, start_b: Array, sides: Sides) -> tuple[Array, Array]:
    """Matrices of twice the rank whose product is A B less what it was at the start."""
    return jnp.concatenate([a, start_a], -1), jnp.concatenate([b, -start_b], sides.num_stacked)


def added_kernel(
    a: Float[Array, "*stack inputs rank"], b: Float[Array, "*stack rank outputs"], shape: tuple[int, ...], sides: Sides
) -> Float[Array, "*axes"]:
    """A B, of the kernel's shape."""
    stack = shape[: sides.num_stacked]
    return (a.reshape(*stack, -1, a.shape[-1]) @ b.reshape(*stack, a.shape[-1], -1)).reshape(shape)


def merged_kernel(
    w: Float[Array, "*axes"],
    a: Float[Array, "*stack inputs rank"],
    b: Float[Array, "*stack rank outputs"],
    magnitude: Float[Array, "*stack outputs"] | None,
    sides: Sides,
    scale: float,
) -> Float[Array, "*axes"]:
    """W + scale * A B; with a magnitude, its columns brought to those lengths."""
    total = w + scale * added_kernel(a, b, w.shape, sides)
    if magnitude is None:
        return total
    ratio = magnitude / kernel_lengths(jax.lax.stop_gradient(total), sides)
    return total * jnp.expand_dims(ratio, _inputs(sides))


def kernel_lengths(w: Float[Array, "*axes"], sides: Sides) -> Float[Array, "*stack outputs"]:
    """The length of each column."""
    return jnp.sqrt((w * w).sum(_inputs(sides)))


def _inputs(sides: Sides) -> tuple[int, ...]:
    return tuple(range(sides.num_stacked, sides.num_stacked + sides.num_inputs))


def column_lengths(w: Float[Array, "*axes"], a: Array, b: Array, sides: Sides, scale: float) -> Float[Array, "outputs"]:
    """The lengths of the columns of W + scale * A B, which is never made; not of a stack."""
    inputs = _inputs(sides)
    down = jnp.tensordot(a, w, (inputs, inputs))  # [rank, outputs]
    squares = (w * w).sum(inputs) + 2 * scale * (down * b).sum(0)
    across = jnp.tensordot(a, a, (inputs, inputs))
    return jnp.sqrt(squares + scale**2 * (b * jnp.tensordot(across, b, 1)).sum(0))


def chosen_targets(targets: str, names: Sequence[str]) -> list[str]:
    """Those of the linear layers `names` that `config.adapter.targets` asks for, in the order of the model.

    Raises:
      UserError: an entry that fits none of them.
    """
    if targets == "all-linear":
        return list(names)
    chosen = set()
    for target in filter(None, (part.strip() for part in targets.split(","))):
        fits = _fitting(target, names)
        if not fits:
            last = [name.rpartition(".")[2] for name in names]
            raise UserError(
                f"config.adapter.targets: '{target}' fits no linear layer of the model. "
                f"{did_you_mean(target, [*names, *last])}\nThey are {', '.join(names)}; 'all-linear' takes all."
            )
        chosen |= set(fits)
    if not chosen:
        raise UserError(f"config.adapter.targets={targets!r} names no layer. 'all-linear' takes all of them.")
    return [name for name in names if name in chosen]


def _fitting(target: str, names: Sequence[str]) -> list[str]:
    """By the end of the path, or else by a regular expression for the whole of it."""
    ends = [name for name in names if name == target or name.endswith(f".{target}")]
    try:
        return ends or [name for name in names if re.fullmatch(target, name)]
    except re.error:
        return []
