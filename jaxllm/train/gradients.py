"""(params, batch) -> (loss, gradients): gradient accumulation over microbatches, the same for every step and layout."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.layout import zero
from jaxllm.layout.layout import Layout, constrain, current_layout, pin
from jaxllm.layout.vocabulary import weight_dtype
from jaxllm.model.head import Loss

Tree = Any


class Gradients(NamedTuple):
    """The summed loss, its weight, and the float32 gradient of (summed loss * scale)."""

    total: Float[Array, ""]
    weight: Float[Array, ""]
    gradients: Tree


def loss_and_gradients(
    loss: Callable[[Tree, Tree], Loss],
    params: Tree,
    axes: Tree,
    batch: Tree,
    *,
    num_microbatches: int,
    compute: jnp.dtype,
    accumulate: jnp.dtype = jnp.float32,
    scale: Float[Array, ""] | float = 1.0,
) -> Gradients:
    """Sums loss and gradients over the microbatches of a batch.

    Args:
      loss: `loss(params in compute dtype, microbatch) -> Loss`.
      params, axes: the float32 master weights and their logical axes.
      batch: a tree of arrays with a leading `batch` axis; microbatch m has the rows m, m + M, m + 2M, …, so that no row
        leaves its device.
      scale: multiplies the loss that is differentiated (float16 needs it large, a sum over tokens small).
    """
    layout = current_layout()
    weights = _map(lambda w, a: zero.gather_for_step(layout, w, a, weight_dtype(a, compute)), params, axes)

    def scaled(weights: Tree, microbatch: Tree) -> tuple[Array, Loss]:
        result = loss(weights, microbatch)
        return result.total * scale, result

    def one(microbatch: Tree) -> Gradients:
        gradients, result = jax.grad(scaled, has_aux=True)(weights, microbatch)
        gradients = _map(lambda g, a: _accumulator(layout, g.astype(accumulate), a), gradients, axes)
        return Gradients(result.total, result.weight, gradients)

    if num_microbatches == 1:
        summed = one(batch)
    else:
        zeros = _map(lambda w, a: _accumulator(layout, jnp.zeros(w.shape, accumulate), a), params, axes)
        start = Gradients(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), zeros)
        microbatches = jax.tree.map(lambda x: _split(x, num_microbatches), batch)
        summed, _ = jax.lax.scan(lambda sums, m: (jax.tree.map(jnp.add, sums, one(m)), None), start, microbatches)
    return summed._replace(gradients=_map(lambda g, a: _final(layout, g, a), summed.gradients, axes))


def _split(x: Array, num_microbatches: int) -> Array:
    x = x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
    return constrain(x, None, "batch", *[None] * (x.ndim - 2))


def _accumulator(layout: Layout | None, g: Array, axes: tuple[str, ...]) -> Array:
    return g if layout is None else pin(g, layout, zero.gradient_spec(layout, axes, g.shape))


def _final(layout: Layout | None, g: Array, axes: tuple[str, ...]) -> Array:
    g = g.astype(jnp.float32)
    return g if layout is None else pin(g, layout, zero.state_spec(layout, axes, g.shape))


def _map(f: Callable[[Array, tuple[str, ...]], Array], tree: Tree, axes: Tree) -> Tree:
    """`f` on each leaf and its logical axes, a tuple."""
    return jax.tree.map(f, tree, axes)
