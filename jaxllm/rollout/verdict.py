"""What answers are worth: functions of the user's and a reward model, each with its weight."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float

from jaxllm.data.prompts import Prompt
from jaxllm.rollout.rewards import Answered, RewardFunction, call_reward
from jaxllm.rollout.writer import Written
from jaxllm.steps.rollout_config import RolloutConfig

MODEL = "model"  # the reward model's name in metrics


class Verdict(NamedTuple):
    """Of each answer."""

    rewards: Float[np.ndarray, " batch"]  # all in all
    parts: dict[str, Float[np.ndarray, " batch"]]  # by function, before its weight; the reward model's as "model"
    is_whole: Bool[np.ndarray, " batch"]  # it has ended, and was not cut at the most tokens

    @property
    def record(self) -> dict[str, float]:
        """For the log: reward, its standard deviation, and the means of the parts."""
        parts = {f"reward_{name}": float(values.mean()) for name, values in self.parts.items()}
        return {"reward": float(self.rewards.mean()), "reward_std": float(self.rewards.std()), **parts}


def judge_answers(
    config: RolloutConfig,
    functions: Sequence[RewardFunction],
    prompts: Sequence[Prompt],
    written: Written,
    scores: Float[np.ndarray, " batch"],
) -> Verdict:
    """The weighed sum of all rewards, cut to `reward_clip`, less the penalty of an answer that does not end.

    Args:
      scores: the reward model's; not looked at where there is none.
    """
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    answered = Answered([prompt.text for prompt in prompts], written.texts, columns)
    parts = {function.name: _agreed(call_reward(function, answered)) for function in functions}
    weights = {function.name: function.weight for function in functions}
    if config.reward_model:
        parts[MODEL], weights[MODEL] = scores, config.reward_model_weight
    rewards = np.zeros(len(prompts), np.float32)
    for name, values in parts.items():
        rewards += np.float32(weights[name]) * values
    if config.reward_clip > 0:
        rewards = rewards.clip(-config.reward_clip, config.reward_clip)
    is_whole = np.array([answer.finish_reason == "stop" for answer in written.answers])
    return Verdict(rewards - np.float32(config.missing_end_penalty) * ~is_whole, parts, is_whole)


def _agreed(rewards: Float[np.ndarray, " batch"]) -> Float[np.ndarray, " batch"]:
    """What the first process's function said: another's may draw lots."""
    return multihost_utils.broadcast_one_to_all(rewards) if jax.process_count() > 1 else rewards
