"""(params, batch) -> (loss, gradients): gradient accumulation over microbatches, the same for every step and layout."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxllm.layout import zero
from jaxllm.layout.layout import Layout, constrain, current_layout, pin, use_layout
from jaxllm.layout.pipeline import run_pipeline
from jaxllm.layout.scope import NOTHING, Frozen, joined, map_named, tensor_scope
from jaxllm.layout.vocabulary import weight_dtype
from jaxllm.model.head import Loss

Tree = Any


class Gradients(NamedTuple):
    """The summed loss, its weight, the float32 gradient of (summed loss * scale), the summed statistics and metrics."""

    total: Float[Array, ""]
    weight: Float[Array, ""]
    gradients: Tree
    statistics: Tree
    metrics: Tree


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
    frozen: Frozen = NOTHING,
) -> Gradients:
    """Sums loss and gradients over the microbatches of a batch.

    Args:
      loss: `loss(params in compute dtype, microbatch) -> Loss`.
      params, axes: the float32 master weights and their logical axes.
      frozen: further weights, as they are held, that `loss` finds among the params and that have no gradients.
      batch: a tree of arrays with a leading `batch` axis; microbatch m has the rows m, m + M, m + 2M, …, so that no row
        leaves its device.
      scale: multiplies the loss that is differentiated (float16 needs it large, a sum over tokens small).
    """
    layout = current_layout()
    if layout is not None and layout.num_stages > 1:
        summed = run_pipeline(
            layout,
            loss,
            params,
            axes,
            batch,
            num_microbatches=num_microbatches,
            compute=compute,
            accumulate=accumulate,
            scale=scale,
            frozen=frozen,
        )
        gradients = map_named(lambda g, a: _final(layout, g, a), summed.gradients, axes)
        return Gradients(summed.total, summed.weight, gradients, summed.statistics, summed.metrics)
    weights = map_named(lambda w, a: zero.gather_for_step(layout, w, a, weight_dtype(a, compute)), params, axes)
    held = held_for_step(layout, frozen)
    microbatches = jax.tree.map(lambda x: split_microbatches(x, num_microbatches), batch)
    once = _reduced_once(layout, joined(params, frozen.weights), joined(axes, frozen.axes))
    local = run = partial(_accumulate, layout and layout.inside(*once), loss, axes, accumulate)
    if once:
        run = jax.shard_map(
            lambda *arguments: _sum(once, local(*arguments), axes),
            mesh=layout.mesh,
            in_specs=(P(), P(), P(None, once), P()),
            out_specs=P(),
            axis_names=set(once),
            check_vma=False,
        )
    summed = run(weights, held, microbatches, jnp.asarray(scale, jnp.float32))
    return summed._replace(gradients=map_named(lambda g, a: _final(layout, g, a), summed.gradients, axes))


def held_for_step(layout: Layout | None, frozen: Frozen) -> Tree:
    """Frozen weights where a step wants them."""
    return map_named(lambda w, a: zero.gather_for_step(layout, w, a, w.dtype), *frozen)


def _sum(mesh_axes: tuple[str, ...], sums: Gradients, axes: Tree) -> Gradients:
    with tensor_scope("loss", ("batch", "length")):
        sums_alone = jax.lax.psum(sums._replace(gradients=None), mesh_axes)
    gradients = map_named(lambda g, _: zero.sum_once(g, mesh_axes), sums.gradients, axes)
    return sums_alone._replace(gradients=gradients)


def _reduced_once(layout: Layout | None, params: Tree, axes: Tree) -> tuple[str, ...]:
    if layout is None:
        return ()
    return zero.reduced_once(
        layout, jax.tree.leaves(map_named(lambda w, a: zero.step_spec(layout, a, w.shape), params, axes))
    )


def _accumulate(
    layout, loss, axes: Tree, dtype: jnp.dtype, weights: Tree, frozen: Tree, microbatches: Tree, scale: Array
) -> Gradients:
    """Sums over the microbatches, and over the devices that `layout` still sees apart."""

    def scaled(weights: Tree, microbatch: Tree) -> tuple[Array, Loss]:
        result = loss(joined(weights, frozen), microbatch)
        return result.total * scale, result

    def one(microbatch: Tree) -> Gradients:
        gradients, result = jax.grad(scaled, has_aux=True)(weights, microbatch)
        gradients = map_named(lambda g, a: _accumulator(layout, g.astype(dtype), a), gradients, axes)
        return Gradients(result.total, result.weight, gradients, result.statistics, result.metrics)

    with use_layout(layout) if layout is not None else contextlib.nullcontext():
        if jax.tree.leaves(microbatches)[0].shape[0] == 1:
            return one(jax.tree.map(lambda x: x[0], microbatches))
        zeros = map_named(lambda w, a: _accumulator(layout, jnp.zeros(w.shape, dtype), a), weights, axes)
        shapes = jax.eval_shape(loss, joined(weights, frozen), jax.tree.map(lambda x: x[0], microbatches))
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        start = Gradients(nothing.total, nothing.weight, zeros, nothing.statistics, nothing.metrics)
        summed, _ = jax.lax.scan(lambda sums, m: (jax.tree.map(jnp.add, sums, one(m)), None), start, microbatches)
    return summed


def split_microbatches(x: Array, num_microbatches: int) -> Array:
    """[batch, …] as [microbatch, rows, …]."""
    x = x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
    return constrain(x, None, "batch", *[None] * (x.ndim - 2))


def _accumulator(layout: Layout | None, g: Array, axes: tuple[str, ...]) -> Array:
    return g if layout is None else pin(g, layout, zero.gradient_spec(layout, axes, g.shape))


def _final(layout: Layout | None, g: Array, axes: tuple[str, ...]) -> Array:
    g = g.astype(jnp.float32)
    return g if layout is None else pin(g, layout, zero.state_spec(layout, axes, g.shape))
