"""The compiled step: loss and gradients, clipping, the guard against non-finite numbers, the update."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxllm.data.batch import Vocabulary, row_random
from jaxllm.data.packing import empty_row
from jaxllm.layout.layout import Layout, as_dtype, use_layout
from jaxllm.layout.scope import Frozen, tensor_scope
from jaxllm.model.dropout import dropout_key
from jaxllm.model.moe import router_metrics
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.steps import STEPS
from jaxllm.steps.step import TrainStep
from jaxllm.train.config import Config
from jaxllm.train.gradients import loss_and_gradients, summed_loss
from jaxllm.train.state import TrainState, abstract_state

Metrics = dict[str, Float[Array, ""]]
SCALE_PATIENCE = 2_000  # good steps after which a float16 loss scale doubles


def make_train_step(
    step: TrainStep,
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
    config: Config,
    layout: Layout,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Compiles `(state, batch) -> (state, metrics)`; the state is donated.

    Metrics, float32 scalars: loss (mean over counted tokens, nats), weight (tokens counted), grad_norm (global, before
    clipping), learning_rate, nonfinite (steps without an update so far), loss_scale; of experts, those of
    `router_metrics`.
    """
    compute, accumulate = as_dtype(config.precision.compute), as_dtype(config.precision.gradients)
    model = spec.config
    uses_dropout = max(model.dropout, model.attention_dropout, model.neftune_alpha, spec.adapter.dropout) > 0
    axes, held_axes = spec.trained_axes, spec.held_axes(compute)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        rows = jax.tree.leaves(batch)[0].shape[0]
        tokens = jax.tree.leaves(batch)[0].size
        stream = dropout_key(config.seed, state.step, jnp.arange(rows)) if uses_dropout else None

        def loss(weights, inputs):
            batch, stream = inputs
            return step.loss(spec.merge(weights), batch, dropout=stream)

        # A mean over the batch's slots is differentiated, and the mean over counted tokens made of it afterwards:
        # the sum over a million tokens would not fit float16.
        summed = loss_and_gradients(
            loss,
            state.params,
            axes,
            (batch, stream),
            num_microbatches=layout.num_microbatches,
            compute=compute,
            accumulate=accumulate,
            scale=state.loss_scale / tokens,
            frozen=Frozen(state.held, held_axes),
        )
        weight = jnp.maximum(summed.weight, 1)
        gradients = jax.tree.map(lambda g: g * (tokens / (weight * state.loss_scale)), summed.gradients)
        every_axis = [*jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple)), ("state",)]
        with tensor_scope("gradient_norm", *every_axis):
            norm = optax.tree.norm(gradients)
        with tensor_scope("optimizer", *every_axis):
            new = _update(optimizer, config.optimizer.clip_norm, state, gradients, norm)
        if compute == jnp.float16:
            new = _rescale(state, new, jnp.isfinite(norm))
        metrics = {
            "loss": summed.total / weight,
            "weight": summed.weight,
            "grad_norm": norm,
            "learning_rate": schedule(state.step - state.nonfinite),
            "nonfinite": new.nonfinite,
            "loss_scale": state.loss_scale,
        }
        metrics |= router_metrics(summed.statistics)
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return _compiled(train_step, layout, abstract_state(spec, optimizer, layout, config.precision.compute))


def abstract_batch(config: Config, layout: Layout) -> Any:
    """The batch of a step as `jax.ShapeDtypeStruct`s with the sharding that the loader gives it.

    Its rows are whole also where the layout splits sequences: tokens are few bytes, and the model puts its part of them
    in the order of the devices without communication.
    """
    length = config.data.length or config.model.max_length
    no_text, any_vocabulary = empty_row(length, 0), Vocabulary(size=1, mask_id=0)
    row = STEPS[config.train_step].batch.make_row(no_text, row_random(0, 0), any_vocabulary, config.data)
    place = functools.partial(jax.ShapeDtypeStruct, sharding=layout.sharding("batch", None))
    return jax.tree.map(lambda leaf: place((config.data.batch_size, *leaf.shape), leaf.dtype), row)


def _compiled(train_step: Callable, layout: Layout, abstract: TrainState) -> Callable:
    def laid_out(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        with use_layout(layout):
            return train_step(state, batch)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(laid_out, donate_argnums=0, out_shardings=(shardings, None))


def _update(optimizer, clip_norm: float, state: TrainState, gradients: Any, norm: Array) -> TrainState:
    """One optimizer step, or none where the gradient is not finite: decided on the device, before the update."""
    if clip_norm > 0:
        gradients = jax.tree.map(lambda g: g * jnp.minimum(1, clip_norm / norm), gradients)
    updates, moments = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(norm)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
    return state._replace(
        step=state.step + 1,
        params=keep(params, state.params),
        optimizer=keep(moments, state.optimizer),
        nonfinite=state.nonfinite + ~finite,
    )


def _rescale(old: TrainState, new: TrainState, finite: Array) -> TrainState:
    """Dynamic loss scaling (Micikevicius et al. 2018)."""
    age = old.scale_age + 1
    grown = age >= SCALE_PATIENCE
    scale = jnp.where(finite, jnp.where(grown, old.loss_scale * 2, old.loss_scale), old.loss_scale / 2)
    return new._replace(loss_scale=scale, scale_age=jnp.where(finite & ~grown, age, 0))


def make_eval_step(
    step: TrainStep, spec: ModelSpec, config: Config, layout: Layout
) -> Callable[[Any, Any, Any], tuple[Array, Array]]:
    """Compiles `(params, held, batch) -> (summed loss in nats, tokens counted)`, weights as in a `TrainState`.

    That is what the text costs, so without dropout, z-loss and the losses of routers. A pipeline splits the batch into
    its microbatches, so that all stages have work.
    """
    # A token dropped because others are beside it would cost more in one evaluation than in another.
    alone = {"z_loss": 0.0, "router_balance_loss": 0.0, "router_z_loss": 0.0, "expert_dispatch": "dropless"}
    spec = model_spec(dataclasses.replace(spec.config, **alone), spec.adapter)
    compute = as_dtype(config.precision.compute)

    def loss(weights, batch):
        return step.loss(spec.merge(weights), batch, dropout=None)

    @jax.jit
    def eval_step(params, held, batch):
        frozen = Frozen(held, spec.held_axes(compute))
        with use_layout(layout):
            return summed_loss(loss, params, spec.trained_axes, batch, compute=compute, frozen=frozen)

    return eval_step
