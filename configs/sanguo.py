"""A GPT-2 from scratch on Romance of the Three Kingdoms (三国演义); the last six chapters are held out.

jaxllm train --config configs/sanguo.py --workdir runs/sanguo --config.data.path=sanguoyanyi.txt
jaxllm generate --workdir runs/sanguo --prompt 却说曹操 --max_new_tokens 200
"""

from jaxllm.model import presets
from jaxllm.train.config import base_config


def get_config():
    config = base_config()
    config.model.update(presets.gpt2(num_layers=4, embed_dim=256, num_heads=4, max_length=128, dropout=0.1))
    config.data.update(source="text", path="", tokenizer="bpe:8000", held_out="第一百十五回", batch_size=32)
    config.precision.update(compute="float32")  # CPUs multiply float32 faster than bfloat16
    config.layout.update(scan_layers=False)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=100)
    config.train.update(steps=1_000, eval_every=200)
    return config
