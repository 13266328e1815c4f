"""Two models in one tree of parameters: an actor, which writes, and a critic, which says what it expects of a text.

The critic's parameters are those of the tree's branch `critic`, the actor's are all others. So one optimizer, one train
state and one checkpoint hold both. Where an adapter is trained both have one, beside one frozen language model.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.layout.scope import Frozen, joined, like
from jaxllm.model.adapters import AddedParam
from jaxllm.model.lora_trees import started
from jaxllm.model.spec import ModelSpec, Tree, model_spec
from jaxllm.model.transformer import Transformer

CRITIC = "critic"


class ActorCritic(ModelSpec):
    """The spec of both. `config`, `graph` and what `merge` returns are the actor's."""

    @cached_property
    def actor(self) -> ModelSpec:
        return model_spec(self.config, self.adapter)

    @cached_property
    def critic(self) -> ModelSpec:
        return critic_spec(self.actor)

    def init(self, seed: int) -> Tree:
        """Fresh parameters of both; the critic expects nothing, whatever it reads."""
        return joined(self.actor.init(seed), {CRITIC: _expecting_nothing(self.critic.own(self.critic.init(seed)))})

    def merge(self, params: Tree) -> Transformer:
        return self.actor.merge(without_critic(params))


def with_critic(actor: ModelSpec) -> ActorCritic:
    """The spec of this model and a critic of its kind."""
    critic = critic_spec(actor)
    kinds = {path: kind if kind is not nnx.Param else AddedParam for path, kind in critic.kinds.items()}
    return ActorCritic(
        config=actor.config,
        graph=actor.graph,
        shapes=joined(actor.shapes, {CRITIC: critic.own(critic.shapes)}),
        axes=joined(actor.axes, {CRITIC: critic.own(critic.axes)}),
        adapter=actor.adapter,
        kinds=actor.kinds | {f"{CRITIC}.{path}": kind for path, kind in kinds.items()},
    )


def critic_spec(actor: ModelSpec) -> ModelSpec:
    """A model like the actor with a scalar head; it has no use for a head of its own over the vocabulary."""
    tied = actor.config.tied_head or not actor.is_adapted
    return model_spec(dataclasses.replace(actor.config, scalar_head=True, tied_head=tied), actor.adapter)


def without_critic(tree: Tree) -> Tree:
    """The actor's part of a tree."""
    return {key: value for key, value in tree.items() if key != CRITIC}


def _expecting_nothing(critic: Tree) -> Tree:
    """A critic's own parameters with a scalar head of zeros."""
    return critic | {"score": jax.tree.map(jnp.zeros_like, critic["score"])}


def started_run(spec: ModelSpec, base: Tree, seed: int, prompt: Sequence[int] = (), critic: Tree | None = None) -> Tree:
    """All parameters at the start of a run beside the model `base`: `started`, and where there is a critic its own too.

    Traceable.

    Args:
      critic: its own parameters; default: it starts as the actor does, with a scalar head of zeros.
    """
    if not isinstance(spec, ActorCritic):
        return started(spec, base, seed, prompt)
    if critic is None:
        beside = like(base, spec.critic.base(spec.critic.shapes))
        critic = _expecting_nothing(spec.critic.own(started(spec.critic, beside, seed, prompt)))
    return joined(started(spec.actor, base, seed, prompt), {CRITIC: critic})


def part_of(frozen: Frozen, critic: bool) -> Frozen:
    """What the actor or the critic computes with of the weights that are not trained."""

    def part(tree: dict[str, Any]) -> dict[str, Any]:
        return joined(without_critic(tree), tree.get(CRITIC, {})) if critic else without_critic(tree)

    return Frozen(part(frozen.weights), part(frozen.axes))
