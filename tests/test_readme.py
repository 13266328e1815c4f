"""The programs in README run as they stand there."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from tests.layout.runs import LLAMA, reference, run

ROOT = Path(__file__).parents[1]
LONGEST = 61


def programs() -> list[str]:
    """The Python in README: a schedule, and the library from text to text."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


def test_the_schedule_trains_like_one_device(tmp_path):
    schedule, _ = programs()
    assert len(schedule.splitlines()) <= 20
    (tmp_path / "schedules.py").write_text(schedule, encoding="utf-8")
    model = dataclasses.replace(LLAMA, num_layers=4)
    fields = {"schedule": f"{tmp_path}/schedules.py:mine", "num_microbatches": 4}
    layout = make_layout(MeshConfig(pipeline=4, data=2), LayoutConfig(**fields))
    np.testing.assert_allclose(run(model, layout, 2), reference(model)[:2], rtol=1e-5)


def test_the_program_trains_and_writes(tmp_path):
    _, program = programs()
    assert len(program.splitlines()) <= LONGEST
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "program.py", os.__file__, "30", "def "],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAXLLM_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run.stderr)]
    assert losses[-1] < losses[0] - 1
    assert run.stdout.startswith("def ") and len(run.stdout) > 10
