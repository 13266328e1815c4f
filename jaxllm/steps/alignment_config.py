"""The config groups of alignment: `config.reward`, `config.dpo`, `config.ppo` and `config.grpo`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardConfig:
    centring: float = 0.0


@dataclass(frozen=True)
class DPOConfig:
    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.5
    odds_weight: float = 0.1
    nll_weight: float = 0.0
    reference: str = "alongside"


@dataclass(frozen=True)
class PPOConfig:
    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1
    entropy_weight: float = 0.0
    kl_weight: float = 0.05
    kl_estimator: str = "k1"
    kl_target: float = 0.0
    kl_horizon: float = 10_000.0
    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    epochs: int = 4
    stop_kl: float = 0.0
    critic_learning_rate: float = 0.0
    critic_init_from: str = ""


@dataclass(frozen=True)
class GRPOConfig:
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    aggregation: str = "token_mean"
    advantage_scale: str = "group"
    kl_weight: float = 0.0
    entropy_weight: float = 0.0
    mask_truncated: bool = False
    drop_equal_groups: bool = False
    epochs: int = 1
