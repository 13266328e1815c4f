"""The model that a run is held against: what it started from, or another one, never trained.

Which weights those are hangs on what is trained:

- "base": an adapter. The frozen model without it: nothing more is held.
- "adapter": an adapter that goes on from another run. A copy of it as it was, beside the frozen model.
- "model": all weights. A copy in the dtype of compute, spread over the devices as the state is.
- "": no reference, or one whose log-probabilities are known already.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.layout.layout import as_dtype
from jaxllm.layout.scope import Frozen, joined, like
from jaxllm.layout.vocabulary import weight_dtype
from jaxllm.model.actor_critic import ActorCritic, without_critic
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.steps.step import Options, TrainStep
from jaxllm.train.config import Config
from jaxllm.train.forward import said_of_rows

Tree = dict[str, Any]


def is_precomputed(config: Config) -> bool:
    """Whether a run has the log-probabilities of its reference from the start (train/precomputed.py)."""
    return config.train_step == "dpo" and config.dpo.reference == "precomputed"


def reference_kind(step: TrainStep, config: Config) -> str:
    """Which reference a run has: one of the kinds above."""
    if not step.options or not step.refers(getattr(config, step.options)):
        return ""
    if is_precomputed(config):
        return ""
    if config.adapter.kind == "none" or config.train.reference:
        return "model"
    return "adapter" if config.adapter.init_from else "base"


def held_reference(kind: str, spec: ModelSpec, params: Tree, compute: jnp.dtype) -> Tree:
    """`TrainState.reference` of a run that starts from `params`, float32. Traceable."""
    if kind == "adapter":
        # A copy: the state is donated to every step, and no array may be given twice.
        return jax.tree.map(jnp.copy, without_critic(spec.own(params)))
    if kind == "model":
        base = spec.base(params)
        return jax.tree.map(lambda w, a: jnp.copy(w.astype(weight_dtype(a, compute))), base, like(spec.axes, base))
    return {}


def reference_model(kind: str, spec: ModelSpec, frozen: Tree, reference: Tree, compute: jnp.dtype) -> tuple:
    """(spec, its weights and their axes) of the reference in a state with these `frozen` and `reference` weights."""
    actor = spec.actor if isinstance(spec, ActorCritic) else spec
    base = model_spec(actor.config)
    if kind == "model":
        return base, Frozen(reference, base.axes)
    held = Frozen(frozen, like(actor.held_axes(compute), frozen))
    if kind == "base":
        return base, held
    return actor, Frozen(joined(held.weights, reference), joined(held.axes, like(actor.axes, reference)))


def referred(
    step: TrainStep, spec: ModelSpec, config: Config, state: Any, batch: Any, microbatches: int, options: Options
):
    """The batch that the step's loss takes: where it has a reference, with what that says of the rows. Traceable."""
    kind = reference_kind(step, config)
    if not kind or step.reference is None:
        return batch
    model, frozen = reference_model(kind, spec, state.frozen, state.reference, as_dtype(config.precision.compute))
    said = said_of_rows(
        lambda weights, rows: step.reference(model.merge(weights), rows, options),
        {},
        {},
        batch,
        num_microbatches=microbatches,
        compute=as_dtype(config.precision.compute),
        frozen=frozen,
    )
    return step.with_reference(batch, said)
