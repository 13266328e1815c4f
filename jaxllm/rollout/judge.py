"""What the models of a run say of answers: the actor, its reference, its critic and a reward model, in one program.

Under the layout of training, whatever that is, and so many rows at a time as training takes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxllm.data.batch import Batch
from jaxllm.layout.layout import Layout, as_dtype, pin, use_layout
from jaxllm.layout.scope import Frozen, like
from jaxllm.model.actor_critic import ActorCritic
from jaxllm.model.head import where_written
from jaxllm.model.spec import ModelSpec
from jaxllm.steps import experience
from jaxllm.steps.step import Options, TrainStep
from jaxllm.train.config import Config
from jaxllm.train.forward import said_of_rows
from jaxllm.train.learner import Weights, model_of, weights_of
from jaxllm.train.reference import reference_kind, reference_model
from jaxllm.train.state import TrainState


class Judged(NamedTuple):
    """Of each token, in its place, and of each text; float32."""

    log_probs: Float[Array, "batch length"]
    reference_log_probs: Float[Array, "batch length"]  # those of the actor where there is no reference
    values: Float[Array, "batch length"]  # 0 where there is no critic
    scores: Float[Array, " batch"]  # 0 where there is no reward model


def make_judge(
    step: TrainStep,
    spec: ModelSpec,
    config: Config,
    layout: Layout,
    options: Options,
    num_microbatches: int,
    scorer: ModelSpec | None,
) -> Callable[[TrainState, Any, Any, Batch], Judged]:
    """Compiles `(state, the reward model's parameters, the model that those are an adapter for, rows) -> Judged`.

    Args:
      scorer: of the reward model. The model it is an adapter for is {} where the run holds that already.
    """
    compute = as_dtype(config.precision.compute)
    actor = model_of(spec)
    kind = reference_kind(step, config)

    def said(model: ModelSpec, weights: Weights, says: Callable, rows: Batch) -> Any:
        return said_of_rows(
            lambda weights, rows: says(model.merge(weights), rows),
            weights.params,
            weights.axes,
            rows,
            num_microbatches=num_microbatches,
            compute=compute,
            frozen=weights.frozen,
        )

    def log_probs(model: Any, rows: Batch) -> Array:
        return experience.answer_log_probs(model, rows, options)

    def judge(state: TrainState, scorer_own: Any, scorer_frozen: Any, rows: Batch) -> Judged:
        with use_layout(layout):
            own = where_written(said(actor, weights_of(state, spec, compute), log_probs, rows))
            reference, values, scores = own, jnp.zeros_like(own), jnp.zeros(own.shape[0], own.dtype)
            if kind:
                model, frozen = reference_model(kind, spec, state.frozen, state.reference, compute)
                reference = where_written(said(model, Weights({}, {}, frozen), log_probs, rows))
            if isinstance(spec, ActorCritic):
                critic = weights_of(state, spec, compute, is_critic=True)
                values = where_written(said(spec.critic, critic, experience.values, rows))
            if scorer is not None:
                # An adapter for the model that the run's own is for shares it.
                held = Frozen(scorer_frozen, scorer.held_axes(compute))
                if scorer.is_adapted and not scorer_frozen:
                    held = Frozen(state.frozen, like(actor.held_axes(compute), state.frozen))
                weights = Weights(scorer_own, scorer.own(scorer.axes), held)
                scores = said(scorer, weights, experience.scores, rows)
            scores = pin(scores, layout, P())  # few, and every process reads them all
        return Judged(own, reference, values, scores)

    return jax.jit(judge)
