"""The config of a whole run: the groups of every room in one typed value, and the `ConfigDict` people edit."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from jaxllm.config import check_type, defaults, one_of, read_group
from jaxllm.data.config import DataConfig
from jaxllm.errors import UserError, did_you_mean
from jaxllm.layout.config import ClusterConfig, LayoutConfig, MeshConfig
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.config import ModelConfig
from jaxllm.steps.alignment_config import DPOConfig, GRPOConfig, PPOConfig, RewardConfig
from jaxllm.steps.rollout_config import RolloutConfig

TRAIN_STEPS = ("pretrain", "mlm", "sft", "lora", "prompt", "reward", "dpo", "ppo", "grpo")


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats."""

    compute: str = "bfloat16"  # bfloat16 | float32 | float16 (dynamic loss scaling)
    params: str = "float32"  # master weights and optimizer state
    gradients: str = "float32"  # gradient reduction and accumulation: float32 | bfloat16


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: str = "adamw"  # adamw | lion | muon
    learning_rate: float = 3e-4  # the peak
    schedule: str = "cosine"  # cosine | linear | wsd (warmup, stable, decay) | constant
    warmup_steps: int = 100
    decay_steps: int = 0  # wsd: steps of the final decay; 0: a tenth of the run
    final_fraction: float = 0.1  # the last learning rate as a part of the peak
    weight_decay: float = 0.1
    decay_mask: str = "matrices"  # matrices: no norms, no biases, no position table | all | a regex over paths
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.95  # muon
    clip_norm: float = 1.0  # global norm of the gradient; 0: no clipping


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1_000
    init_from: str = ""  # a WORKDIR whose newest parameters a fresh run starts from; "": random ones
    reference: str = ""  # dpo, ppo, grpo: a WORKDIR whose model the run is held against; "": what it starts from
    log_every: int = 10
    eval_every: int = 200  # 0: only at the end
    eval_batches: int = 0  # batches an evaluation; 0: the whole held-out split
    checkpoint_every: int = 200  # 0: only at the end
    keep: int = 2  # newest checkpoints to keep
    keep_best: int = 1  # and those of the lowest eval_loss
    max_nonfinite: int = 10  # steps on end without an update, as their gradient was not finite; one more ends the run
    spike: str = "log"  # of loss or gradient: log it | skip: no update | rollback: to a checkpoint, without that data
    spike_z: float = 7.0  # a spike is so many standard deviations above the mean ...
    spike_window: int = 128  # ... of the steps before
    spike_steps: int = 3  # rollback: after so many spikes on end
    audit_every: int = 1_000  # steps from one check that replicas are equal to the next; 0: never
    hang_timeout: float = 600.0  # seconds in which nothing moves, then the process ends with code 76; 0: never
    wandb_project: str = ""  # Weights & Biases (pip install wandb); "": nothing is sent anywhere
    max_unsaved_minutes: float = 60.0  # a run whose saves fail goes on for so long
    profile_start: int = -1  # step of the first traced step; -1: no trace
    profile_steps: int = 3


@dataclass(frozen=True)
class Config:
    """One run, typed. `read_config` makes it from what the user wrote."""

    train_step: str = "pretrain"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)


GROUPS = {
    f.name: type(getattr(Config(), f.name)) for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING
}


def base_config() -> ConfigDict:
    """Every field with its default: what `configs/*.py` start from. Locked: a field that is unknown is refused."""
    plain = {f.name: f.default for f in dataclasses.fields(Config) if f.name not in GROUPS}
    return ConfigDict(plain | {name: ConfigDict(defaults(group)) for name, group in GROUPS.items()}).lock()


def read_config(values: Mapping[str, Any]) -> Config:
    """The typed config of `values`, a `ConfigDict` or the JSON of one.

    Raises:
      UserError: an unknown field or group, a value of another type, or an unknown train step.
    """
    if not hasattr(values, "items"):
        raise UserError(f"a config must be an object of groups, not a {type(values).__name__}.")
    fields = {f.name for f in dataclasses.fields(Config)}
    for name in values:
        if name not in fields:
            raise UserError(f"config.{name} is not a field. {did_you_mean(name, fields)}")
    plain = {name: values[name] for name in values if name not in GROUPS}
    for name, value in plain.items():
        check_type(value, getattr(Config(), name), name)
    one_of("config.train_step", plain.get("train_step", "pretrain"), TRAIN_STEPS)
    return Config(**plain, **{n: read_group(g, values.get(n, {}), n) for n, g in GROUPS.items()})


def config_dict(config: Config) -> dict[str, Any]:
    """The plain dictionary of a config, as written to WORKDIR/config.json."""
    return dataclasses.asdict(config)
