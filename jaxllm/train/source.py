"""Where the batches of a run come from: a data set that is read, or (jaxllm/rollout) the model itself, which writes."""

import contextlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxllm.data.config import DataConfig
from jaxllm.data.dataset import Dataset, prepare
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.layout.layout import Layout
from jaxllm.layout.mesh import in_order
from jaxllm.model.spec import ModelSpec
from jaxllm.steps import STEPS
from jaxllm.train.config import Config
from jaxllm.train.precomputed import PrecomputedReference
from jaxllm.train.reference import is_precomputed
from jaxllm.train.state import TrainState
from jaxllm.train.train_step import make_eval_step

Record = dict[str, float]


class Setting(NamedTuple):
    """What a source is opened with."""

    config: Config
    data: DataConfig  # the config's, or with the tokenizer that the run has already
    workdir: Path
    say: Callable[[str], None]
    progress: bool
    alive: Callable[[str], None] = lambda doing: None  # to be told that work goes on, and which


class Source(Protocol):
    """Batches without end. `open` comes before all that follows it here."""

    tokenizer: Tokenizer
    length: int  # tokens a row
    evaluates: bool  # whether there is something held out

    def describe(self) -> list[str]:
        """Lines to print at the start."""

    def epochs(self, steps: int) -> float:
        """How often so many steps go through the data."""

    def open(self, spec: ModelSpec, layout: Layout) -> None:
        """Makes ready to yield batches for this model under this layout."""

    def begin(self, state: TrainState, stored: dict[str, Any] | None, arrays: dict[str, Any], base_hash: str) -> None:
        """Begins, or goes on where a checkpoint left off.

        Args:
          state: that the run begins with.
          base_hash: of the parameters that the run trains an adapter for; "" where it trains a whole model.
        """

    def next(self, state: TrainState) -> Any:
        """The batch of the next step, which `state` takes."""

    def stepped(self, metrics: dict[str, jax.Array]) -> None:
        """What a step made of the batch; it may not be there yet."""

    def told(self) -> Record:
        """What was found out since this was last asked, for the log."""

    def state(self) -> dict[str, Any]:
        """Where it stands; JSON-able."""

    def arrays(self) -> dict[str, Any]:
        """What of it lies on the devices; nested dicts."""

    def abstract_arrays(self) -> dict[str, Any]:
        """The same as `jax.ShapeDtypeStruct`s with shardings."""

    def evaluate(self, state: TrainState) -> Record:
        """eval_loss and the like, of what is held out."""

    def close(self) -> None:
        """Stops what is under way."""


OpenSource = Callable[[Setting], Source]


class DatasetSource:
    """Batches of a data set that is read: a `Source`."""

    def __init__(self, setting: Setting):
        """Raises a UserError for what is wrong with data and config."""
        self._config, self._workdir, self._alive = setting.config, setting.workdir, setting.alive
        config = setting.config
        self.length = config.data.length or config.model.max_length
        kind = STEPS[config.train_step].batch
        rows = {"length": self.length, "kind": kind, "places": config.adapter.places}
        self.data: Dataset = prepare(setting.data, **rows, progress=setting.progress)
        self.tokenizer, self.evaluates = self.data.tokenizer, bool(self.data.held_out)

    def describe(self) -> list[str]:
        return self.data.describe()

    def epochs(self, steps: int) -> float:
        return steps * self._config.data.batch_size / self.data.rows_an_epoch(self._config.seed)

    def open(self, spec: ModelSpec, layout: Layout) -> None:
        config, self._layout = self._config, layout
        sharding = layout.sharding("batch", None)
        self._loader = self.data.train_loader(sharding, batch_size=config.data.batch_size, seed=config.seed)
        self._reference = None
        if is_precomputed(config):
            self._reference = PrecomputedReference(config, self.data, spec, layout, self._workdir)
        self._eval_step = make_eval_step(STEPS[config.train_step], spec, config, layout, self.tokenizer.vocab_size)

    def begin(self, state: TrainState, stored: dict[str, Any] | None, arrays: dict[str, Any], base_hash: str) -> None:
        if stored is not None:
            self._loader.restore(stored)
        if self._reference is not None and stored is None:
            self._reference.compute(state, self._alive)
        elif self._reference is not None:
            self._reference.restore()

    def next(self, state: TrainState) -> Any:
        return self._referred(next(self._loader))

    def _referred(self, batch: Any) -> Any:
        return batch if self._reference is None else self._reference.referred(batch)

    def stepped(self, metrics: dict[str, jax.Array]) -> None:
        pass

    def told(self) -> Record:
        return {}

    def state(self) -> dict[str, Any]:
        return self._loader.state()

    def arrays(self) -> dict[str, Any]:
        return {}

    abstract_arrays = arrays

    def evaluate(self, state: TrainState) -> Record:
        """eval_loss (nats a token of the held-out split, where tokens are predicted), eval_ and every metric of the
        step's loss; where every token is predicted eval_bits_per_char.

        Batches have the size of a microbatch, so that an evaluation never needs more memory than training (a pipeline
        takes whole ones, and splits them); a limit of `eval_batches` counts whole ones, so that it covers the same rows
        whatever the microbatches.
        """
        config, layout = self._config, self._layout
        microbatches = 1 if layout.num_stages > 1 else config.layout.num_microbatches
        size = config.data.batch_size // microbatches
        batches = self.data.eval_batches(layout.sharding("batch", None), batch_size=size)
        waiting: list[Any] = []
        sums: list[np.ndarray] = []
        with contextlib.closing(batches):
            for batch in islice(batches, config.train.eval_batches * microbatches or None):
                waiting.append(in_order(self._eval_step(state, self._referred(batch))))
                if len(waiting) > 1:  # one in work, one dispatched
                    sums.append(_in_float64(waiting.pop(0)))
                    self._alive("evaluating")
        sums += map(_in_float64, waiting)
        result = jax.tree.map(lambda *parts: np.sum(parts), *sums)
        loss = float(result.total / result.weight)
        means = {f"eval_{name}": float(m.total / max(m.count, 1e-9)) for name, m in (result.metrics or {}).items()}
        if not STEPS[config.train_step].predicts_every_token:
            return {"eval_loss": loss, **means}
        return {"eval_loss": loss, "eval_bits_per_char": self.data.bits_per_character(loss), **means}

    def close(self) -> None:
        if hasattr(self, "_loader"):
            self._loader.close()


def _in_float64(result: Any) -> Any:
    return jax.tree.map(np.float64, jax.device_get(result))
