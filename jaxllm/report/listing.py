"""The runs below a folder, and a table of them."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError
from jaxllm.report.run import Run, read_run
from jaxllm.written import lasted, number

DEPTH = 4  # levels below the folder in which runs are looked for
NOT_RUNS = ("checkpoints", "tensorboard", "tokenizer", "huggingface", "samples", "profile")  # in a run's folder
COLUMNS = ("run", "state", "step", "loss", "eval_loss", "tokens/s", "last activity", "restarts")


def find_runs(folder: Path, depth: int = DEPTH) -> Iterator[Run]:
    """Runs in `folder` and below, adapters too. Links and hidden folders are not followed."""
    is_run = False
    if (folder / "config.json").is_file():
        try:
            yield read_run(folder)
            is_run = True
        except UserError:  # of something else, a Hugging Face folder for one
            pass
    if depth == 0:
        return
    for name in _folders(folder):
        if not (is_run and name in NOT_RUNS):
            yield from find_runs(folder / name, depth if is_run and name == "adapters" else depth - 1)


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            inside = [e.name for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return sorted(inside)


def newest_first(runs: Iterator[Run]) -> list[Run]:
    """By their last sign of life."""
    return sorted(runs, key=lambda run: -(run.active or 0.0))


def as_dict(run: Run, below: Path) -> dict[str, Any]:
    """A run for a program. `run` is its place below the folder that was listed."""
    finite = lambda value: None if value is None or value != value else value  # noqa: E731
    return {
        "run": _place(run, below),
        "state": run.state,
        "why": run.why,
        "step": run.step,
        "steps": run.steps,
        "loss": finite(run.last("loss")),
        "eval_loss": finite(run.last("eval_loss")),
        "tokens_per_second": finite(run.last("tokens_per_second")),
        "last_activity": run.active,
        "restarts": run.restarts,
    }


def lines(runs: Sequence[Run], below: Path, now: float | None = None) -> Iterator[str]:
    """The table: numbers on the right, texts on the left."""
    now = time.time() if now is None else now
    rows = [COLUMNS, *(_row(run, below, now) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()


def _row(run: Run, below: Path, now: float) -> tuple[str, ...]:
    return (
        _place(run, below),
        run.state,
        f"{run.step:,}/{run.steps:,}" if run.steps else f"{run.step:,}",
        number(run.last("loss")),
        number(run.last("eval_loss")),
        number(run.last("tokens_per_second")),
        "-" if run.active is None else f"{lasted(now - run.active)} ago",
        str(run.restarts),
    )


def _place(run: Run, below: Path) -> str:
    place = run.folder.relative_to(below)
    return str(place) if place.parts else run.name
