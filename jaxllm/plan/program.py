"""The train step of a config as a compiled program, without data, without numbers and without the memory for them."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax

from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.data.tokenizer_training import parse_tokenizer
from jaxllm.errors import UserError
from jaxllm.layout.layout import Layout, make_layout
from jaxllm.layout.scope import Tensor, map_leaves
from jaxllm.model.spec import ACTIVATIONS, ModelSpec
from jaxllm.steps import STEPS
from jaxllm.train.config import Config
from jaxllm.train.learner import spec_of
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.reference import reference_kind
from jaxllm.train.state import TrainState, abstract_state
from jaxllm.train.train_step import abstract_batch, make_train_step


class _Fields(NamedTuple):
    config: Config  # its model resolved
    spec: ModelSpec
    layout: Layout
    state: TrainState  # jax.ShapeDtypeStruct with shardings
    batch: Any  # of those, too


class Program(_Fields):
    """What a train step is made of, and the step itself."""

    @cached_property
    def lowered(self) -> jax.stages.Lowered:
        """The train step, lowered for abstract arguments."""
        config = self.config
        optimizer, schedule = _optimizer(config, self.spec), make_schedule(config.optimizer, config.train.steps)
        step = make_train_step(STEPS[config.train_step], self.spec, optimizer, schedule, config, self.layout)
        return step.trace(self.state, self.batch).lower()

    def is_trained(self, path: str) -> bool:
        """Whether the parameter at this path has a gradient."""
        return path in self._trained

    @cached_property
    def _trained(self) -> set[str]:
        return set(map_leaves(lambda w, _: w, self.state.params, self.spec.trained_axes))

    @property
    def activations(self) -> dict[str, Tensor]:
        """The main activations of one microbatch, whole, by name."""
        batch, length = jax.tree.leaves(self.batch)[0].shape
        model, rows = self.config.model, batch // self.layout.num_microbatches
        sizes = {
            "batch": rows,
            "length": length,
            "residual_length": length,
            "embed": model.embed_dim,
            "residual_embed": model.embed_dim,
            "heads": model.num_heads,
            "kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "mlp": model.mlp_dim,
            "vocab": model.vocab_size,
        }
        return {name: Tensor(axes, tuple(sizes[axis] for axis in axes)) for name, axes in ACTIVATIONS.items()}

    @property
    def branch_runs(self) -> int:
        """How often a stage of a pipeline does each of its actions; 0 without a pipeline."""
        layout = self.layout
        return layout.num_microbatches * layout.virtual_stages if layout.num_stages > 1 else 0


def make_program(config: Config, devices: Sequence[jax.Device] | None = None) -> Program:
    """The train step of `config` on `devices` (default: all); nothing is traced yet.

    Raises:
      UserError: a model whose vocabulary is that of a tokenizer which is not there.
    """
    model = config.model.resolved(0 if config.model.vocab_size else _vocab_size(config))
    spec = spec_of(dataclasses.replace(config, model=model))
    layout = make_layout(
        config.mesh, config.layout, reduce_dtype=config.precision.gradients, devices=devices and list(devices)
    )
    reference = reference_kind(STEPS[config.train_step], config)
    state = abstract_state(spec, _optimizer(config, spec), layout, config.precision.compute, reference)
    return Program(dataclasses.replace(config, model=model), spec, layout, state, abstract_batch(config, layout))


def without_inputs(config: Config) -> Config:
    """The config as a plan takes it: what must be there to train and is not read here need not be named.

    That is the base of an adapter, and rewards.
    """
    train, rollout = config.train, config.rollout
    if config.adapter.kind != "none" and not train.init_from:
        train = dataclasses.replace(train, init_from="a base to come")
    if not rollout.rewards and not rollout.reward_model:
        rollout = dataclasses.replace(rollout, rewards="a reward to come")
    return dataclasses.replace(config, train=train, rollout=rollout)


def lower_train_step(config: Config, devices: Sequence[jax.Device] | None = None) -> jax.stages.Lowered:
    """The train step of `config`, lowered for abstract arguments on `devices` (default all). Raises: `make_program`."""
    return make_program(config, devices).lowered


def _optimizer(config: Config, spec: ModelSpec) -> Any:
    return make_optimizer(config.optimizer, config.train.steps, spec.trained_axes)


def _vocab_size(config: Config) -> int:
    """As many as the tokenizer has: those of its file, or as many as it will be trained for."""
    trained = parse_tokenizer(config.data.tokenizer)
    if trained:
        return trained[1]
    try:
        return load_tokenizer(config.data.tokenizer).vocab_size
    except UserError as error:
        raise UserError(
            f"config.model.vocab_size=0 is that of the tokenizer, which cannot be read: {error}\n"
            "Say it instead: --config.model.vocab_size=N."
        ) from None
