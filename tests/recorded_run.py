"""`jaxllm`, which writes down the number of each row of the data that a process reads.

python -m tests.recorded_run train --config=… --workdir=…

WORKDIR/Rows.PROCESS has those of training, epoch after epoch, WORKDIR/EvaluationRows.PROCESS the held-out ones; what is
read ahead is there too.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import jax

from jaxllm.cli.main import main
from jaxllm.data.loader import EvaluationRows, Rows
from jaxllm.train import loop


def rows_read(workdir: Path, kind: str, process: int) -> list[int]:
    """The numbers of the rows that a process has read, in the order of reading."""
    return [int(line) for line in (workdir / f"{kind}.{process}").read_text().splitlines()]


def record(kind: type, workdir: Path) -> None:
    """Makes all rows of this kind write down their numbers, a line each; several threads read."""
    read = kind.__getitem__
    file = os.open(workdir / f"{kind.__name__}.{jax.process_index()}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    @functools.wraps(read)
    def recorded(rows: Any, index: int | slice) -> Any:
        if not isinstance(index, slice):
            os.write(file, f"{index}\n".encode())
        return read(rows, index)

    kind.__getitem__ = recorded


if __name__ == "__main__":
    train = loop.train

    def train_recorded(config: Any, given: str, **how: Any) -> int:
        workdir = Path(given)
        workdir.mkdir(parents=True, exist_ok=True)
        for kind in (Rows, EvaluationRows):
            record(kind, workdir)
        return train(config, workdir, **how)

    loop.train = train_recorded
    sys.exit(main())
