"""GPT-2 small (124M parameters): half a million tokens a step, 10 billion tokens, for a node of 8 GPUs.

jaxllm train --config configs/gpt2_small.py --workdir runs/gpt2 --config.data.path='corpus/*.jsonl.zst'
"""

from jaxllm.model import presets
from jaxllm.train.config import base_config


def get_config():
    config = base_config()
    config.model.update(presets.gpt2())
    config.data.update(source="jsonl", path="corpus/*.jsonl.zst", tokenizer="bpe:50257", batch_size=512)
    config.layout.update(zero_stage=1, num_microbatches=2)  # 512 x 1024 tokens: 32 sequences a GPU and microbatch
    config.cluster.gpus = 8
    config.optimizer.update(learning_rate=6e-4, warmup_steps=700, final_fraction=0.1, weight_decay=0.1)
    config.train.update(steps=19_073, eval_every=500, eval_batches=40, checkpoint_every=1_000)
    return config
