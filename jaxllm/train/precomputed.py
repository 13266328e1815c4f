"""config.dpo.reference=precomputed: what the reference says of all pairs, computed once, before the first step.

Then no step needs the reference's weights. The table is kept in WORKDIR/reference_log_probs.npz: the model of a run
that goes on has moved, and could not compute it again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from jaxllm.data.batch import MAX_PAIRS, PairBatch
from jaxllm.data.dataset import Dataset
from jaxllm.errors import UserError
from jaxllm.layout.layout import Layout, as_dtype, use_layout
from jaxllm.layout.mesh import one_at_a_time
from jaxllm.model.spec import ModelSpec
from jaxllm.steps import dpo
from jaxllm.train.config import Config
from jaxllm.train.forward import said_of_rows
from jaxllm.train.learner import step_options, weights_of
from jaxllm.train.state import TrainState

FILE = "reference_log_probs.npz"


class PrecomputedReference:
    """The summed log-probabilities of both responses of every pair under the model that a run starts from."""

    def __init__(self, config: Config, data: Dataset, spec: ModelSpec, layout: Layout, workdir: Path):
        self._config, self._data, self._spec, self._layout = config, data, spec, layout
        self._file, self._table = workdir / FILE, None
        self._attach = one_at_a_time(jax.jit(_attached, out_shardings=layout.sharding("batch", None)))

    def compute(self, state: TrainState, alive: Callable[[str], None]) -> None:
        """By the model in `state`, at its first step; written to the run's folder.

        `alive` is told that work goes on, and which.
        """
        table = np.zeros((self._data.num_pairs + 1, 2), np.float32)
        sharding = self._layout.sharding("batch", None)
        say = one_at_a_time(jax.jit(self._said))
        for batch in self._data.every_pair(sharding, batch_size=self._config.data.batch_size):
            found = (batch.segment_ids, batch.pair_ids, say(state, batch))
            _enter(table, *(multihost_utils.process_allgather(a, tiled=True) for a in found))
            alive("computing the log-probabilities of the reference")
        if jax.process_index() == 0:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(self._file, log_probs=table, identity=self._identity)
        self._place(table)

    def restore(self) -> None:
        """From the run's folder.

        Raises:
          UserError: it is not there, or of other pairs.
        """
        try:
            with np.load(self._file, allow_pickle=False) as stored:
                table, identity = stored["log_probs"], str(stored["identity"])
        except (OSError, KeyError, ValueError):
            table, identity = None, ""
        if table is None or identity != self._identity:
            what = "is of other pairs" if identity else "cannot be read"
            raise UserError(
                f"{self._file} {what}: the log-probabilities of the reference, which the model of this run has left. "
                "Put the file back, or start a new run (or one with config.dpo.reference=alongside)."
            )
        self._place(table)

    def referred(self, batch: PairBatch) -> dpo.ReferredPairs:
        """A batch with what the reference says of its pairs."""
        return dpo.ReferredPairs(batch, self._attach(self._table, batch.segment_ids, batch.pair_ids))

    @property
    def _identity(self) -> str:
        return "/".join(stream.index.digest[:16] for stream in (*self._data.train, *self._data.held_out))

    def _place(self, table: np.ndarray) -> None:
        self._table = jax.device_put(table, jax.sharding.NamedSharding(self._layout.mesh, P()))

    def _said(self, state: TrainState, batch: PairBatch) -> Any:
        compute, options = as_dtype(self._config.precision.compute), step_options(dpo.step, self._config, None)
        params, axes, frozen = weights_of(state, self._spec, compute)
        with use_layout(self._layout):
            return said_of_rows(
                lambda weights, rows: dpo.reference_log_probs(self._spec.merge(weights), rows, options),
                params,
                axes,
                batch,
                num_microbatches=self._layout.num_microbatches,
                compute=compute,
                frozen=frozen,
            )


def _enter(table: np.ndarray, segment_ids: np.ndarray, pair_ids: np.ndarray, said: np.ndarray) -> None:
    """Puts what is said of the segments of rows into the table of pairs."""
    before = np.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    rows, columns = np.nonzero((segment_ids > 0) & (segment_ids != before))
    segments = segment_ids[rows, columns] - 1
    table[pair_ids[rows, columns], segments % 2] = said[rows, segments]


def _attached(table: Any, segment_ids: Any, pair_ids: Any) -> Any:
    """[batch, segments] of the table."""
    numbers = jnp.arange(2 * MAX_PAIRS)
    ids = jnp.where(segment_ids[..., None] == numbers + 1, pair_ids[..., None], 0).max(1)
    return table[ids, numbers % 2]
