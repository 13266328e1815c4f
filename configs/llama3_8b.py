"""Llama 3 8B from scratch: 4 million tokens a step at length 8192, ZeRO 3 over `data`, for 8 nodes of 8 GPUs of 80 GB.

srun jaxllm train --config configs/llama3_8b.py --workdir /shared/runs/8b --config.data.path='/shared/corpus/*.parquet'

Where the network between the nodes is slow: --config.mesh.replica=8 --config.mesh.data=8 keeps ZeRO's gathers inside
a node (HSDP). Longer sequences: --config.mesh.model=8 --config.layout.sequence_parallel.
"""

from jaxllm.model import presets
from jaxllm.train.config import base_config


def get_config():
    config = base_config()
    config.model.update(presets.llama3_8b())
    config.data.update(
        source="parquet",
        path="corpus/*.parquet",
        tokenizer="tokenizer.model",
        length=8192,
        batch_size=512,
        packing="best_fit",
    )
    config.mesh.update(data=-1, model=1)
    config.layout.update(zero_stage=3, num_microbatches=8, remat="full")
    config.cluster.update(name="h100x8", gpus=64)
    config.optimizer.update(learning_rate=3e-4, warmup_steps=2_000, final_fraction=0.1, clip_norm=1.0)
    config.train.update(steps=250_000, eval_every=1_000, eval_batches=64, checkpoint_every=1_000, keep=3)
    return config
