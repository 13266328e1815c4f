"""How weights take part in a computation: gathered, multiplied with, dropped, their gradients reduced.

These functions are all the model needs in order to run under every ZeRO stage and under tensor parallelism.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.layout import zero
from jaxllm.layout.layout import Axes, Layout, current_layout, pin, platform
from jaxllm.layout.nf4 import NF4, dequantize
from jaxllm.layout.scope import tensor_scope


def weight_einsums(
    equations: Sequence[str],
    x: Float[Array, "..."],
    weights: Sequence[Float[Array, "..."]],
    axes: Sequence[Axes],
    names: Sequence[str],
) -> list[Float[Array, "..."]]:
    """`einsum(equations[i], x, weights[i])` of one activation with weights of logical `axes[i]`, in the dtype of x.

    Forward and backward each gather a weight where ZeRO 3 keeps it sharded, and drop it after use. The gradient of a
    weight is reduced over the devices in `Layout.reduce_dtype`, and only then rounded. Several column-parallel weights
    [input, output, …] are one matmul, their columns side by side: larger, and tensor parallelism then pays one
    all-reduce for the gradients that they all send back to x.

    Args:
      names: paths of the weights, for `tensor_scope`.
    """
    layout = current_layout()
    parts = {_parts(layout, w, a) for w, a in zip(weights, axes, strict=True)}
    if len(weights) > 1 and len(parts) == 1:
        with tensor_scope(names, *axes):
            return list(_joint(layout, parts.pop(), tuple(axes), tuple(names), x, tuple(weights)))
    return [_named_einsum(layout, *each, x=x) for each in zip(equations, axes, names, weights, strict=True)]


def _named_einsum(layout: Layout | None, equation: str, axes: Axes, name: str, w: Array, *, x: Array) -> Array:
    with tensor_scope(name, axes):
        return _einsum(layout, equation, axes, name, x, w)


def _parts(layout: Layout | None, w: Array, axes: Axes) -> int:
    """Into how many parts the output axis of a column-parallel weight is split."""
    parts = layout.size(axes[1]) if layout is not None else 1
    return parts if w.shape[1] % parts == 0 else 1


def whole_weight(layout: Layout | None, w: Array | NF4, axes: Axes, dtype: jnp.dtype) -> Float[Array, "..."]:
    """A weight whole but for tensor parallelism, in `dtype`. One in 4 bits is gathered in 4 bits."""
    if isinstance(w, NF4):
        codes, scales = (zero.gather_for_use(layout, part, axes) for part in (w.codes, w.scales))
        return dequantize(NF4(codes, scales, w.axis), dtype)
    return zero.gather_for_use(layout, w, axes).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _einsum(layout: Layout | None, equation: str, axes: Axes, name: str, x: Array, w: Array) -> Array:
    return jnp.einsum(equation, x, whole_weight(layout, w, axes, x.dtype))


def _einsum_forward(layout, equation, axes, name, x, w):
    return _einsum(layout, equation, axes, name, x, w), (x, w)


def _einsum_backward(layout, equation, axes, name, residuals, dy):
    x, w = residuals
    left, right, output = equation.replace("->", ",").split(",")
    (whole,), dy = _gather_again(layout, (axes,), (name,), (w,), dy)
    dx = jnp.einsum(f"{output},{right}->{left}", dy, whole)
    if isinstance(w, NF4):
        return dx.astype(x.dtype), None
    dw = _weight_gradient(layout, left, output, right, x, dy)
    return dx.astype(x.dtype), zero.reduce_gradient(layout, dw, axes, w.dtype)


_einsum.defvjp(_einsum_forward, _einsum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _joint(
    layout: Layout | None,
    parts: int,
    axes: tuple[Axes, ...],
    names: tuple[str, ...],
    x: Array,
    weights: tuple[Array, ...],
):
    whole = [whole_weight(layout, w, a, x.dtype) for w, a in zip(weights, axes, strict=True)]
    y = jnp.einsum("btd,dnc->btnc", x, _side_by_side(whole, parts))
    pieces = jnp.split(y, _column_offsets(weights, parts), axis=3)
    return tuple(y.reshape(*x.shape[:2], *w.shape[1:]) for y, w in zip(pieces, weights, strict=True))


def _joint_forward(layout, parts, axes, names, x, weights):
    return _joint(layout, parts, axes, names, x, weights), (x, weights)


def _joint_backward(layout, parts, axes, names, residuals, gradients):
    x, weights = residuals
    whole, gradients = _gather_again(layout, axes, names, weights, gradients)
    dy = jnp.concatenate([g.reshape(*g.shape[:2], parts, -1) for g in gradients], axis=3)
    dx = jnp.einsum("btnc,dnc->btd", dy, _side_by_side(whole, parts))
    if isinstance(weights[0], NF4):
        return dx.astype(x.dtype), None
    if layout is None:
        together = _weight_gradient(layout, "btd", "btnc", "dnc", x, dy)
        d_weights = jnp.split(together, _column_offsets(weights, parts), axis=2)
    else:  # one by one, so that each is scattered along its own axis
        d_weights = []
        for g, a, name in zip(gradients, axes, names, strict=True):
            with tensor_scope(name, a):
                d_weights.append(_weight_gradient(layout, "btd", "btc", "dc", x, g.reshape(*g.shape[:2], -1)))
    reduced = []
    for g, a, w, name in zip(d_weights, axes, weights, names, strict=True):
        with tensor_scope(name, a):
            reduced.append(zero.reduce_gradient(layout, g.reshape(w.shape), a, w.dtype))
    return dx.astype(x.dtype), tuple(reduced)


_joint.defvjp(_joint_forward, _joint_backward)


def _side_by_side(weights: Sequence[Array], parts: int) -> Float[Array, "input parts columns"]:
    """Each device's columns of every weight together, so that nothing moves between devices."""
    return jnp.concatenate([w.reshape(w.shape[0], parts, -1) for w in weights], axis=2)


def _column_offsets(weights: Sequence[Array], parts: int) -> list[int]:
    return list(itertools.accumulate(math.prod(w.shape[1:]) // parts for w in weights))[:-1]


def _gather_again(layout, axes, names, weights, gradients):
    """The weights whole, in the dtype of the gradients; where ZeRO 3 dropped them, gathered a second time."""
    if layout is not None and any(
        zero.is_gathered_at_use(layout, a, w.shape) for w, a in zip(weights, axes, strict=True)
    ):
        weights, gradients = zero.barrier(weights, gradients)
    dtype = jax.tree.leaves(gradients)[0].dtype
    whole = []
    for w, a, name in zip(weights, axes, names, strict=True):
        with tensor_scope(name, a):
            whole.append(whole_weight(layout, w, a, dtype))
    return whole, gradients


def _weight_gradient(layout: Layout | None, left: str, output: str, right: str, x: Array, dy: Array) -> Array:
    """The sum over tokens of x times dy."""
    dtype = jnp.float32 if layout is None else jnp.dtype(layout.reduce_dtype)
    if platform() == "cpu" and dy.size < x.size:
        # XLA's CPU backend transposes the first factor, slowly: that had better be the narrow one. The barrier keeps it
        # from swapping the factors back.
        swapped = "".join(axis for axis in output + left if axis in right)
        dw = jnp.einsum(f"{output},{left}->{swapped}", dy, x, preferred_element_type=dtype)
        (dw,) = jax.lax.optimization_barrier((dw,))
        return dw.transpose([swapped.index(axis) for axis in right])
    return jnp.einsum(f"{left},{output}->{right}", x, dy, preferred_element_type=dtype)


def small_weight(w: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
    """A bias or a norm's scale, in float32: gathered where it is not whole, its gradient reduced."""
    return _small(current_layout(), axes, w.dtype.name, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _small(layout: Layout | None, axes: Axes, dtype: str, w: Array) -> Array:
    return zero.gather_for_use(layout, w, axes).astype(jnp.float32)


def _small_forward(layout, axes, dtype, w):
    return _small(layout, axes, dtype, w), None


def _small_backward(layout, axes, dtype, _, gradient):
    if layout is not None:
        # First whole, as it was used: else XLA moves what it sums over tokens to where ZeRO accumulates the sum.
        gradient = pin(gradient, layout, zero.compute_spec(layout, axes, gradient.shape))
    return (zero.reduce_gradient(layout, gradient, axes, jnp.dtype(dtype)),)


_small.defvjp(_small_forward, _small_backward)
