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
    text = "".join(f"{n} and {n + 1} make {2 * n + 1}.\n" for n in range(3_000))
    (tmp_path / "sums.txt").write_text(text, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "program.py", "sums.txt", "30", "7 and 8"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAXLLM_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run.stderr)]
    assert losses[-1] < losses[0] - 1
    assert run.stdout.startswith("7 and 8") and len(run.stdout) > 10
