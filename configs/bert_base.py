"""BERT base (110M parameters) by masked language modelling, for a node of 8 GPUs.

jaxllm train --config configs/bert_base.py --workdir runs/bert --config.data.path='corpus/*.jsonl.zst'

Batch, steps, learning rate, warmup, Adam and dropout are those of Devlin et al. 2019, appendix A.2 (131,072 tokens a
step, 40 epochs of 3.3 billion words); epsilon, clipping and what is not decayed are those of the code they released.
Left out are their loss on pairs of sentences, which RoBERTa (Liu et al. 2019) found to be no gain, and their first 90 %
of the steps on rows of 128 tokens: --config.data.length=128 --config.data.batch_size=1024 has as many tokens a step.
"""

from jaxllm.model import presets
from jaxllm.train.config import base_config


def get_config():
    config = base_config()
    config.train_step = "mlm"
    config.model.update(presets.bert_base(dropout=0.1, attention_dropout=0.1))
    config.data.update(source="jsonl", path="corpus/*.jsonl.zst", tokenizer="bpe:30522", batch_size=256)
    config.cluster.gpus = 8
    config.optimizer.update(
        name="adamw",
        learning_rate=1e-4,
        schedule="linear",
        warmup_steps=10_000,
        final_fraction=0.0,
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-6,
        clip_norm=1.0,
    )
    config.train.update(steps=1_000_000, log_every=100, eval_every=5_000, eval_batches=40, checkpoint_every=5_000)
    return config
