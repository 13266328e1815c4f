"""The state that a run begins with: restored from its own checkpoint, started from another run, or fresh."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import optax

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.layout.layout import Layout, as_dtype
from jaxllm.model.spec import ModelSpec
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.config import Config
from jaxllm.train.initial import Base, has_scalar_head, prompt_tokens, restore_base, restore_initial
from jaxllm.train.initial_adapter import restore_initial_adapter
from jaxllm.train.reference import held_reference
from jaxllm.train.scorer import restore_critic
from jaxllm.train.state import (
    Params,
    TrainState,
    abstract_base,
    frozen_state,
    init_state,
    init_state_from,
    placed_reference,
)


class Begun(NamedTuple):
    """Where a run starts."""

    state: TrainState
    step: int
    data: dict[str, Any] | None  # the state of the source of its batches; None in a fresh run
    arrays: dict[str, Any]  # of that source
    identities: dict[str, dict[str, Any]]  # "base", "reference": which parameters are held beside those trained


class Beginner(NamedTuple):
    """What the start of a run hangs on."""

    config: Config
    workdir: Path
    spec: ModelSpec
    optimizer: optax.GradientTransformation
    layout: Layout
    reference: str  # its kind (train/reference.py)
    tokenizer: Tokenizer
    say: Callable[[str], None]

    def begin(self, checkpoints: Checkpoints, abstract: TrainState, arrays: dict[str, Any]) -> Begun:
        """The state from the newest checkpoint, or a fresh one.

        Args:
          abstract, arrays: what is restored, as `jax.ShapeDtypeStruct`s with shardings.

        Raises:
          UserError: what a fresh run starts from, or a restored one needs besides, is not there.
        """
        restored = checkpoints.restore(abstract, arrays)
        if restored is None:
            return self._fresh(abstract)
        state, run, identities = restored.state, restored.run, {"base": restored.run["base"]}
        base = None
        if self.spec.is_adapted:
            base = self._base(run["base"])
            frozen = frozen_state(base.params, self.spec, self.layout, self.config.precision.compute)
            state = state._replace(frozen=frozen)
        if self.reference in ("model", "adapter"):
            identities["reference"] = run["reference"]
            state = state._replace(reference=self._reference(run["reference"], abstract))
        self.say(f"resumed at step {restored.step}, parameter hash {run['parameter_hash']} as saved")
        return Begun(state, restored.step, restored.data, restored.arrays, identities)

    def _fresh(self, abstract: TrainState) -> Begun:
        config, spec, compute = self.config, self.spec, self.config.precision.compute
        if not config.train.init_from:
            state = init_state(spec, self.optimizer, self.layout, config.seed, compute, self.reference)
            return Begun(state, 0, None, {}, {"base": {}, "reference": {}})
        scores = spec.config.scalar_head and not spec.is_adapted and has_scalar_head(config.train.init_from)
        base = restore_initial(config.train.init_from, abstract_base(spec, self.layout, scores), self.say)
        adapter, identity = None, base.identity
        if config.adapter.init_from:
            adapter, identity = restore_initial_adapter(config, base, abstract, self.say)
        critic = restore_critic(config, spec, self.layout, self.tokenizer, self.say)
        prompt = prompt_tokens(config.adapter, self.tokenizer)
        more = (compute, prompt, adapter, self.reference, critic)
        state = init_state_from(base.params, spec, self.optimizer, self.layout, config.seed, *more)
        if config.train.reference and self.reference == "model":
            other = restore_initial(config.train.reference, abstract_base(spec, self.layout), self.say)
            state, identity = state._replace(reference=self._of_model(other.params, abstract)), other.identity
        identities = {"base": base.identity if spec.is_adapted else {}, "reference": identity}
        return Begun(state, 0, None, {}, identities)

    def _base(self, identity: dict[str, Any], source: str = "") -> Base:
        abstract = abstract_base(self.spec, self.layout)
        return restore_base(self.workdir, self.config, identity, abstract, self.say, source)

    def _reference(self, identity: dict[str, Any], abstract: TrainState) -> Params:
        """The reference of a run that goes on: what it was at the start."""
        spec, compute = self.spec, as_dtype(self.config.precision.compute)
        if self.reference == "adapter":
            return restore_initial_adapter(self.config, None, abstract, self.say, identity)[0]
        if not identity:
            make = lambda: held_reference("model", spec, spec.init(self.config.seed), compute)  # noqa: E731
            return placed_reference(make, abstract)
        return self._of_model(self._base(identity, self.config.train.reference).params, abstract)

    def _of_model(self, params: Params, abstract: TrainState) -> Params:
        compute = as_dtype(self.config.precision.compute)
        return placed_reference(lambda p: held_reference("model", self.spec, p, compute), abstract, params)
