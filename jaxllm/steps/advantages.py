"""What is owed to each token of an answer: divergences, rewards, advantages. Pure functions of arrays.

Arrays are float32 [batch, length]; `mask` is true on the tokens of answers, and what stands elsewhere changes nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Tokens = Float[Array, "batch length"]
Mask = Bool[Array, "batch length"]
LARGEST_LOG_RATIO = 20.0  # beyond it a ratio of probabilities would overflow; what lies there has no gradient


def kl_estimate(log_p: Tokens, reference_log_p: Tokens, estimator: str) -> Tokens:
    """An estimate of KL(p, reference) from a token drawn from p, nats (Schulman 2020, "Approximating KL divergence").

    With d = log p - log reference: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d, which is never negative. k1 has the
    right mean but, in a loss, a gradient that does not know the reference: there it must not be. k3 takes d to be at
    most 20 from 0.
    """
    d = log_p - reference_log_p
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    d = jnp.clip(d, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return jnp.expm1(-d) + d


def token_rewards(
    scores: Float[Array, " batch"],
    log_p: Tokens,
    reference_log_p: Tokens,
    mask: Mask,
    kl_weight: Float[Array, ""] | float,
    estimator: str,
) -> Tokens:
    """-kl_weight * (divergence from the reference) on each token of an answer; its score on the last besides."""
    last = mask & (jnp.cumsum(mask, axis=1) == mask.sum(axis=1, keepdims=True))
    penalty = kl_weight * kl_estimate(log_p, reference_log_p, estimator)
    return jnp.where(mask, -penalty, 0) + jnp.where(last, scores[:, None], 0)


def gae(rewards: Tokens, values: Tokens, mask: Mask, discount: float, gae_lambda: float) -> tuple[Tokens, Tokens]:
    """Generalised advantage estimates, and returns = advantages + values (Schulman et al. 2016, equation 16).

    A_t = delta_t + discount * gae_lambda * A_{t+1}, delta_t = r_t + discount * V_{t+1} - V_t, over the tokens of `mask`
    in their order; after the last there is nothing. 0 elsewhere.
    """

    def back(following, token):
        value_after, advantage_after = following
        reward, value, counts = token
        delta = reward + discount * value_after - value
        advantage = delta + discount * gae_lambda * advantage_after
        following = jnp.where(counts, value, value_after), jnp.where(counts, advantage, advantage_after)
        return following, jnp.where(counts, advantage, 0)

    nothing = jnp.zeros(rewards.shape[0], rewards.dtype)
    tokens = (jnp.where(mask, rewards, 0).T, jnp.where(mask, values, 0).T, mask.T)
    _, advantages = jax.lax.scan(back, (nothing, nothing), tokens, reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(mask, advantages + values, 0)


def whiten(x: Tokens, mask: Mask, shift_mean: bool = True) -> Tokens:
    """x of the mask, divided by its standard deviation there; its mean becomes 0, or stays. 0 elsewhere.

    The variance is the unbiased one, as TRL's; of a single token it is 0.
    """
    count = mask.sum()
    mean = jnp.where(mask, x, 0).sum() / jnp.maximum(count, 1)
    centred = jnp.where(mask, x - mean, 0)
    variance = (centred**2).sum() / jnp.maximum(count - 1, 1)
    white = centred * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask, white if shift_mean else white + mean, 0)


def group_advantages(
    rewards: Float[Array, "groups samples"], scale: str, epsilon: float = 1e-4
) -> Float[Array, "groups samples"]:
    """Each reward less the mean of its group, divided by a standard deviation or not (Shao et al. 2024, section 4.1.2).

    Args:
      scale: "group", that of its group; "batch", that of all rewards; "none" (Liu et al. 2025, Dr. GRPO).
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "none":
        return centred
    deviation = rewards.std(ddof=1) if scale == "batch" else rewards.std(axis=1, ddof=1, keepdims=True)
    return centred / (deviation + epsilon)


def next_kl_weight(
    kl_weight: Float[Array, ""], kl: Float[Array, ""], target: float, horizon: float, num_answers: int
) -> Float[Array, ""]:
    """kl_weight after `num_answers` answers whose divergence was `kl` nats each (Ziegler et al. 2019, section 2.2).

    weight * (1 + clip(kl / target - 1, -0.2, 0.2) * num_answers / horizon)
    """
    return kl_weight * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) * num_answers / horizon)
