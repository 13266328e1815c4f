"""Tiny Shakespeare, nanoGPT's size: 6 layers, 384 wide, 256 tokens of context.

A file of the plays (the default is `tinyshakespeare.txt` in the current folder):
  jaxllm train --config configs/shakespeare.py --workdir runs/shakespeare --config.data.path=FILE
from TensorFlow Datasets:
  jaxllm train --config configs/shakespeare.py:tfds --workdir runs/shakespeare
"""

from jaxllm.model import presets
from jaxllm.train.config import base_config


def get_config(source="text"):
    config = base_config()
    config.model.update(presets.gpt2(num_layers=6, embed_dim=384, num_heads=6, max_length=256, dropout=0.2))
    config.data.update(source="text", path="tinyshakespeare.txt", tokenizer="bpe:2048", held_out="0.1", batch_size=32)
    if source == "tfds":
        config.data.update(source="tfds:tiny_shakespeare:train", path="", held_out="0.1")
    config.optimizer.update(learning_rate=1e-3, warmup_steps=100, beta2=0.99)
    config.train.update(steps=2_000, eval_every=250)
    return config
