"""Short runs of the benchmarks of adapters."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


def output_of(module: str, *arguments: str) -> str:
    """What a benchmark prints, on one device and compiled to be fast."""
    # As many threads as there are cores: sums over threads, and so what is learned, differ with their number.
    environment = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    made = subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_adapters_bring_out_what_a_base_can_do(tmp_path):
    """Exact answers to held-out questions whose tag is left out; a prefix teaches nothing that the base cannot do."""
    made = output_of(
        "tags", "--letters=5", "--base_steps=200", "--only=LoRA,prefix", "--fewer=2", f"--workdir={tmp_path}"
    )
    found = re.findall(r"^(.*) on base_(\w+): ([\d.]+) before, ([\d.]+) after", made, re.MULTILINE)
    right = {(name, base): float(after) for name, base, _, after in found}
    assert all(float(before) < 0.1 for _, _, before, _ in found)
    assert right["LoRA of query and value", "CRS"] > 0.5, made
    assert right["prefix", "CRS"] > 0.5, made
    assert right["LoRA of all layers", "C"] > right["prefix", "C"] + 0.3, made
    assert right["prefix", "C"] < 0.1, made


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real text in {DATA}")
def test_answers_are_learned_whole_and_by_lora(tmp_path):
    text, questions = DATA / "wikitext2_valid.txt", DATA / "gsm8k_test.jsonl"
    arguments = ["--base_steps=60", "--steps=40", "--narrow", f"--text={text}", f"--instructions={questions}"]
    made = output_of("instruct", *arguments, f"--workdir={tmp_path}")
    before, whole, lora = map(float, re.search(r"from ([\d.]+): whole ([\d.]+), LoRA ([\d.]+)", made).groups())
    assert whole < 0.8 * before and lora < 0.85 * before, made
    assert float(re.search(r"by LoRA: .* parameters \(([\d.]+)%\)", made)[1]) < 5
