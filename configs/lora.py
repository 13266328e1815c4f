"""LoRA: a base model learns to answer in narrow matrices beside its own, which are frozen (jaxllm/model/adapters.py).

jaxllm train --config configs/lora.py:runs/base --workdir runs/base/adapters/chat --config.data.path=instructions.jsonl
jaxllm chat --workdir runs/base --adapter chat

The base is the run in a WORKDIR, trained or imported. An adapter is a run of its own, of a few megabytes; kept in
BASE/adapters/NAME it is found by its name.
"""

from jaxllm.cli.config_file import config_beside


def get_config(base=""):
    config = config_beside(__file__, "sft.py", base)
    config.train_step = "lora"
    config.adapter.update(kind="lora", rank=16, alpha=32.0, targets="all-linear")
    config.optimizer.learning_rate = 2e-4  # about ten times that of full fine-tuning
    return config
