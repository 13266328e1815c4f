"""How weights take part in a computation: gathered, multiplied with, dropped, their gradients reduced.

These functions are all the model needs in order to run under every ZeRO stage and under tensor parallelism.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.layout import zero
from jaxllm.layout.layout import Axes, Layout, current_layout


def weight_einsums(
    equation: Sequence[str], x: Float[Array, "..."], weights: Sequence[Float[Array, "..."]], axes: Sequence[Axes]
) -> tuple[Float[Array, "..."], ...]:
    """`einsum(equation[i], x, weights[i])` of one activation with weights of logical `axes[i]`, in the dtype of x.

    Forward and backward each gather a weight where ZeRO 3 keeps it sharded, and drop it after use. The gradient of a
    weight is reduced over the devices in `Layout.reduce_dtype`, and only then rounded. The gradients of x from several
    column-parallel weights are computed as one matmul, so that tensor parallelism pays one all-reduce for them all.
    """
    return _einsums(current_layout(), tuple(equation), tuple(axes), x, tuple(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsums(layout: Layout | None, equations: tuple[str, ...], axes: tuple[Axes, ...], x, weights):
    whole = [zero.gather_for_use(layout, w, a).astype(x.dtype) for w, a in zip(weights, axes, strict=True)]
    return tuple(jnp.einsum(equation, x, w) for equation, w in zip(equations, whole, strict=True))


def _einsums_forward(layout, equations, axes, x, weights):
    return _einsums(layout, equations, axes, x, weights), (x, weights)


def _einsums_backward(layout, equations, axes, residuals, gradients):
    x, weights = residuals
    whole = weights
    if layout is not None and any(
        zero.is_gathered_at_use(layout, a, w.shape) for w, a in zip(weights, axes, strict=True)
    ):
        *whole, x = zero.barrier(*weights, x)
    whole = [zero.gather_for_use(layout, w, a).astype(x.dtype) for w, a in zip(whole, axes, strict=True)]
    reduce_dtype = jnp.float32 if layout is None else jnp.dtype(layout.reduce_dtype)
    d_weights = []
    for equation, w, w_axes, dy in zip(equations, weights, axes, gradients, strict=True):
        left, right, output = equation.replace("->", ",").split(",")
        dw = jnp.einsum(f"{left},{output}->{right}", x, dy, preferred_element_type=reduce_dtype)
        d_weights.append(zero.reduce_gradient(layout, dw, w_axes, w.dtype))
    dx = _joint_input_gradient(layout, equations, axes, whole, gradients)
    return dx.astype(x.dtype), tuple(d_weights)


_einsums.defvjp(_einsums_forward, _einsums_backward)


def _parts(layout: Layout | None, w: Array, axes: Axes) -> int:
    """Into how many parts the output axis of a column-parallel weight [input, output, …] is split."""
    parts = layout.size(axes[1]) if layout is not None else 1
    return parts if w.shape[1] % parts == 0 else 1


def _joint_input_gradient(layout, equations, axes, weights, gradients) -> Array:
    parts = {_parts(layout, w, a) for w, a in zip(weights, axes, strict=True)}
    if len(weights) > 1 and len(parts) == 1 and (n := parts.pop()) > 1:
        # Each device's columns of every weight side by side: [embed, parts, columns a part].
        w = jnp.concatenate([w.reshape(w.shape[0], n, -1) for w in weights], axis=2)
        dy = jnp.concatenate([g.reshape(*g.shape[:2], n, -1) for g in gradients], axis=3)
        return jnp.einsum("btnc,dnc->btd", dy, w)
    total = 0
    for equation, w, dy in zip(equations, weights, gradients, strict=True):
        left, right, output = equation.replace("->", ",").split(",")
        total = total + jnp.einsum(f"{output},{right}->{left}", dy, w)
    return total


def small_weight(w: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
    """A bias or a norm's scale, in float32: gathered where it is not whole, its gradient reduced."""
    return _small(current_layout(), axes, w.dtype.name, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _small(layout: Layout | None, axes: Axes, dtype: str, w: Array) -> Array:
    return zero.gather_for_use(layout, w, axes).astype(jnp.float32)


def _small_forward(layout, axes, dtype, w):
    return _small(layout, axes, dtype, w), None


def _small_backward(layout, axes, dtype, _, gradient):
    return (zero.reduce_gradient(layout, gradient, axes, jnp.dtype(dtype)),)


_small.defvjp(_small_forward, _small_backward)
