"""A small BERT"""

from jaxllm.model import presets
from jaxllm.train.config import base_config


def get_config():
    config = base_config()
    config.train_step = "mlm"
    config.model.update(presets.bert_base(num_layers=2, embed_dim=128, num_heads=4, max_length=64, token_types=0))
    config.data.update(source="text", path="", tokenizer="bpe:2000", held_out="0.05", batch_size=32)
    config.precision.update(compute="float32")  # CPUs multiply float32 faster than bfloat16
    config.layout.update(scan_layers=False)
    config.optimizer.update(name="muon", learning_rate=0.01, warmup_steps=50, final_fraction=0.0)
    config.train.update(steps=600, eval_every=100, checkpoint_every=200)
    return config
