"""A `jax.profiler` trace of a few steps, into WORKDIR/profile (open it with TensorBoard, xprof or Perfetto)."""

from pathlib import Path
from typing import Any

import jax

from jaxllm.train.config import TrainConfig


class StepTrace:
    """Traces `config.profile_steps` steps from step `config.profile_start` on; nothing where that is -1."""

    def __init__(self, config: TrainConfig, workdir: Path):
        self._first, self._after = config.profile_start, config.profile_start + config.profile_steps
        self._folder = str(workdir / "profile")
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Starts or ends the trace, once the devices are done with the steps before."""
        if step == self._first and self._first >= 0:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._running and step == self._after:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the trace where it still runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
