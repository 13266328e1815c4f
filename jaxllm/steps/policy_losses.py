"""Losses of policies and of critics, pure functions of log-probabilities, values and masks.

Arrays are float32 [batch, length], one answer a row, unless it is said otherwise; `mask` is true on the tokens of
answers, and what stands elsewhere adds nothing, not to gradients either.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.model.head import Loss, Mean
from jaxllm.steps.advantages import LARGEST_LOG_RATIO, kl_estimate
from jaxllm.steps.alignment_config import GRPOConfig, PPOConfig

Tokens = Float[Array, "batch length"]
Mask = Bool[Array, "batch length"]
Metrics = dict[str, Float[Array, ""]]
ROUNDING = 1e-6  # a variance that is no more of the mean square is float32's rounding


def policy_loss(
    log_p: Tokens, old_log_p: Tokens, advantages: Tokens, mask: Mask, entropy: Tokens, options: PPOConfig
) -> Loss:
    """Sum over tokens of max(-A r, -A clip(r, 1 - clip, 1 + clip)) - entropy_weight * entropy, r = p / old p.

    Schulman et al. 2017, equation 7. Weight: the tokens.

    Metrics: ratio, clip_fraction (of tokens whose gradient the clip takes), policy_kl (k3 of the policy that wrote
    against this one, nats a token), entropy.
    """
    ratio = _ratio(log_p, old_log_p, mask)
    clipped = jnp.clip(ratio, 1 - options.clip, 1 + options.clip)
    free, bound = -advantages * ratio, -advantages * clipped
    losses = jnp.maximum(free, bound) - options.entropy_weight * entropy
    number = mask.sum().astype(jnp.float32)
    metrics = _policy_metrics(log_p, old_log_p, ratio, entropy, mask) | {"clip_fraction": _mean(bound > free, mask)}
    return Loss(_sum(losses, mask), number, metrics=metrics)


def value_loss(values: Tokens, old_values: Tokens, returns: Tokens, mask: Mask, options: PPOConfig) -> Loss:
    """Sum over tokens of 0.5 max((V - R)^2, (clip(V, old V - value_clip, old V + value_clip) - R)^2).

    As OpenAI's and TRL's PPO have it. Weight: the tokens.

    Metrics: clip_fraction, and what `explained_variance` takes.
    """
    values, old_values, returns = (jnp.where(mask, x, 0) for x in (values, old_values, returns))
    clipped = jnp.clip(values, old_values - options.value_clip, old_values + options.value_clip)
    free, bound = (values - returns) ** 2, (clipped - returns) ** 2
    moments = {
        "error": values - returns,
        "error_squared": free,
        "return": returns,
        "return_squared": returns**2,
        "clip_fraction": bound > free,
    }
    metrics = {name: _mean(x, mask) for name, x in moments.items()}
    return Loss(0.5 * _sum(jnp.maximum(free, bound), mask), mask.sum().astype(jnp.float32), metrics=metrics)


def explained_variance(metrics: Metrics) -> Metrics:
    """The metrics of `value_loss` with explained_variance = 1 - Var(V - R) / Var(R) in place of the moments.

    It is 0 where the returns are all the same. Metrics without those moments stay as they are.
    """
    if "return_squared" not in metrics:
        return metrics
    rest = dict(metrics)
    error, squared = rest.pop("error"), rest.pop("error_squared")
    mean_square = rest.pop("return_squared")
    variance = mean_square - rest["return"] ** 2
    varies = variance > ROUNDING * mean_square
    unexplained = (squared - error**2) / jnp.where(varies, variance, 1)
    return rest | {"explained_variance": jnp.where(varies, 1 - unexplained, 0)}


def grpo_loss(
    log_p: Tokens,
    old_log_p: Tokens,
    reference_log_p: Tokens | None,
    advantages: Tokens | Float[Array, " batch"],
    mask: Mask,
    entropy: Tokens,
    max_new_tokens: int,
    options: GRPOConfig,
) -> Loss:
    """The clipped policy loss, kl_weight * k3 from the reference, and -entropy_weight * entropy, of each token.

    Shao et al. 2024, equation 3; clipped apart above and below by Yu et al. 2025 (DAPO). How tokens are put together:

    - sequence_mean: the mean over answers of the mean over their tokens (GRPO).
    - token_mean: the mean over all tokens (DAPO).
    - max_length: the sum over all tokens, by answers x max_new_tokens (Liu et al. 2025, Dr. GRPO).

    Args:
      advantages: of tokens, or of whole answers.

    Metrics: those of `policy_loss`, with clip_low_fraction and clip_high_fraction; kl_reference (k3, nats a token).
    """
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    ratio = _ratio(log_p, old_log_p, mask)
    clipped = jnp.clip(ratio, 1 - options.clip_low, 1 + options.clip_high)
    free, bound = -advantages * ratio, -advantages * clipped
    losses = jnp.maximum(free, bound)
    if options.dual_clip > 0:
        losses = jnp.where(advantages < 0, jnp.minimum(losses, -advantages * options.dual_clip), losses)
    metrics = _policy_metrics(log_p, old_log_p, ratio, entropy, mask) | {
        "clip_fraction": _mean(bound > free, mask),
        "clip_low_fraction": _mean((bound > free) & (ratio < 1), mask),
        "clip_high_fraction": _mean((bound > free) & (ratio > 1), mask),
    }
    if options.kl_weight > 0:
        assert reference_log_p is not None
        divergence = kl_estimate(*(jnp.where(mask, x, 0) for x in (log_p, reference_log_p)), "k3")
        losses += options.kl_weight * divergence
        metrics["kl_reference"] = _mean(divergence, mask)
    losses -= options.entropy_weight * entropy
    tokens = mask.sum(axis=1, keepdims=True).astype(jnp.float32)
    if options.aggregation == "token_mean":
        return Loss(_sum(losses, mask), tokens.sum(), metrics=metrics)
    if options.aggregation == "max_length":
        answers = jnp.float32(mask.shape[0])
        return Loss(_sum(losses, mask), answers * max_new_tokens, metrics=metrics)
    return Loss(_sum(losses / jnp.maximum(tokens, 1), mask), (tokens > 0).sum().astype(jnp.float32), metrics=metrics)


def _ratio(log_p: Tokens, old_log_p: Tokens, mask: Mask) -> Tokens:
    difference = jnp.where(mask, log_p - old_log_p, 0)
    return jnp.exp(jnp.clip(difference, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))


def _policy_metrics(log_p: Tokens, old_log_p: Tokens, ratio: Tokens, entropy: Tokens, mask: Mask) -> dict[str, Mean]:
    # Of a token that the old policy drew, k3 = r - 1 - log r.
    divergence = kl_estimate(*(jnp.where(mask, x, 0) for x in (old_log_p, log_p)), "k3")
    return {
        "ratio": _mean(ratio, mask),
        "policy_kl": _mean(divergence, mask),
        "entropy": _mean(entropy, mask),
    }


def _sum(x: Tokens, mask: Mask) -> Float[Array, ""]:
    return jnp.where(mask, x, 0).astype(jnp.float32).sum()


def _mean(x: Array, mask: Mask) -> Mean:
    return Mean(_sum(x, mask), mask.sum().astype(jnp.float32))
