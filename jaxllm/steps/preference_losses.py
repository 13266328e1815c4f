"""Losses of pairs, pure functions of what a model says of their two responses.

All arrays are float32 [batch, pairs]; places where there is no pair add nothing, whatever stands there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.model.head import Loss, Mean
from jaxllm.steps.alignment_config import REFERENCE_FREE, DPOConfig, RewardConfig

Pairs = Float[Array, "batch pairs"]


def bradley_terry(
    chosen: Pairs, rejected: Pairs, margins: Pairs, is_pair: Bool[Array, "batch pairs"], options: RewardConfig
) -> Loss:
    """Sum over pairs of -log sigmoid(chosen - rejected - margin) + centring * (chosen + rejected)^2.

    Bradley & Terry 1952; with margins Touvron et al. 2023 (Llama 2), section 3.2.2; centring Eisenstein et al. 2023.

    Args:
      chosen, rejected: scores.
    """
    chosen, rejected, margins = (jnp.where(is_pair, x, 0) for x in (chosen, rejected, margins))
    difference = chosen - rejected
    losses = -jax.nn.log_sigmoid(difference - margins) + options.centring * (chosen + rejected) ** 2
    metrics = {
        "accuracy": difference > 0,
        "margin": difference,
        "score_chosen": chosen,
        "score_rejected": rejected,
    }
    return _summed(losses, is_pair, metrics)


def preference_loss(
    chosen: Pairs,
    rejected: Pairs,
    reference_chosen: Pairs | None,
    reference_rejected: Pairs | None,
    chosen_tokens: Pairs,
    rejected_tokens: Pairs,
    is_pair: Bool[Array, "batch pairs"],
    options: DPOConfig,
) -> Loss:
    """The sum over pairs of the loss `options.loss`.

    With h = (chosen - reference_chosen) - (rejected - reference_rejected), summed log-probabilities of responses:

    - sigmoid: -log sigmoid(beta h) (Rafailov et al. 2023, equation 7).
    - conservative: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e the label smoothing (Mitchell 2023, cDPO).
    - robust: ((1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)) / (2 e - 1) (Chowdhury et al. 2024).
    - hinge: max(0, 1 - beta h) (Zhao et al. 2023, SLiC).
    - ipo_sum: (h - 1 / (2 beta))^2 (Azar et al. 2023, equation 17); ipo_mean: the same of means over tokens.
    - orpo: -mean log p(chosen) - odds_weight log sigmoid(log odds ratio), of means over tokens (Hong et al. 2024).
    - simpo: -log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - margin) (Meng et al. 2024).

    All but orpo add nll_weight times the chosen's mean negative log-probability a token (Pang et al. 2024).

    Args:
      chosen, rejected: summed log-probabilities of the responses, nats.
      reference_chosen, reference_rejected: the same of the reference; None for orpo and simpo.
      chosen_tokens, rejected_tokens: how many tokens those are of.
    """
    chosen, rejected = jnp.where(is_pair, chosen, -1.0), jnp.where(is_pair, rejected, -1.0)
    counts = [jnp.where(is_pair, tokens, 1) for tokens in (chosen_tokens, rejected_tokens)]
    means = [total / jnp.maximum(count, 1) for total, count in zip((chosen, rejected), counts, strict=True)]
    if options.loss in REFERENCE_FREE:
        losses, rewards = _reference_free(*means, options)
    else:
        assert reference_chosen is not None and reference_rejected is not None
        gains = [chosen - jnp.where(is_pair, reference_chosen, -1.0)]
        gains.append(rejected - jnp.where(is_pair, reference_rejected, -1.0))
        losses, rewards = _against_reference(*gains, *counts, options)
    if options.nll_weight:
        losses -= options.nll_weight * means[0]
    metrics = {
        "reward_chosen": rewards[0],
        "reward_rejected": rewards[1],
        "reward_accuracy": rewards[0] > rewards[1],
        "reward_margin": rewards[0] - rewards[1],
        "log_prob_chosen": chosen,
        "log_prob_rejected": rejected,
        "nll_chosen": -means[0],
    }
    return _summed(losses, is_pair, metrics)


def _reference_free(chosen: Pairs, rejected: Pairs, options: DPOConfig) -> tuple[Pairs, tuple[Pairs, Pairs]]:
    """Losses and implicit rewards, of mean log-probabilities a token."""
    rewards = options.beta * chosen, options.beta * rejected
    if options.loss == "simpo":
        return -jax.nn.log_sigmoid(rewards[0] - rewards[1] - options.margin), rewards
    odds = (chosen - rejected) - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected))
    return -chosen - options.odds_weight * jax.nn.log_sigmoid(odds), rewards


def _against_reference(
    chosen: Pairs, rejected: Pairs, chosen_tokens: Pairs, rejected_tokens: Pairs, options: DPOConfig
) -> tuple[Pairs, tuple[Pairs, Pairs]]:
    """Losses and implicit rewards, of what the log-probabilities have gained on the reference's."""
    rewards = options.beta * chosen, options.beta * rejected
    if options.loss == "ipo_mean":
        h = chosen / jnp.maximum(chosen_tokens, 1) - rejected / jnp.maximum(rejected_tokens, 1)
        return (h - 1 / (2 * options.beta)) ** 2, rewards
    if options.loss == "ipo_sum":
        return (chosen - rejected - 1 / (2 * options.beta)) ** 2, rewards
    h, e = rewards[0] - rewards[1], options.label_smoothing
    if options.loss == "hinge":
        return jax.nn.relu(1 - h), rewards
    right, wrong = jax.nn.log_sigmoid(h), jax.nn.log_sigmoid(-h)
    if options.loss == "conservative":
        return -(1 - e) * right - e * wrong, rewards
    if options.loss == "robust":
        return (-(1 - e) * right + e * wrong) / (1 - 2 * e), rewards
    return -right, rewards


def _log_one_minus_exp(x: Pairs) -> Pairs:
    """log(1 - exp(x)) of x below 0, to rounding also near it (Mächler 2012)."""
    x = jnp.minimum(x, -1e-7)
    near = x > -0.693
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -0.5))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def _summed(losses: Pairs, is_pair: Bool[Array, "batch pairs"], metrics: dict[str, Array]) -> Loss:
    """The sum over pairs, their number, and metrics a pair."""
    number = is_pair.sum().astype(jnp.float32)
    add = lambda x: jnp.where(is_pair, x, 0).astype(jnp.float32).sum()  # noqa: E731
    return Loss(add(losses), number, metrics={name: Mean(add(x), number) for name, x in metrics.items()})
