"""Runs that were never trained: the files that a training run leaves, with numbers that a test knows."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxllm.train.config import Config, config_dict

NOW = 1_800_000_000.0


def write_lines(file: Path, lines: Iterable[Mapping[str, Any]], rest: str = "") -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + rest, encoding="utf-8")


def records(count: int, seconds_ago: float = 60.0, timed: bool = True) -> list[dict[str, Any]]:
    """Of steps 10, 20, …, two seconds a step, the last one `seconds_ago`."""
    made = []
    for step in range(10, 10 * count + 1, 10):
        record = {"step": step, "loss": 8.0 - step / 100, "grad_norm": 1.0, "tokens_per_second": 500.0 + step}
        record |= {"seconds_per_step": 2.0, "tokens_hash": "0badcafe"}
        made.append(record | ({"time": NOW - seconds_ago - 2 * (10 * count - step)} if timed else {}))
    return made


def event(name: str, step: int = 0, ago: float = 60.0, message: str = "", **figures: Any) -> dict[str, Any]:
    """A line of events.jsonl, `ago` seconds before NOW."""
    return {"time": NOW - ago, "step": step, "event": name, "message": message, **figures}


def make_run(
    folder: Path,
    metrics: Iterable[Mapping[str, Any]] = (),
    events: Iterable[Mapping[str, Any]] = (),
    samples: Mapping[int, Iterable[Mapping[str, Any]]] | None = None,
    **train: Any,
) -> Path:
    """Writes the run. Files without a line are left out.

    Args:
      samples: by step.
      train: fields of config.train.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config_dict(Config())
    config["train"] |= {"steps": 100} | train
    (folder / "config.json").write_text(json.dumps(config))
    for name, lines in (("metrics", metrics), ("events", events)):
        if lines:
            write_lines(folder / f"{name}.jsonl", lines)
    for step, lines in (samples or {}).items():
        (folder / "samples").mkdir(exist_ok=True)
        write_lines(folder / "samples" / f"{step:08d}.jsonl", lines)
    return folder
