"""Spikes of the loss and of the gradient's norm, by their z-scores against the steps before (as in llm.c)."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

LAG = 2  # a step is dispatched before the metrics of the one before it are read


class Spikes:
    """What is usual for a run, and what is not.

    Args:
      window: how many steps tell what is usual; before there are so many, nothing is unusual.
      threshold: standard deviations above the mean from which a value is a spike.
    """

    def __init__(self, window: int, threshold: float):
        self._window, self._threshold = window, threshold
        self._past: deque[tuple[int, float, float]] = deque(maxlen=window + LAG)  # step, loss, norm
        self.on_end = 0  # steps with a spike, up to the last one read

    def read(self, step: int, loss: float, norm: float) -> float:
        """Takes what a step came to. Returns the larger z-score of the two; 0 where too little is known."""
        pairs = zip((loss, norm), self._usual(step - 1), strict=True)
        scores = [(value - mean) / deviation for value, (mean, deviation) in pairs if deviation > 0]
        score = max((s for s in scores if math.isfinite(s)), default=0.0)
        self.on_end = self.on_end + 1 if score > self._threshold else 0
        if math.isfinite(loss) and math.isfinite(norm):
            self._past.append((step, loss, norm))
        return score

    def limits(self, step: int) -> Float[np.ndarray, "2"]:
        """Loss and norm above which a step that is now dispatched is to be skipped.

        They hang on the values of steps up to step - 2 alone, never on when metrics happened to be read.
        """
        limits = [mean + self._threshold * deviation for mean, deviation in self._usual(step - LAG)]
        return np.array(limits, np.float32)

    def state(self) -> list[list[float]]:
        """JSON-able."""
        return [list(values) for values in self._past]

    def restore(self, state: Iterable[Any]) -> None:
        """Goes on from a `state`."""
        self._past.clear()
        self._past.extend((int(step), float(loss), float(norm)) for step, loss, norm in state)
        self.on_end = 0

    def _usual(self, last: int) -> list[tuple[float, float]]:
        """Mean and standard deviation of loss and norm over the window that ends with this step."""
        past = [values[1:] for values in self._past if values[0] <= last][-self._window :]
        if len(past) < self._window:
            return [(math.inf, 0.0)] * 2
        return [_mean_and_deviation(column) for column in zip(*past, strict=True)]


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
