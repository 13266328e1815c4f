"""The config group `config.rollout.*`: texts that the model itself writes, and what they are worth."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RolloutMeshConfig:
    """The devices of training as they lie for writing: no pipeline, whole sequences. One may be -1: "the rest"."""

    replica: int = 1
    data: int = -1  # the rows
    expert: int = 1
    model: int = 0  # heads, mlp, vocab; 0: as many as in training


@dataclass(frozen=True)
class RolloutConfig:
    """Rollouts: prompts are answered, the answers judged, and what is learned from them is learned in minibatches."""

    mesh: RolloutMeshConfig = field(default_factory=RolloutMeshConfig)
    prompts: int = 32  # prompts a rollout
    samples: int = 1  # answers to each prompt; of GRPO the size of a group
    slots: int = 0  # answers written at once, over all devices; 0: all of a rollout
    max_new_tokens: int = 64  # of an answer
    temperature: float = 1.0  # of the distribution that answers are drawn from
    rewards: str = ""  # Python functions with their weights: "rewards.py:is_right=1.0,rewards.py:is_short=0.2"
    reward_model: str = ""  # a WORKDIR of train_step=reward; "": none
    reward_model_weight: float = 1.0
    reward_clip: float = 0.0  # rewards are cut to [-clip, clip]; 0: not at all
    missing_end_penalty: float = 0.0  # taken from the reward of an answer that does not end in max_new_tokens
    samples_every: int = 1  # rollouts from one that is written to WORKDIR/samples/ to the next; 0: none
    samples_written: int = 8  # answers of it
    eval_prompts: int = 64  # held-out prompts that an evaluation answers greedily; 0: all
