"""PPO: a model answers prompts and learns from what its answers are worth (jaxllm/rollout, jaxllm/steps/ppo.py).

jaxllm train --config configs/ppo.py:runs/chat --workdir runs/ppo --config.data.path=prompts.jsonl \
    --config.rollout.reward_model=runs/reward --config.ppo.critic_init_from=runs/reward

For a reward by a Python function --config.rollout.rewards=rewards.py:is_polite (jaxllm/rollout/rewards.py); or both.
launch/rlhf.sh goes all the way from a pretrained model. As a LoRA, actor, critic and reference share one frozen base:
    --config.adapter.kind=lora --config.optimizer.learning_rate=1e-5
"""

from jaxllm.cli.config_file import config_beside


def get_config(base=""):
    config = config_beside(__file__, "sft.py", base)
    config.train_step = "ppo"
    config.model.neftune_alpha = 0.0
    config.data.update(path="prompts.jsonl", held_out="0.05", truncation="drop", batch_size=32)
    config.rollout.update(prompts=128, max_new_tokens=min(256, config.model.max_length // 2))
    config.ppo.update(epochs=4, kl_weight=0.05, kl_target=6.0)
    config.optimizer.update(learning_rate=1e-6 if base else 1e-4, warmup_steps=20)
    config.ppo.critic_learning_rate = 5e-6 if base else 5e-4
    config.train.update(steps=1_600, eval_every=160, checkpoint_every=160)
    return config
