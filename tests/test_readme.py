"""The program in README runs as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 61


def test_the_program_trains_and_writes(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
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
