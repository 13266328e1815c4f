"""Peak host memory of importing and exporting a Hugging Face model, as a multiple of its weights.

    python -m tests.benchmarks.import_memory                      # 0.15 billion parameters, a minute
    python -m tests.benchmarks.import_memory --size 2b --dir DIR  # 2 billion: 24 GB of disk, 12 GB of memory

Makes a random Llama in float32 files, runs `jaxllm convert` both ways on 8 virtual CPU devices, and prints the peak
resident set of each process (ru_maxrss, what Linux calls VmHWM) over the bytes of the weights. The exported files must
be the imported ones.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from jaxllm.interop.hf.families import LLAMA
from jaxllm.interop.hf.files import NewTensor, write_tensors
from jaxllm.interop.hf.tensors import file_tensors, pieces_of
from jaxllm.model import presets
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import model_spec

SIZES = {
    "150m": {"num_layers": 12, "embed_dim": 768, "num_heads": 12, "num_kv_heads": 4, "mlp_dim": 3072},
    "600m": {"num_layers": 16, "embed_dim": 1536, "num_heads": 12, "num_kv_heads": 4, "mlp_dim": 6144},
    "2b": {"num_layers": 24, "embed_dim": 2048, "num_heads": 32, "num_kv_heads": 8, "mlp_dim": 8192},
}
VOCABULARIES = {"150m": 32_000, "600m": 32_000, "2b": 128_256}
VIRTUAL = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def make(folder: Path, size: str, shard: int) -> int:
    """Writes the model; returns the bytes of its weights."""
    model = ModelConfig(**presets.llama3_8b(**SIZES[size])).resolved(VOCABULARIES[size])
    generator = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return generator.standard_normal(shape, np.float32)

    pieces = pieces_of(LLAMA.rows, model_spec(model))
    tensors = {
        name: NewTensor(tensor.shape, np.dtype(np.float32), partial(draw, tensor.shape))
        for name, tensor in file_tensors(pieces).items()
    }
    folder.mkdir(parents=True)
    write_tensors(folder, tensors, shard)
    (folder / "config.json").write_text(json.dumps(LLAMA.write(model)))
    return sum(tensor.size for tensor in tensors.values())


def convert(source: str, target: str, *flags: str) -> tuple[int, float]:
    """Runs `jaxllm convert`; returns its peak resident set in bytes and its seconds."""
    argv = [sys.executable, "-m", "jaxllm.cli.main", "convert", "--from", source, "--to", target, *flags]
    argv[1:3] = ["-c", "import sys; from jaxllm.cli.main import main; sys.exit(main())"]
    started = time.time()
    process = subprocess.Popen(argv, env=os.environ | VIRTUAL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"jaxllm convert --from {source} --to {target} ended with {process.returncode}")
    return usage.ru_maxrss * 1024, time.time() - started


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.import_memory")
    parser.add_argument("--size", choices=SIZES, default="150m")
    parser.add_argument("--dir", help="where to work; default: a temporary folder")
    parser.add_argument("--shard", type=float, default=5e9, help="bytes of a file (%(default)g)")
    parser.add_argument("flags", nargs="*", help="more flags of jaxllm convert, after --")
    options = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="import_memory_", dir=options.dir))
    shard = f"--max_shard_size={int(options.shard)}"
    try:
        size = make(root / "hf", options.size, int(options.shard))
        print(f"{size / 4:,.0f} parameters, {size / 1e9:.2f} GB of float32 weights", flush=True)
        ways = {
            "import": (f"hf:{root / 'hf'}", str(root / "run"), *options.flags),
            "export": (str(root / "run"), f"hf:{root / 'back'}", shard, *options.flags),
        }
        for way, arguments in ways.items():
            peak, seconds = convert(*arguments)
            print(f"{way}: peak {peak / 1e9:.2f} GB = {peak / size:.3f} x the weights, {seconds:.0f} s", flush=True)
        for file in (root / "hf").glob("*.safetensors"):
            if subprocess.run(["cmp", file, root / "back" / file.name], check=False).returncode:
                raise SystemExit(f"{file.name} came back as something else")
        print("every file came back the same to the byte")
    finally:
        shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
