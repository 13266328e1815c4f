"""Prefix tuning (P-tuning v2): keys and values of virtual tokens in every layer learn a task (jaxllm/model/prompts.py).

jaxllm train --config configs/prefix_tuning.py:runs/base --workdir runs/base/adapters/qa \
    --config.data.path=instructions.jsonl
jaxllm chat --workdir runs/base --adapter qa

--config.adapter.prefix_projection makes them by an MLP, with a learning rate of 1e-3 or so.
"""

from jaxllm.cli.config_file import config_beside


def get_config(base=""):
    config = config_beside(__file__, "sft.py", base)
    config.train_step = "prompt"
    config.adapter.update(kind="prefix", num_virtual_tokens=16)
    config.optimizer.learning_rate = 1e-2
    return config
