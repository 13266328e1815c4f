"""Batches through a model without gradients: what they cost, and what is said of each of their rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.layout import zero
from jaxllm.layout.layout import constrain, current_layout
from jaxllm.layout.pipeline import PipelineSums, run_pipeline
from jaxllm.layout.scope import NOTHING, Frozen, joined, map_named
from jaxllm.model.head import Loss
from jaxllm.train.gradients import held_for_step, split_microbatches

Tree = Any


def summed_loss(
    loss: Callable[[Tree, Tree], Loss],
    params: Tree,
    axes: Tree,
    batch: Tree,
    *,
    compute: jnp.dtype,
    frozen: Frozen = NOTHING,
) -> Loss:
    """The summed loss of a batch, its weight and its metrics; a pipeline takes its microbatches in turn.

    Args:
      params, axes, frozen: as of `loss_and_gradients`.
    """
    layout = current_layout()
    if layout is None or layout.num_stages == 1:
        result = loss(_weights(params, axes, compute, frozen), batch)
    else:
        result = _piped(loss, params, axes, batch, compute, frozen, layout.num_microbatches)
    return Loss(result.total, result.weight, metrics=result.metrics)


def said_of_rows(
    says: Callable[[Tree, Tree], Tree],
    params: Tree,
    axes: Tree,
    batch: Tree,
    *,
    num_microbatches: int,
    compute: jnp.dtype,
    frozen: Frozen = NOTHING,
) -> Tree:
    """What `says(weights, rows)`, which runs a model's layers once, returns for the rows of a batch: [batch, …] each.

    So many rows at a time as `loss_and_gradients` takes, so that no more memory is needed than for training.
    """
    layout, none = current_layout(), jnp.zeros((), jnp.float32)
    if layout is not None and layout.num_stages > 1:
        loss = lambda weights, rows: Loss(none, none, rows=says(weights, rows))  # noqa: E731
        return _piped(loss, params, axes, batch, compute, frozen, num_microbatches, keeps_rows=True).rows
    weights = _weights(params, axes, compute, frozen)
    if num_microbatches == 1:
        return says(weights, batch)
    microbatches = jax.tree.map(lambda x: split_microbatches(x, num_microbatches), batch)
    said = jax.lax.map(lambda rows: says(weights, rows), microbatches)

    def together(x):
        x = x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
        return constrain(x, "batch", *[None] * (x.ndim - 1))

    return jax.tree.map(together, said)


def _weights(params: Tree, axes: Tree, compute: jnp.dtype, frozen: Frozen) -> Tree:
    """All weights as a step computes with them."""
    layout = current_layout()
    weights = map_named(lambda w, a: zero.gather_for_step(layout, w, a, compute), params, axes)
    return joined(weights, held_for_step(layout, frozen))


def _piped(loss, params, axes, batch, compute, frozen, num_microbatches, keeps_rows: bool = False) -> PipelineSums:
    how = {"num_microbatches": num_microbatches, "schedule": "forward_only", "keeps_rows": keeps_rows}
    return run_pipeline(current_layout(), loss, params, axes, batch, compute=compute, frozen=frozen, **how)
