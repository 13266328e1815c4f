"""A mixture of experts of 1.75 trillion parameters, the size that WuDao 2.0 was announced with: for the planner.

64 layers of 128 experts, two a token: 38 billion parameters at work for each. On 2,048 GPUs of 80 GB, 16 stages of 4
layers, experts over 32 devices, tensor parallelism inside nodes:

jaxllm explain --config configs/moe_1t.py --devices 2048
"""

from jaxllm.model import presets
from jaxllm.train.config import base_config


def get_config():
    config = base_config()
    sizes = {"num_layers": 64, "embed_dim": 8192, "num_heads": 64, "num_kv_heads": 8, "mlp_dim": 8640}
    experts = {"num_experts": 128, "experts_per_token": 2, "router_balance_loss": 0.01, "router_z_loss": 1e-3}
    config.model.update(presets.llama2_7b(**sizes, **experts, vocab_size=100_352, max_length=4096))
    config.data.update(source="parquet", path="corpus/*.parquet", tokenizer="tokenizer.model", batch_size=2048)
    config.mesh.update(pipeline=16, data=-1, expert=32, model=4)
    # What is no expert's is spread over the devices of the experts too.
    config.layout.update(
        zero_stage=2,
        rule_overrides="state=data+expert",
        sequence_parallel=True,
        num_microbatches=64,
        remat="full",
    )
    config.cluster.update(name="h100x8", gpus=2048)
    config.optimizer.update(learning_rate=1.5e-4, warmup_steps=2_000, clip_norm=1.0)
    config.train.update(steps=125_000, eval_every=1_000, eval_batches=64, checkpoint_every=500, keep=3)
    return config
