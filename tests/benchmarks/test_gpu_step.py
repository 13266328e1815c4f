"""The GPU benchmark runs where no data library is installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = "--layers 2 --embed 32 --heads 4 --mlp 64 --vocab 64 --length 32 --batch_size 8 --steps 4"
BLOCKED = "grain, array_record, sentencepiece, tensorflow_datasets, pyarrow, tensorboardX, safetensors, zstandard"
PROGRAM = f"""
import runpy, sys
for name in "{BLOCKED}".split(", "):
    sys.modules[name] = None
runpy.run_path("tests/benchmarks/gpu_step.py", run_name="__main__")
"""


@pytest.mark.parametrize("flags", ["", "--packed --microbatches 2 --zero_stage 3 --remat full --model 2"])
def test_runs_without_data_libraries(flags):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *TINY.split(), *flags.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    # 6 N and 12 layers heads head_dim length, counted by hand: the embedding is only looked up.
    multiplying = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32 + 64 * 32
    full, half = (float(flops) for flops in re.findall(r"([\d.]+) FLOPs a token", run.stdout))
    assert full == 6 * multiplying + 12 * 2 * 32 * 32
    assert half == full - 6 * 2 * 32 * 32
    assert "GiB predicted by XLA" in run.stdout
