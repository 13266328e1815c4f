"""A GPT-2 from scratch on Romance of the Three Kingdoms (三国演义); the last six chapters are held out.

jaxllm train --config configs/sanguo.py --workdir runs/sanguo --config.data.path=sanguoyanyi.txt
jaxllm generate --workdir runs/sanguo --prompt 却说曹操 --max_new_tokens 200

8.5 minutes on 2 cores of an AMD EPYC, 6.441 bits per held-out character; the best Kneser-Ney n-gram needs 6.728
(tests/benchmarks/sanguo.py). The text is short: a larger model or a longer run learns it by heart.
"""

from jaxllm.model import presets
from jaxllm.train.config import base_config


def get_config():
    config = base_config()
    config.model.update(presets.gpt2(num_layers=2, embed_dim=192, num_heads=3, max_length=128, dropout=0.1))
    config.data.update(source="text", path="", tokenizer="bpe:5000", held_out="第一百十五回", batch_size=32)
    config.precision.update(compute="float32")  # CPUs multiply float32 faster than bfloat16
    config.layout.update(scan_layers=False)
    config.optimizer.update(name="muon", learning_rate=0.015, warmup_steps=20, final_fraction=0.0)
    config.train.update(steps=600, eval_every=150, checkpoint_every=150)
    return config
