"""The values of a config, each by itself: numbers against their ranges, texts against what can be a text or a path."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from jaxllm.errors import UserError
from jaxllm.train.config import Config

_AT_LEAST = {
    "model.num_layers": 1,
    "model.embed_dim": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 0,
    "model.head_dim": 0,
    "model.mlp_dim": 0,
    "model.vocab_size": 0,
    "model.max_length": 2,
    "model.sliding_window": 0,
    "model.token_types": 0,
    "model.num_experts": 0,
    "model.experts_per_token": 1,
    "model.router_balance_loss": 0,
    "model.router_z_loss": 0,
    "model.rope_factor": 1,
    "model.rope_original_length": 0,
    "model.rope_attention_factor": 0,
    "model.z_loss": 0,
    "model.neftune_alpha": 0,
    "adapter.rank": 1,
    "adapter.num_virtual_tokens": 1,
    "adapter.encoder_dim": 0,
    "adapter.encoder_layers": 1,
    "layout.num_microbatches": 1,
    "layout.virtual_stages": 1,
    "data.length": 0,
    "data.batch_size": 1,
    "train.steps": 1,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.eval_batches": 0,
    "train.checkpoint_every": 0,
    "train.keep": 1,
    "train.keep_best": 0,
    "train.max_nonfinite": 0,
    "train.spike_window": 2,
    "train.spike_steps": 1,
    "train.audit_every": 0,
    "train.hang_timeout": 0,
    "train.max_unsaved_minutes": 0,
    "train.profile_start": -1,
    "train.profile_steps": 1,
    "rollout.reward_clip": 0,
    "rollout.samples_written": 0,
    "rollout.eval_prompts": 0,
}

_ABOVE_ZERO = (
    "model.rope_theta",
    "model.rope_low_frequency_factor",
    "model.rope_high_frequency_factor",
    "model.rope_beta_fast",
    "model.rope_beta_slow",
    "model.capacity_factor",
    "model.norm_epsilon",
    "model.init_std",
    "adapter.alpha",
    "train.spike_z",
)

# name: (rule, what it says)
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "model.dropout": (lambda x: 0 <= x < 1, "from 0 up to, not including, 1"),
    "model.attention_dropout": (lambda x: 0 <= x < 1, "from 0 up to, not including, 1"),
    "adapter.dropout": (lambda x: 0 <= x < 1, "from 0 up to, not including, 1"),
    "data.mask_fraction": (lambda x: 0 < x < 1, "between 0 and 1"),
    "layout.zero_stage": (lambda x: x in (0, 1, 2, 3), "0, 1, 2 or 3"),
}

# Far above what anybody trains. Beyond, arrays cannot be indexed, or only to describe the model fills the memory.
_LARGEST = 2**31 - 1
_AT_MOST = {
    "model.num_layers": 2**16,
    "model.embed_dim": 2**22,
    "model.num_heads": 2**14,
    "model.num_kv_heads": 2**14,
    "model.head_dim": 2**14,
    "model.mlp_dim": 2**24,
    "model.vocab_size": 2**28,
    "model.max_length": 2**26,
    "model.token_types": 2**16,
    "model.num_experts": 2**16,
    "adapter.rank": 2**16,
    "adapter.num_virtual_tokens": 2**20,
    "adapter.encoder_dim": 2**20,
    "adapter.encoder_layers": 2**10,
    "layout.num_microbatches": 2**16,
    "layout.virtual_stages": 2**10,
    "data.batch_size": 2**24,
    "rollout.prompts": 2**20,
    "rollout.samples": 2**16,
    "rollout.slots": 2**20,
}


# Texts that name no files.
_NO_PATHS = {"adapter.prompt_text", "adapter.targets", "optimizer.decay_mask", "layout.rule_overrides", "data.fields"}
_NO_PATHS |= {"train.wandb_project"}
_LONGEST_NAME = 255  # bytes between two slashes, to a file system


def check_values(config: Config) -> None:
    """Raises a UserError on a number that is out of its range or not finite, and on a text that cannot be one."""
    every = dict(_leaves(dataclasses.asdict(config)))
    _check_numbers(config, every)
    for name, value in every.items():
        if isinstance(value, str):
            _check_text(name, value)


def _check_text(name: str, value: str) -> None:
    if not value.isprintable() and ("\0" in value or re.search("[\ud800-\udfff]", value)):
        raise UserError(f"config.{name}={value!r} is no text: it holds a NUL, or bytes that are not UTF-8.")
    if name in _NO_PATHS or (name == "data.held_out" and not value.startswith("file:")):
        return
    if long := next((part for part in re.split("[/,:=]", value) if len(part.encode()) > _LONGEST_NAME), None):
        raise UserError(
            f"config.{name} names {long!r}: {len(long.encode())} bytes, more than the {_LONGEST_NAME} that the name of "
            "a file or folder may have."
        )


def _check_numbers(config: Config, every: dict[str, Any]) -> None:
    for name, least in _AT_LEAST.items():
        _refuse_unless(value_of(config, name) >= least, config, name, f"{least} or more")
    for name in _ABOVE_ZERO:
        _refuse_unless(value_of(config, name) > 0, config, name, "above 0")
    if not 0 <= config.seed < 2**32:  # JAX's keys take no more of it
        raise UserError(f"config.seed={config.seed} must be from 0 up to {2**32 - 1}.")
    for name, (rule, says) in _RANGES.items():
        _refuse_unless(rule(value_of(config, name)), config, name, says)
    for name, most in _AT_MOST.items():
        _refuse_unless(value_of(config, name) <= most, config, name, f"{most} or less")
    for name, value in every.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{name}={value} must be a finite number.")
        if isinstance(value, int) and not isinstance(value, bool) and name != "seed" and abs(value) > _LARGEST:
            raise UserError(f"config.{name}={value} must be {_LARGEST} or less{', either sign' * (value < 0)}.")


def value_of(config: Config, name: str) -> Any:
    """That of the field `name`, "group.field"."""
    group, field = name.split(".")
    return getattr(getattr(config, group), field)


def _refuse_unless(fine: bool, config: Config, name: str, says: str) -> None:
    if not fine:  # a NaN is refused too: every comparison with it is false
        raise UserError(f"config.{name}={value_of(config, name)} must be {says}.")


def _leaves(group: dict[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """ "group.field" and value, of every field of a config."""
    for name, value in group.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{within}{name}.")
        else:
            yield within + name, value
