"""P-tuning: virtual tokens before every example, which a small MLP makes, learn a task (jaxllm/model/prompts.py).

jaxllm train --config configs/p_tuning.py:runs/base --workdir runs/base/adapters/qa \
    --config.data.path=instructions.jsonl
jaxllm chat --workdir runs/base --adapter qa

--config.adapter.encoder=lstm makes them by an LSTM; --config.adapter.kind=prompt learns them without an encoder, which
takes a larger learning rate (3e-2) and more steps.
"""

from jaxllm.cli.config_file import config_beside


def get_config(base=""):
    config = config_beside(__file__, "sft.py", base)
    config.train_step = "prompt"
    config.adapter.update(kind="p_tuning", num_virtual_tokens=16, encoder="mlp")
    config.optimizer.learning_rate = 1e-3
    return config
