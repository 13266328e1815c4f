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
        embed_dim=256,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=768,
        max_length=256,
        positions="rope",
        norm="rmsnorm",
        activation="silu",
        gated_mlp=True,
        use_bias=False,
    )
    config.precision.update(compute="float32")  # CPUs multiply float32 faster than bfloat16
    config.layout.update(scan_layers=False)  # four layers unrolled run faster than a loop over them
    config.optimizer.update(learning_rate=2e-3, warmup_steps=40)
    config.train.update(steps=400, log_every=10, eval_every=200, eval_batches=8, checkpoint_every=200)
    return config
