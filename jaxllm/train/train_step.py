"""The compiled step: loss and gradients, clipping, the guard against non-finite numbers, the update."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxllm.data.batch import MAX_PAIRS, Vocabulary, row_random
from jaxllm.data.packing import empty_row
from jaxllm.layout.layout import Layout, as_dtype, use_layout
from jaxllm.layout.scope import Frozen, joined, tensor_scope
from jaxllm.model.actor_critic import CRITIC, ActorCritic
from jaxllm.model.head import Loss
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.steps import STEPS, dpo
from jaxllm.steps.step import Metrics, TrainStep
from jaxllm.train.config import Config
from jaxllm.train.forward import summed_loss
from jaxllm.train.learner import critic_scale, make_learners, step_options
from jaxllm.train.reference import is_precomputed, reference_kind, referred
from jaxllm.train.state import TrainState, abstract_state

SCALE_PATIENCE = 2_000  # good steps after which a float16 loss scale doubles


def make_train_step(
    step: TrainStep,
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
    config: Config,
    layout: Layout,
    num_tokens: int | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compiles `(state, batch) -> (state, metrics)`; the state is donated.

    A third argument, the pair of a loss and a norm of the gradient, makes it skip the update of a step above either.

    Metrics, float32 scalars: loss (mean over what the step counts: of tokens, nats), weight (how many were counted),
    grad_norm (global, before clipping), learning_rate, nonfinite (steps without an update so far), loss_scale; those of
    the step's loss; of experts, those of `router_metrics`; with a critic `critic_loss` and `critic_` all of its own.

    Args:
      num_tokens: of the vocabulary that are the tokenizer's; default all.
    """
    compute = as_dtype(config.precision.compute)
    axes, learners = spec.trained_axes, make_learners(step, spec, config, num_tokens)
    options = step_options(step, config, num_tokens)
    learning_rates = critic_scale(config) if isinstance(spec, ActorCritic) else 1.0

    def train_step(state: TrainState, batch: Any, limits: Any) -> tuple[TrainState, Metrics]:
        batch = referred(step, spec, config, state, batch, layout.num_microbatches, options)
        metrics: Metrics = {}
        gradients: Any = {}
        for learner in learners:
            loss, part = learner.gradients(state, batch, config, layout)
            metrics |= {learner.prefix + name: value for name, value in loss.items()}
            gradients = joined(gradients, part)
        every_axis = [*jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple)), ("state",)]
        with tensor_scope("gradient_norm", *every_axis):
            norm = optax.tree.norm(gradients)
        usable = jnp.isfinite(norm)
        if limits is not None:
            usable &= (metrics["loss"] <= limits[0]) & (norm <= limits[1])
        with tensor_scope("optimizer", *every_axis):
            new = _update(optimizer, config.optimizer.clip_norm, state, gradients, norm, usable, learning_rates)
        if compute == jnp.float16:
            new = _rescale(state, new, jnp.isfinite(norm))
        metrics |= {
            "grad_norm": norm,
            "learning_rate": schedule(state.step - state.nonfinite),
            "nonfinite": new.nonfinite,
            "loss_scale": state.loss_scale,
        }
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    reference = reference_kind(step, config)
    return _compiled(train_step, layout, abstract_state(spec, optimizer, layout, config.precision.compute, reference))


def abstract_batch(config: Config, layout: Layout) -> Any:
    """The batch of a step as `jax.ShapeDtypeStruct`s with the sharding that the loader gives it.

    Its rows are whole also where the layout splits sequences: tokens are few bytes, and the model puts its part of them
    in the order of the devices without communication.
    """
    length = config.data.length or config.model.max_length
    no_text, any_vocabulary = empty_row(length, 0), Vocabulary(size=1, mask_id=0)
    row = STEPS[config.train_step].batch.make_row(no_text, row_random(0, 0), any_vocabulary, config.data)
    if is_precomputed(config):
        row = dpo.ReferredPairs(row, np.zeros(2 * MAX_PAIRS, np.float32))
    place = functools.partial(jax.ShapeDtypeStruct, sharding=layout.sharding("batch", None))
    return jax.tree.map(lambda leaf: place((config.data.batch_size, *leaf.shape), leaf.dtype), row)


def abstract_limits(config: Config, layout: Layout) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The third argument of a step, where a spike may keep it from updating."""
    whole = NamedSharding(layout.mesh, P())
    return (jax.ShapeDtypeStruct((2,), jnp.float32, sharding=whole),) if config.train.spike == "skip" else ()


def _compiled(train_step: Callable, layout: Layout, abstract: TrainState) -> Callable:
    def laid_out(state: TrainState, batch: Any, limits: Any = None) -> tuple[TrainState, Metrics]:
        with use_layout(layout):
            return train_step(state, batch, limits)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(laid_out, donate_argnums=0, out_shardings=(shardings, None))


def _update(
    optimizer, clip_norm: float, state: TrainState, gradients: Any, norm: Array, usable: Array, critic_scale: float
) -> TrainState:
    """One optimizer step, or none where the gradient is not usable: decided on the device, before the update.

    Args:
      critic_scale: the learning rate of a critic, as a part of the others'.
    """
    if clip_norm > 0:
        gradients = jax.tree.map(lambda g: g * jnp.minimum(1, clip_norm / norm), gradients)
    updates, moments = optimizer.update(gradients, state.optimizer, state.params)
    if critic_scale != 1:
        updates = updates | {CRITIC: jax.tree.map(lambda u: u * critic_scale, updates[CRITIC])}
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, old)  # noqa: E731
    return state._replace(
        step=state.step + 1,
        params=keep(params, state.params),
        optimizer=keep(moments, state.optimizer),
        nonfinite=state.nonfinite + ~usable,
    )


def _rescale(old: TrainState, new: TrainState, finite: Array) -> TrainState:
    """Dynamic loss scaling (Micikevicius et al. 2018)."""
    age = old.scale_age + 1
    grown = age >= SCALE_PATIENCE
    scale = jnp.where(finite, jnp.where(grown, old.loss_scale * 2, old.loss_scale), old.loss_scale / 2)
    return new._replace(loss_scale=scale, scale_age=jnp.where(finite & ~grown, age, 0))


def make_eval_step(
    step: TrainStep, spec: ModelSpec, config: Config, layout: Layout, num_tokens: int | None = None
) -> Callable[[TrainState, Any], Loss]:
    """Compiles `(state, batch) -> Loss`: the summed loss (in nats where tokens are predicted), what was counted, and
    the metrics of the step.

    That is what the text costs, so without dropout, z-loss and the losses of routers. A pipeline splits the batch into
    its microbatches, so that all stages have work.
    """
    # A token dropped because others are beside it would cost more in one evaluation than in another.
    alone = {"z_loss": 0.0, "router_balance_loss": 0.0, "router_z_loss": 0.0, "expert_dispatch": "dropless"}
    spec = model_spec(dataclasses.replace(spec.config, **alone), spec.adapter)
    compute, options = as_dtype(config.precision.compute), step_options(step, config, num_tokens)
    told = {"options": options} if options else {}
    microbatches = layout.num_microbatches if layout.num_stages > 1 else 1

    def loss(weights, batch):
        return step.loss(spec.merge(weights), batch, dropout=None, **told)

    @jax.jit
    def eval_step(state, batch):
        frozen = Frozen(state.held, spec.held_axes(compute))
        with use_layout(layout):
            batch = referred(step, spec, config, state, batch, microbatches, options)
            return summed_loss(loss, state.params, spec.trained_axes, batch, compute=compute, frozen=frozen)

    return eval_step
