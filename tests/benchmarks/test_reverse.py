"""A short run of the benchmark learns what it is to learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_small_model_learns_to_reverse(tmp_path):
    """Held-out questions, answered letter by letter through the chat template, to the end of the turn."""
    command = [sys.executable, "-m", "tests.benchmarks.reverse", "--letters=4", "--examples=4000", "--steps=60"]
    made = subprocess.run(
        [*command, f"--workdir={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},  # one device, compiled to be fast
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    loss, right = re.search(r"([\d.]+) nats a token, ([\d.]+)% of 200", made.stdout).groups()
    assert float(right) > 90 and float(loss) < 0.3
