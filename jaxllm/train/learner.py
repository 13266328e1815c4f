"""What learns in a step: a model, the loss it learns by, and its part of the train state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.layout.layout import Layout, as_dtype
from jaxllm.layout.scope import Frozen
from jaxllm.model.actor_critic import CRITIC, ActorCritic, part_of, with_critic, without_critic
from jaxllm.model.dropout import dropout_key
from jaxllm.model.head import Loss
from jaxllm.model.moe import router_metrics
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.steps import STEPS
from jaxllm.steps.step import Metrics, Options, TrainStep
from jaxllm.train.config import Config
from jaxllm.train.gradients import loss_and_gradients
from jaxllm.train.state import TrainState


class Weights(NamedTuple):
    """What a model computes with: what of it is trained, with logical axes, and what is not."""

    params: Any
    axes: Any
    frozen: Frozen


def model_of(spec: ModelSpec, is_critic: bool = False) -> ModelSpec:
    """The spec of the model that a run trains, or of its critic."""
    if not isinstance(spec, ActorCritic):
        return spec
    return spec.critic if is_critic else spec.actor


def weights_of(state: TrainState, spec: ModelSpec, compute: jnp.dtype, is_critic: bool = False) -> Weights:
    """Those of the model that a run trains, or of its critic, in a state of `spec`."""
    model = model_of(spec, is_critic)
    params = state.params[CRITIC] if is_critic else without_critic(state.params)
    frozen = part_of(Frozen(state.held, {}), is_critic).weights
    return Weights(params, model.trained_axes, Frozen(frozen, model.held_axes(compute)))


class Learner(NamedTuple):
    """A model that learns."""

    loss: Callable[..., Loss]
    whole: ModelSpec  # of all that the run trains
    is_critic: bool = False
    weight: float = 1.0  # of its loss beside that of another model
    derived: Callable[[Metrics], Metrics] = lambda metrics: metrics

    @property
    def spec(self) -> ModelSpec:
        return model_of(self.whole, self.is_critic)

    @property
    def prefix(self) -> str:
        """Of the names of its metrics."""
        return f"{CRITIC}_" if self.is_critic else ""

    def gradients(self, state: TrainState, batch: Any, config: Config, layout: Layout) -> tuple[Metrics, Any]:
        """Its metrics, loss and weight among them, and the gradient of its mean loss: a part of a tree like params."""
        compute, spec = as_dtype(config.precision.compute), self.spec
        params, axes, frozen = weights_of(state, self.whole, compute, self.is_critic)
        rows, tokens = jax.tree.leaves(batch)[0].shape[0], jax.tree.leaves(batch)[0].size
        stream = dropout_key(config.seed, state.step, jnp.arange(rows)) if _uses_dropout(spec) else None

        def loss(weights, inputs):
            batch, stream = inputs
            return self.loss(spec.merge(weights), batch, dropout=stream)

        # A mean over the batch's slots is differentiated, and the mean over what is counted made of it afterwards: the
        # sum over a million tokens would not fit float16.
        summed = loss_and_gradients(
            loss,
            params,
            axes,
            (batch, stream),
            num_microbatches=layout.num_microbatches,
            compute=compute,
            accumulate=as_dtype(config.precision.gradients),
            scale=state.loss_scale / tokens,
            frozen=frozen,
        )
        weight = jnp.where(summed.weight > 0, summed.weight, 1)
        scale = self.weight * tokens / (weight * state.loss_scale)
        gradients = jax.tree.map(lambda g: g * scale, summed.gradients)
        metrics = {"loss": summed.total / weight, "weight": summed.weight, **means(summed.metrics)}
        metrics = self.derived(metrics) | router_metrics(summed.statistics)
        return metrics, {CRITIC: gradients} if self.is_critic else gradients


def make_learners(step: TrainStep, spec: ModelSpec, config: Config, num_tokens: int | None) -> list[Learner]:
    """The model of `spec`, and its critic."""
    options = step_options(step, config, num_tokens)
    told = {"options": options} if options else {}

    def with_options(loss: Callable[..., Loss]) -> Callable[..., Loss]:
        return lambda model, batch, *, dropout: loss(model, batch, dropout=dropout, **told)

    if not isinstance(spec, ActorCritic):
        return [Learner(with_options(step.loss), spec, derived=step.derived)]
    weight = step.critic_weight(options.group)
    return [
        Learner(with_options(step.loss), spec, derived=step.derived),
        Learner(with_options(step.critic), spec, is_critic=True, weight=weight, derived=step.derived),
    ]


def spec_of(config: Config, vocab_size: int = 0) -> ModelSpec:
    """The spec of what a run trains: its model, with a critic where its step has one.

    Args:
      vocab_size: the tokenizer's, for a model that takes it from there.
    """
    spec = model_spec(config.model.resolved(vocab_size), config.adapter)
    return with_critic(spec) if STEPS[config.train_step].critic else spec


def step_options(step: TrainStep, config: Config, num_tokens: int | None) -> Options | None:
    """What the losses of a step are told of the config."""
    if not step.options:
        return None
    rollout = config.rollout
    return Options(getattr(config, step.options), num_tokens, rollout.temperature, rollout.max_new_tokens)


def critic_scale(config: Config) -> float:
    """The critic's learning rate as a part of the actor's."""
    return (config.ppo.critic_learning_rate or config.optimizer.learning_rate) / config.optimizer.learning_rate


def means(metrics: dict[str, Any] | None) -> Metrics:
    """Each metric of a loss, divided; 0 where there was nothing to count."""
    return {name: mean.total / jnp.where(mean.count > 0, mean.count, 1) for name, mean in (metrics or {}).items()}


def _uses_dropout(spec: ModelSpec) -> bool:
    model = spec.config
    return max(model.dropout, model.attention_dropout, model.neftune_alpha, spec.adapter.dropout) > 0
