"""Supervised fine-tuning: a base model learns to answer. The base is the run in a WORKDIR, trained or imported.

jaxllm convert --from hf:models/Llama-3.2-1B --to runs/base
jaxllm train --config configs/sft.py:runs/base --workdir runs/chat --config.data.path=instructions.jsonl \
    --config.data.chat_template=llama3
jaxllm chat --workdir runs/chat --system "Answer in one sentence."

Without a base it makes a small model from scratch, which learns the form of an answer and little else:
jaxllm train --config configs/sft.py --workdir runs/tiny --config.data.path=instructions.jsonl

What the examples may look like and what of them is learned: jaxllm/data/examples.py and supervision.py, or
jaxllm instructions --inspect instructions.jsonl --config configs/sft.py:runs/base
"""

from jaxllm.cli.config_file import model_of_run
from jaxllm.model import presets
from jaxllm.train.config import base_config


def get_config(base=""):
    config = base_config()
    config.train_step = "sft"
    config.data.update(
        source="jsonl",
        path="instructions.jsonl",
        packing="best_fit",  # several examples to a row, which see nothing of each other
        chat_template="",  # the base's own; else chatml, llama3, zephyr, plain or FILE.jinja
        supervise="completions",
        truncation="refuse",
        held_out="0.02",
        batch_size=16,
    )
    if base:
        config.model.update(model_of_run(base))
        config.data.update(tokenizer=f"{base}/tokenizer", length=min(2048, config.model.max_length))
        config.train.init_from = base
    else:
        config.model.update(presets.gpt2(num_layers=4, embed_dim=192, num_heads=4, max_length=512))
        config.data.update(tokenizer="bpe:2048", chat_template="plain")
    config.model.update(neftune_alpha=0.0)  # 5 to 15: noise on the embeddings (Jain et al. 2023)
    config.optimizer.update(learning_rate=2e-5 if base else 1e-3, warmup_steps=20, weight_decay=0.0, beta2=0.999)
    config.train.update(steps=500, eval_every=100, checkpoint_every=100)
    return config
