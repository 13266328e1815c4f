"""A GPT-2 from scratch against Kneser-Ney n-grams on Romance of the Three Kingdoms: held-out bits per character.

    python -m tests.benchmarks.sanguo --path ../shared/data/sanguoyanyi.txt --workdir runs/sanguo

Trains configs/sanguo.py with the jaxllm command, unless WORKDIR holds a finished run already, and prints the table.
Both sides see the same split (jaxllm's own: from config.data.held_out on is held out) and count the same characters.
The n-grams spread their last share evenly over all characters of the whole text, so they know which characters the
held-out part uses, and their probabilities over those sum to one; the model knows the training part's alone, writes
others in bytes, and pays for the end of the text as well. Neither has the training text before the first character.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from jaxllm.data.held_out import read_held_out, split_documents
from jaxllm.data.sources import open_source
from tests.benchmarks.kneser_ney import KneserNey

ROOT = Path(__file__).parents[2]
CONFIG = "sanguo.py"
ORDERS = (2, 3, 4, 5)
DISCOUNT = 0.75
JAXLLM = (sys.executable, "-c", "import sys; from jaxllm.cli.main import main; sys.exit(main())")


def read_split(path: str, marker: str) -> tuple[str, str]:
    """The training and the held-out part of a text, as `jaxllm train` cuts it."""
    pieces = list(split_documents(open_source("text", path, "text"), read_held_out(marker)))
    train, held_out = ("".join(p.text for p in pieces if p.held_out is side) for side in (False, True))
    return train, held_out


def train(config: str, path: str, workdir: Path, *flags: str) -> tuple[float, float]:
    """Runs the jaxllm command with a file of configs/, its output on stderr; (minutes by the clock, CPU seconds)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    flags = (
        "--config",
        str(ROOT / "configs" / config),
        "--workdir",
        str(workdir),
        f"--config.data.path={path}",
        *flags,
    )
    used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([*JAXLLM, "train", *flags], check=True, env=environment, stdout=sys.stderr)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return (time.monotonic() - start) / 60, cpu


def final_evaluation(workdir: Path) -> dict[str, float] | None:
    """The metrics of the last step, once the run in `workdir` has come to it."""
    metrics, config = workdir / "metrics.jsonl", workdir / "config.json"
    if not (metrics.exists() and config.exists()):
        return None
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    done = bool(lines) and lines[-1]["step"] == json.loads(config.read_text(encoding="utf-8"))["train"]["steps"]
    return lines[-1] if done and "eval_loss" in lines[-1] else None


def machine() -> str:
    """The processor and how many of its cores this process may use."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {len(os.sched_getaffinity(0))} cores"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="sanguoyanyi.txt")
    parser.add_argument("--workdir", type=Path, default=Path("runs/sanguo"))
    arguments = parser.parse_args()
    if not Path(arguments.path).is_file():
        parser.error(f"--path {arguments.path}: no such file")

    cost = "trained before"
    if final_evaluation(arguments.workdir) is None:
        minutes, cpu = train(CONFIG, arguments.path, arguments.workdir)
        cost = f"{minutes:.1f} minutes, {cpu:,.0f} CPU seconds"
    final = final_evaluation(arguments.workdir)
    assert final is not None, "the run ended without an evaluation at its last step"

    config = json.loads((arguments.workdir / "config.json").read_text(encoding="utf-8"))
    text, held_out = read_split(arguments.path, config["data"]["held_out"])
    print(f"\n{len(text):,} characters to learn from, {len(held_out):,} held out; {machine()}\n")
    print("| model | held-out bits per character | training |\n| --- | --- | --- |")
    for order in ORDERS:
        start = time.monotonic()
        bits = KneserNey(text, order, set(text + held_out), DISCOUNT).bits_per_character(held_out)
        print(
            f"| interpolated Kneser-Ney {order}-gram, discount {DISCOUNT} | {bits:.3f} | "
            f"{time.monotonic() - start:.0f} s with scoring |"
        )
    print(f"| configs/{CONFIG}, {final['step']:,} steps | {final['eval_bits_per_char']:.3f} | {cost} |")


if __name__ == "__main__":
    main()
