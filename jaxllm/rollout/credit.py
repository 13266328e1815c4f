"""Which tokens of an answer its reward is owed to: advantages, and what a critic is to learn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.data.batch import Batch
from jaxllm.layout.layout import Layout
from jaxllm.layout.mesh import one_at_a_time
from jaxllm.rollout.judge import Judged
from jaxllm.steps.advantages import gae, group_advantages, kl_estimate, next_kl_weight, token_rewards, whiten
from jaxllm.steps.alignment_config import GRPOConfig, PPOConfig
from jaxllm.steps.experience import Experience
from jaxllm.train.config import Config


class Credit(NamedTuple):
    """What is learned from a rollout."""

    experience: Experience
    metrics: dict[str, Float[Array, ""]]
    next_kl_weight: Float[Array, ""]


def make_credit(config: Config, layout: Layout) -> Callable[..., Credit]:
    """Compiles `(rows, judged, rewards [batch], is_whole [batch], sampled_log_probs, kl_weight) -> Credit`."""
    owed = {"ppo": _ppo, "grpo": _grpo}[config.train_step]
    rows = layout.sharding("batch", None)

    def credit(
        batch: Batch,
        judged: Judged,
        rewards: Float[Array, " batch"],
        is_whole: Bool[Array, " batch"],
        sampled: Float[Array, "batch length"],
        kl_weight: Float[Array, ""],
    ) -> Credit:
        mask = batch.loss_mask
        found, metrics, following = owed(config, batch, judged, rewards, is_whole, kl_weight)
        off = jnp.where(mask, jnp.abs(judged.log_probs - sampled), 0)
        metrics |= {
            "log_prob_difference": _token_mean(off, mask),
            "log_prob_difference_max": off.max(),
            "kl": _answer_mean(kl_estimate(judged.log_probs, judged.reference_log_probs, "k1"), mask),
            "kl_per_token": _token_mean(kl_estimate(judged.log_probs, judged.reference_log_probs, "k3"), mask),
        }
        return Credit(found, metrics, jnp.asarray(following, jnp.float32))

    return one_at_a_time(jax.jit(credit, out_shardings=Credit(rows, None, None)))


def _ppo(config: Config, batch: Batch, judged: Judged, rewards: Any, is_whole: Any, kl_weight: Any):
    """Rewards at the end of answers, the divergence at each token; generalised advantage estimates of both."""
    group: PPOConfig = config.ppo
    mask = batch.loss_mask
    by_token = token_rewards(rewards, judged.log_probs, judged.reference_log_probs, mask, kl_weight, group.kl_estimator)
    if group.whiten_rewards:
        by_token = whiten(by_token, mask, shift_mean=False)
    advantages, returns = gae(by_token, judged.values, mask, group.discount, group.gae_lambda)
    if group.whiten_advantages:
        advantages = whiten(advantages, mask)
    kl = _answer_mean(kl_estimate(judged.log_probs, judged.reference_log_probs, "k1"), mask)
    following = kl_weight
    if group.kl_target > 0:
        following = next_kl_weight(kl_weight, kl, group.kl_target, group.kl_horizon, mask.shape[0])
    experience = _experience(batch, judged, advantages, returns, mask)
    return experience, {"kl_penalty": kl_weight * kl, "value": _token_mean(judged.values, mask)}, following


def _grpo(config: Config, batch: Batch, judged: Judged, rewards: Any, is_whole: Any, kl_weight: Any):
    """Each answer against the others to its prompt; all its tokens are owed the same."""
    group: GRPOConfig = config.grpo
    groups = rewards.reshape(-1, config.rollout.samples)
    advantages = group_advantages(groups, group.advantage_scale).reshape(-1)
    is_equal = jnp.ptp(groups, axis=1) == 0
    mask = batch.loss_mask
    if group.mask_truncated:
        mask &= is_whole[:, None]
    if group.drop_equal_groups:
        mask &= ~jnp.repeat(is_equal, config.rollout.samples)[:, None]
    owed = jnp.where(mask, advantages[:, None], 0)
    return _experience(batch, judged, owed, owed, mask), {"equal_groups": is_equal.mean()}, kl_weight


def _experience(batch: Batch, judged: Judged, advantages: Array, returns: Array, mask: Array) -> Experience:
    said = (judged.log_probs, judged.reference_log_probs, advantages, returns, judged.values)
    return Experience(*batch._replace(loss_mask=mask), *[jnp.where(mask, x, 0).astype(jnp.float32) for x in said])


def _token_mean(x: Float[Array, "batch length"], mask: Bool[Array, "batch length"]) -> Float[Array, ""]:
    return jnp.where(mask, x, 0).sum() / jnp.maximum(mask.sum(), 1)


def _answer_mean(x: Float[Array, "batch length"], mask: Bool[Array, "batch length"]) -> Float[Array, ""]:
    """The mean over answers of the sum over their tokens."""
    return jnp.where(mask, x, 0).sum(1).mean()
