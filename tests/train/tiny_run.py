"""A run of a tiny model in a process of its own: what the tests of the loop start, kill and start again.

python tests/train/tiny_run.py WORKDIR TEXT [group.field=value …]
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

KILL_AT_COMMIT = "TINY_RUN_KILL_AT_COMMIT"
ROOT = Path(__file__).parents[2]
# Every line is logged, saves and evaluations come often, dropout draws numbers each step.
FIELDS = {
    "model": {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "max_length": 16, "dropout": 0.1},
    "data": {"tokenizer": "bpe:280", "held_out": "0.02", "batch_size": 8},
    "optimizer": {"warmup_steps": 5, "learning_rate": 1e-2},
    "train": {"steps": 40, "log_every": 1, "eval_every": 10, "checkpoint_every": 4, "eval_batches": 2},
    "precision": {"compute": "float32"},
}


def tiny_config(text: Path, cache: Path, **changes):
    """The config; `changes` are values by "group.field"."""
    from jaxllm.train.config import base_config, read_config

    config = base_config()
    for group, fields in FIELDS.items():
        config[group].update(fields)
    config.data.update(path=str(text), cache=str(cache))
    for name, value in changes.items():
        group, field = name.split(".")
        config[group][field] = type(config[group][field])(value)
    return read_config(config)


def write_text(path: Path) -> None:
    """Two thousand short sentences from a fixed seed."""
    import random

    words = ("the", "a", "cat", "dog", "mat", "house", "river", "sat", "ran", "saw", "far", "near", "and", "then", "on")
    draw = random.Random(0)
    path.write_text(". ".join(" ".join(draw.choices(words, k=8)) for _ in range(2000)), encoding="utf-8")


def start(workdir: Path, text: Path, *changes: str, devices: int = 1, **environment: str) -> subprocess.Popen:
    """Starts the run in a process. Compiled programs and tokens are kept beside the text."""
    environment = (
        os.environ
        | environment
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1",
            "JAX_COMPILATION_CACHE_DIR": str(text.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    )
    command = [sys.executable, __file__, str(workdir), str(text), *changes]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_at_commit(step: int) -> None:
    """Makes this process die by SIGKILL when the checkpoint of `step` is written and only its commit is missing.

    That is a rename on a disk, and a last file in a bucket.
    """
    from orbax.checkpoint._src.path import async_path

    write_text = async_path.write_text

    async def write(path, text):
        if path.name == "commit_success.txt" and path.parent.name == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return await write_text(path, text)

    async_path.write_text = write
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def rename(source, target, *args, original=original, **kwargs):
            if Path(os.fspath(target)).name == str(step):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(source, target, *args, **kwargs)

        setattr(os, name, rename)


def main() -> int:
    from jaxllm.errors import UserError
    from jaxllm.train.loop import train

    if KILL_AT_COMMIT in os.environ:
        kill_at_commit(int(os.environ[KILL_AT_COMMIT]))
    workdir, text = Path(sys.argv[1]), Path(sys.argv[2])
    changes = dict(change.split("=", 1) for change in sys.argv[3:])
    try:
        return train(tiny_config(text, text.parent / "cache", **changes), workdir)
    except UserError as error:
        print(f"jaxllm: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
