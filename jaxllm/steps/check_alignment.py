"""What can be said of the config groups of alignment alone."""

from typing import Any

from jaxllm.config import one_of
from jaxllm.errors import UserError
from jaxllm.steps import alignment_config as names

_CHOICES = {
    "dpo": {"loss": names.PREFERENCE_LOSSES, "reference": names.REFERENCES},
    "ppo": {"kl_estimator": names.KL_ESTIMATORS},
    "grpo": {"aggregation": names.AGGREGATIONS, "advantage_scale": names.ADVANTAGE_SCALES},
}
_ABOVE_ZERO = {"beta", "clip", "value_clip", "kl_horizon", "clip_low", "clip_high"}
_AT_LEAST_ZERO = {
    "centring",
    "margin",
    "odds_weight",
    "nll_weight",
    "value_weight",
    "entropy_weight",
    "kl_weight",
    "kl_target",
    "stop_kl",
    "critic_learning_rate",
    "dual_clip",
}


def check_options(name: str, group: Any) -> None:
    """Checks `config.<name>`.

    Raises:
      UserError: an unknown variant, a value out of its range, or one that the variant does not look at.
    """
    for field, choices in _CHOICES.get(name, {}).items():
        one_of(f"config.{name}.{field}", getattr(group, field), choices)
    for field, value in vars(group).items():
        where = f"config.{name}.{field}={value}"
        if field in _ABOVE_ZERO and not value > 0:
            raise UserError(f"{where} must be above 0.")
        if field in _AT_LEAST_ZERO and not value >= 0:
            raise UserError(f"{where} must be 0 or more.")
        if field in ("discount", "gae_lambda") and not 0 <= value <= 1:
            raise UserError(f"{where} must be from 0 to 1.")
        if field == "epochs" and value < 1:
            raise UserError(f"{where} must be 1 or more.")
        if field in ("clip", "clip_low") and not value < 1:
            raise UserError(f"{where} must be below 1: a ratio of probabilities is never below 0.")
    if name == "dpo":
        _check_dpo(group)
    if name == "grpo" and 0 < group.dual_clip <= 1 + group.clip_high:
        raise UserError(
            f"config.grpo.dual_clip={group.dual_clip:g} must be above 1 + clip_high = {1 + group.clip_high:g}, or 0."
        )
    if name == "ppo" and group.kl_target > 0 and not group.kl_weight > 0:
        raise UserError(
            f"config.ppo.kl_target={group.kl_target:g} adapts kl_weight, which is 0 and stays so. "
            "Set config.ppo.kl_weight to where it is to start, 0.05 say."
        )


def _check_dpo(group: names.DPOConfig) -> None:
    for field, loss in (("margin", "simpo"), ("odds_weight", "orpo")):
        value = getattr(group, field)
        if group.loss != loss and value != getattr(names.DPOConfig(), field):
            raise UserError(
                f"config.dpo.{field}={value:g} is of loss={loss} alone; loss={group.loss} has none. "
                f"Leave it out, or use --config.dpo.loss={loss}."
            )
    if group.loss == "orpo" and group.beta != names.DPOConfig().beta:
        raise UserError(
            f"config.dpo.beta={group.beta:g}: loss=orpo has none. Its lambda, which some call beta, is "
            "config.dpo.odds_weight."
        )
    if not 0 <= group.label_smoothing < 0.5:
        raise UserError(f"config.dpo.label_smoothing={group.label_smoothing:g} must be from 0 to below 0.5.")
    if group.label_smoothing and group.loss not in names.SMOOTHED:
        raise UserError(
            f"config.dpo.label_smoothing={group.label_smoothing:g}: loss={group.loss} has none. "
            "Use --config.dpo.loss=conservative (cDPO) or robust."
        )
    if group.nll_weight and group.loss == "orpo":
        raise UserError(
            f"config.dpo.nll_weight={group.nll_weight:g}: orpo has the chosen's log-probability with a weight of 1 "
            "already. Set it to 0; config.dpo.odds_weight weighs the other part."
        )
    if group.reference == "precomputed" and group.loss in names.REFERENCE_FREE:
        raise UserError(f"config.dpo.reference=precomputed: loss={group.loss} has no reference. Leave it at alongside.")
