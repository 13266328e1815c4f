"""QLoRA: LoRA beside a base that is held in 4 bits, 0.53 bytes a weight of its matrices (jaxllm/layout/nf4.py).

jaxllm train --config configs/qlora.py:runs/base --workdir runs/base/adapters/chat --config.data.path=instructions.jsonl
"""

from jaxllm.cli.config_file import config_beside


def get_config(base=""):
    config = config_beside(__file__, "lora.py", base)
    config.adapter.update(base_weights="nf4", rank=64, alpha=16.0)  # Dettmers et al. 2023, appendix B
    config.layout.update(remat="full")
    return config
