"""Runs of a tiny model in several real processes, joined by Gloo and started by launch/local.py, as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "launch" / "local.py"
CONFIG = """\
from jaxllm.train.config import base_config

def get_config():
    config = base_config()
    config.model.update(num_layers=2, embed_dim=32, num_heads=8, max_length=32, dropout=0.1)
    config.data.update(path={text!r}, cache={cache!r}, tokenizer="bpe:280", held_out="0.02", batch_size=16)
    config.precision.update(compute="float32")
    config.optimizer.update(warmup_steps=5, learning_rate=1e-2)
    config.train.update(steps=24, log_every=1, eval_every=8, checkpoint_every=4, eval_batches=2, hang_timeout=20.0)
    return config
"""


def write_config(folder: Path, text: Path) -> Path:
    """A config in `folder` that reads this text; tokens are kept beside it."""
    path = folder / "config.py"
    path.write_text(CONFIG.format(text=str(text), cache=str(text.parent / "cache")))
    return path


def environment(cache: Path) -> dict[str, str]:
    """Of the processes: virtual CPU devices, quick compiles that are kept."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PJRT_NPROC", "SLURM"))},
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(
    workdir: Path,
    config: Path,
    *flags: str,
    processes: int = 2,
    devices: int = 4,
    restarts: int = 0,
    grace: float = 30,
    entry: str = "jaxllm",
    **more: str,
) -> subprocess.Popen:
    """`jaxllm train` in so many processes of so many devices.

    Args:
      entry: the module that is run.
      more: of their environment.
    """
    launch = [f"--processes={processes}", f"--devices={devices}", f"--restarts={restarts}", f"--grace={grace}"]
    command = [sys.executable, LAUNCHER, *launch, f"--jaxllm={sys.executable} -m {entry}", "--", "train"]
    command += [f"--config={config}", f"--workdir={workdir}", *(f"--config.{flag}" for flag in flags)]
    return subprocess.Popen(
        command,
        env=environment(config.parent / "compiled") | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train(workdir: Path, config: Path, *flags: str, code: int = 0, **how) -> str:
    """Runs to the end and returns what it printed."""
    run = start(workdir, config, *flags, **how)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == code, output[-5000:]
    return output
