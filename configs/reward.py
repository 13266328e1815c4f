"""A reward model: which of two responses people prefer, as one number for a text (jaxllm/steps/reward.py).

jaxllm train --config configs/reward.py:runs/chat --workdir runs/reward --config.data.path=pairs.jsonl

It starts from the run in a WORKDIR, best a fine-tuned one, and keeps its tokenizer and chat template. What pairs look
like: jaxllm/data/preferences.py. As a LoRA beside that model, a few megabytes:
    --config.adapter.kind=lora --config.optimizer.learning_rate=2e-4
"""

from jaxllm.cli.config_file import config_beside


def get_config(base=""):
    config = config_beside(__file__, "sft.py", base)
    config.train_step = "reward"
    config.model.update(scalar_head=True, neftune_alpha=0.0)
    config.data.update(path="pairs.jsonl", held_out="0.05", batch_size=16)
    config.reward.update(centring=0.01)
    config.optimizer.update(learning_rate=1e-5 if base else 1e-3)
    config.train.update(steps=500, eval_every=100)
    return config
