"""`jaxllm`, where something befalls the batches: the campaign of faults starts it in place of the command.

python -m tests.poisoned train --config=… --workdir=…

What befalls them, by the number of their first row, is in the environment:
  POISONED_NAN=ROW      that batch makes the loss not a number
  POISONED_LEFT_OUT=A-B the data goes from row A to row B at once
  POISONED_SLOW=ROW     that batch is waited for, and WORKDIR/loading is there meanwhile
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.cli.main import main
from jaxllm.data.batch import Batch
from jaxllm.model.dropout import DropoutKey
from jaxllm.model.head import Loss
from jaxllm.model.transformer import Transformer
from jaxllm.steps import STEPS, pretrain
from jaxllm.train import loop
from jaxllm.train.source import DatasetSource, Setting
from jaxllm.train.state import TrainState

SLOW_SECONDS = 1.0
LOADING = "loading"


class Poisoned(DatasetSource):
    """A data set whose batches meet what the environment says."""

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self._mark = setting.workdir / LOADING

    def next(self, state: TrainState):
        row = self._loader.state()["rows"]
        if left_out := os.environ.get("POISONED_LEFT_OUT"):
            first, after = map(int, left_out.split("-"))
            if row == first:
                self._loader.restore(self._loader.state() | {"rows": after})
        if os.environ.get("POISONED_SLOW") == str(row):
            _wait(self._mark)
        batch = super().next(state)
        return _marked(batch) if os.environ.get("POISONED_NAN") == str(row) else batch


def _wait(mark: Path) -> None:
    mark.touch()
    time.sleep(SLOW_SECONDS)
    mark.unlink(missing_ok=True)


def _marked(batch):
    """The batch with positions that the loss here takes for poison: of whole numbers none is NaN."""
    nowhere = lambda index: np.full(batch.positions.shape, -1, np.int32)[index]  # noqa: E731
    positions = jax.make_array_from_callback(batch.positions.shape, batch.positions.sharding, nowhere)
    return batch._replace(positions=positions)


def loss_with_poison(model: Transformer, batch: Batch, *, dropout: DropoutKey | None) -> Loss:
    """The pretraining loss; of a marked batch NaN, and so is every gradient."""
    loss = pretrain.loss(model, batch, dropout=dropout)
    return loss._replace(total=loss.total * jnp.where((batch.positions < 0).any(), jnp.nan, 1.0))


if __name__ == "__main__":
    STEPS["pretrain"] = dataclasses.replace(STEPS["pretrain"], loss=loss_with_poison)
    train = loop.train
    loop.train = lambda *arguments, **how: train(*arguments, **how | {"open_source": Poisoned})
    sys.exit(main())
