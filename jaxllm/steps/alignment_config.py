"""The config groups of alignment: `config.reward`, `config.dpo`, `config.ppo` and `config.grpo`."""

from dataclasses import dataclass

PREFERENCE_LOSSES = ("sigmoid", "conservative", "robust", "hinge", "ipo_mean", "ipo_sum", "orpo", "simpo")
REFERENCE_FREE = ("orpo", "simpo")
SMOOTHED = ("conservative", "robust")
REFERENCES = ("alongside", "precomputed")
KL_ESTIMATORS = ("k1", "k3")
AGGREGATIONS = ("sequence_mean", "token_mean", "max_length")
ADVANTAGE_SCALES = ("group", "batch", "none")


@dataclass(frozen=True)
class RewardConfig:
    """A reward model, trained on pairs."""

    centring: float = 0.0  # weight of (chosen + rejected)^2, which keeps scores about 0 (Eisenstein et al. 2023: 0.01)


@dataclass(frozen=True)
class DPOConfig:
    """Preferences learned without a reward model."""

    loss: str = "sigmoid"  # sigmoid (DPO) | conservative (cDPO) | robust | hinge | ipo_mean | ipo_sum | orpo | simpo
    beta: float = 0.1  # how dear it is to leave the reference; of simpo what log-probabilities are multiplied by
    label_smoothing: float = 0.0  # conservative, robust: the part of all pairs that may be the wrong way round
    margin: float = 0.5  # simpo: gamma, by how much the chosen is to win; not multiplied by beta
    odds_weight: float = 0.1  # orpo: lambda, of the odds ratio beside the chosen's own log-probability
    nll_weight: float = 0.0  # all but orpo: of the chosen's mean negative log-probability a token (RPO)
    reference: str = "alongside"  # log-probabilities of the reference: alongside each step | precomputed, once


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation."""

    clip: float = 0.2  # of the ratio of probabilities, on both sides of 1
    value_clip: float = 0.2  # how far a value may move at no cost
    value_weight: float = 0.1  # of the critic's loss; it counts where gradients are clipped together
    entropy_weight: float = 0.0
    kl_weight: float = 0.05  # of the divergence from the reference, taken from rewards token by token; 0: no reference
    kl_estimator: str = "k1"  # of that divergence: k1 | k3 (Schulman 2020)
    kl_target: float = 0.0  # nats an answer that kl_weight is adapted to (Ziegler et al. 2019); 0: it is fixed
    kl_horizon: float = 10_000.0  # answers over which it is adapted
    discount: float = 1.0
    gae_lambda: float = 0.95  # generalised advantage estimation (Schulman et al. 2016)
    whiten_rewards: bool = False  # divided by their standard deviation, the mean kept
    whiten_advantages: bool = True
    epochs: int = 4  # passes over a rollout
    stop_kl: float = 0.0  # nats a token from the policy that wrote, above which a rollout is given up; 0: never
    critic_learning_rate: float = 0.0  # the peak; 0: config.optimizer.learning_rate
    critic_init_from: str = ""  # a WORKDIR of train_step=reward that the critic starts from; "": from the actor


@dataclass(frozen=True)
class GRPOConfig:
    """Group relative policy optimisation."""

    clip_low: float = 0.2  # of the ratio of probabilities, below 1
    clip_high: float = 0.28  # above 1 (DAPO's clip-higher; of the GRPO paper 0.2)
    dual_clip: float = 0.0  # the largest ratio that counts where the advantage is negative (3: Ye et al. 2020); 0: any
    aggregation: str = "token_mean"  # token_mean (DAPO) | sequence_mean (GRPO) | max_length (Dr. GRPO)
    advantage_scale: str = "group"  # what advantages are divided by: the deviation of the group | batch | none
    kl_weight: float = 0.0  # of the divergence from the reference (k3), in the loss (the paper: 0.04); 0: no reference
    entropy_weight: float = 0.0
    mask_truncated: bool = False  # learn nothing from answers that do not end (DAPO's overlong filtering)
    drop_equal_groups: bool = False  # learn nothing from groups whose answers are all worth the same
    epochs: int = 1  # passes over a rollout
