"""`jaxllm`, in one process of which reading a batch fails, or never ends.

FAILS=PROCESS:ROW:crash|hang python -m tests.failing_run train --config=… --workdir=…
"""

import os
import sys
import threading

import jax

from jaxllm.cli.main import main
from jaxllm.train import loop
from jaxllm.train.source import DatasetSource
from jaxllm.train.state import TrainState


class Failing(DatasetSource):
    """A data set of which the batch from row ROW on cannot be read in process PROCESS."""

    def next(self, state: TrainState):
        process, row, how = os.environ["FAILS"].split(":")
        if jax.process_index() == int(process) and self._loader.state()["rows"] == int(row):
            if how == "hang":
                threading.Event().wait()
            raise ValueError(f"the batch from row {row} on is broken")
        return super().next(state)


if __name__ == "__main__":
    train = loop.train
    loop.train = lambda *arguments, **how: train(*arguments, **how | {"open_source": Failing})
    sys.exit(main())
