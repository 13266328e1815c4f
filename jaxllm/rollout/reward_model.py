"""The reward model of a run: restored once, beside the model that is trained, under the same layout."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.layout.layout import Layout
from jaxllm.model.spec import ModelSpec
from jaxllm.remote.copy import local_copy
from jaxllm.train.config import Config
from jaxllm.train.initial import restore_base
from jaxllm.train.scorer import check_scorer, restore_scorer
from jaxllm.train.state import abstract_base, frozen_state


class RewardModel(NamedTuple):
    """What scores texts; `spec` None where nothing does."""

    spec: ModelSpec | None
    own: Any
    frozen: Any  # {} where it is an adapter for the model that the run's own adapter is for


NO_REWARD_MODEL = RewardModel(None, {}, {})


def check_reward_model(config: Config, tokenizer: Tokenizer) -> None:
    """Refuses a `config.rollout.reward_model` that is none. Raises as `check_scorer`."""
    if config.rollout.reward_model:
        check_scorer("rollout.reward_model", config.rollout.reward_model, tokenizer)


def open_reward_model(
    config: Config, layout: Layout, tokenizer: Tokenizer, base_hash: str, say: Callable[[str], None]
) -> RewardModel:
    """The newest parameters of `config.rollout.reward_model`.

    Args:
      base_hash: of the parameters that the run trains an adapter for; "" where it trains a whole model.
    """
    source = config.rollout.reward_model
    if not source:
        return NO_REWARD_MODEL
    scorer = restore_scorer(source, layout, tokenizer, say)
    if scorer.base_hash in ("", base_hash):
        return RewardModel(scorer.spec, scorer.own, {})
    identity = {"parameter_hash": scorer.base_hash, "step": "?"}
    base = restore_base(local_copy(source), scorer.config, identity, abstract_base(scorer.spec, layout), say)
    frozen = frozen_state(base.params, scorer.spec, layout, config.precision.compute)
    return RewardModel(scorer.spec, scorer.own, frozen)
