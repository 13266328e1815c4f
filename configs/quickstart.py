"""A small Llama-like model trained on the source code of Python's own standard library: no download, 2 CPU cores.

jaxllm train --config configs/quickstart.py --workdir runs/quickstart
jaxllm generate --workdir runs/quickstart --prompt "def read_"
"""

import sysconfig

from jaxllm.train.config import base_config

PACKAGES = ("asyncio", "collections", "concurrent", "dbm", "email", "html", "http", "importlib", "json", "logging")
PACKAGES += ("multiprocessing", "re", "sqlite3", "tomllib", "unittest", "urllib", "wsgiref", "xml", "xmlrpc")


def get_config():
    config = base_config()
    library = sysconfig.get_path("stdlib")
    config.data.update(
        source="text",
        path=",".join([f"{library}/*.py", *(f"{library}/{package}/*.py" for package in PACKAGES)]),
        tokenizer="bpe:2048",
        batch_size=16,
    )
    config.model.update(
        num_layers=4,
        embed_dim=192,
        num_heads=4,
        mlp_dim=512,
        max_length=256,
        positions="rope",
        norm="rmsnorm",
        activation="silu",
        gated_mlp=True,
        use_bias=False,
    )
    config.precision.update(compute="float32")  # CPUs multiply float32 faster than bfloat16
    config.layout.update(scan_layers=False)  # four layers unrolled run faster than a loop over them
    config.optimizer.update(name="muon", learning_rate=1e-2, warmup_steps=20)  # fewer steps than AdamW needs
    config.train.update(steps=250, log_every=10, eval_every=125, eval_batches=8, checkpoint_every=125)
    return config
