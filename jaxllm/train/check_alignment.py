"""What can be said of reward, dpo, ppo and grpo before anything is compiled."""

import math

from jaxllm.errors import UserError
from jaxllm.steps import STEPS
from jaxllm.steps.check_alignment import check_options
from jaxllm.train.config import Config


def check_alignment(config: Config) -> None:
    """Holds the groups reward, dpo, rollout, ppo and grpo against the train step, the model and each other.

    Raises:
      UserError: the first mistake found.
    """
    step, name = STEPS[config.train_step], config.train_step
    _check_scalar_head(config)
    if config.train.reference and not (step.options and step.refers(getattr(config, step.options))):
        raise UserError(
            f"config.train.reference={config.train.reference}: train_step={name} as configured is held against no "
            "reference (kl_weight=0, or a loss without one). Leave it empty."
        )
    if config.train.reference and name == "dpo" and config.dpo.reference == "precomputed":
        raise UserError(
            "config.dpo.reference=precomputed is computed by the model that the run starts from, and "
            f"config.train.reference={config.train.reference} is another. Use --config.dpo.reference=alongside."
        )
    if step.options:
        check_options(name, getattr(config, step.options))
    if step.draws:
        _check_rollout(config)


def _check_scalar_head(config: Config) -> None:
    wanted = STEPS[config.train_step].scalar_head
    if config.model.scalar_head != wanted:
        is_needed = "learns by" if wanted else "does not train"
        raise UserError(
            f"config.train_step={config.train_step} {is_needed} a scalar head. Set --config.model.scalar_head={wanted}."
        )


def _check_rollout(config: Config) -> None:
    rollout, name, size = config.rollout, config.train_step, config.data.batch_size
    for field, least in {"prompts": 1, "samples": 1, "slots": 0, "max_new_tokens": 1, "samples_every": 0}.items():
        value = getattr(rollout, field)
        if value < least:
            raise UserError(f"config.rollout.{field}={value} must be {least} or more.")
    if not rollout.temperature > 0:
        raise UserError(
            f"config.rollout.temperature={rollout.temperature:g} must be above 0: answers are drawn, and learned from "
            "by how probable they were."
        )
    answers = rollout.prompts * rollout.samples
    if answers % size:
        raise UserError(
            f"a rollout has {answers} answers (config.rollout.prompts={rollout.prompts} x samples={rollout.samples}), "
            f"which is no multiple of config.data.batch_size={size}. Nearest: prompts="
            f"{_nearest_prompts(rollout.prompts, rollout.samples, size)}."
        )
    if name == "grpo" and rollout.samples < 2:
        raise UserError(
            f"config.rollout.samples={rollout.samples}: grpo holds the answers to one prompt against each other. "
            "Set it to 2 or more; 8 is common."
        )
    length = config.data.length or config.model.max_length
    if rollout.max_new_tokens >= length:
        raise UserError(
            f"config.rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in a row of {length} "
            f"tokens. Set it to at most {length - 1}, or raise config.data.length."
        )
    if not rollout.rewards and not rollout.reward_model:
        raise UserError(
            f"config.train_step={name} needs a reward: a function, --config.rollout.rewards=FILE.py:NAME, or a reward "
            "model, --config.rollout.reward_model=WORKDIR."
        )
    for field in ("dropout", "attention_dropout", "neftune_alpha"):
        if value := getattr(config.model, field):
            raise UserError(
                f"config.model.{field}={value:g}: {name} learns from how probable an answer was, which noise changes. "
                f"Set --config.model.{field}=0."
            )
    if config.model.num_experts and config.model.expert_dispatch != "dropless":
        raise UserError(
            f"config.model.expert_dispatch={config.model.expert_dispatch}: {name} learns from how probable an answer "
            "was, which must not hang on what is beside it. Set --config.model.expert_dispatch=dropless."
        )
    if config.adapter.dropout:
        raise UserError(
            f"config.adapter.dropout={config.adapter.dropout:g}: {name} learns from how probable an answer was, which "
            "noise changes. Set --config.adapter.dropout=0."
        )


def _nearest_prompts(prompts: int, samples: int, size: int) -> str:
    fitting = size // math.gcd(size, samples)  # and its multiples
    below = prompts // fitting * fitting
    return " or ".join(str(n) for n in (below, below + fitting) if n)
