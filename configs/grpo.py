"""GRPO: a model answers each prompt several times and learns from the better answers (jaxllm/steps/grpo.py).

jaxllm train --config configs/grpo.py:runs/chat --workdir runs/grpo --config.data.path=problems.jsonl \
    --config.rollout.rewards=rewards.py:is_right

A line of problems.jsonl is {"prompt": …, "answer": …}; is_right(completions, answer) returns a number for each
completion. The defaults are DAPO's; those of the paper: --config.grpo.clip_high=0.2 --config.grpo.kl_weight=0.04
--config.grpo.aggregation=sequence_mean; of Dr. GRPO: --config.grpo.aggregation=max_length
--config.grpo.advantage_scale=none.
"""

from jaxllm.cli.config_file import config_beside


def get_config(base=""):
    config = config_beside(__file__, "sft.py", base)
    config.train_step = "grpo"
    config.model.neftune_alpha = 0.0
    config.data.update(path="problems.jsonl", held_out="0.05", truncation="drop", batch_size=64)
    config.rollout.update(prompts=32, samples=8, max_new_tokens=min(512, config.model.max_length // 2))
    config.optimizer.update(learning_rate=1e-6 if base else 1e-4, warmup_steps=20)
    config.train.update(steps=800, eval_every=80, checkpoint_every=80)
    return config
