"""DPO: preferences learned without a reward model (jaxllm/steps/dpo.py).

jaxllm train --config configs/dpo.py:runs/chat --workdir runs/dpo --config.data.path=pairs.jsonl

The run in the WORKDIR after the colon is where it starts, and the reference it is held against. Other losses:
--config.dpo.loss=conservative | robust | hinge | ipo_mean | ipo_sum | orpo | simpo. As a LoRA, whose frozen base is the
reference: --config.adapter.kind=lora --config.optimizer.learning_rate=5e-5
"""

from jaxllm.cli.config_file import config_beside


def get_config(base=""):
    config = config_beside(__file__, "sft.py", base)
    config.train_step = "dpo"
    config.model.neftune_alpha = 0.0
    config.data.update(path="pairs.jsonl", held_out="0.05", batch_size=16)
    config.dpo.update(loss="sigmoid", beta=0.1, nll_weight=0.0)  # nll_weight above 0 keeps the chosen probable
    config.optimizer.update(learning_rate=1e-6 if base else 1e-4)
    config.train.update(steps=500, eval_every=100)
    return config
