"""BLOOM (BigScience 2022): 176 billion parameters as they were trained, on 384 A100 of 80 GB.

jaxllm plan --config configs/bloom_176b.py

The published layout: 12 stages of which the first and the last have 5 layers and the table beside them, tensor
parallelism of 4, 8 data shards of 2 rows a microbatch, ZeRO 1, full recomputation.
"""

from jaxllm.model import presets
from jaxllm.train.config import base_config


def get_config():
    config = base_config()
    config.model.update(presets.bloom_176b(vocab_size=250_880))
    config.data.update(source="parquet", path="corpus/*.parquet", tokenizer="tokenizer.model", length=2048)
    config.data.batch_size = 2048
    config.mesh.update(pipeline=12, data=8, model=4)
    config.layout.update(zero_stage=1, num_microbatches=128, schedule="1f1b", stage_layers="light_ends", remat="full")
    config.cluster.update(name="jean-zay-a100", gpus=384)
    config.optimizer.update(learning_rate=6e-5, warmup_steps=183, clip_norm=1.0)
    config.train.update(steps=87_000, eval_every=1_000, eval_batches=64, checkpoint_every=100, keep=3)
    return config
