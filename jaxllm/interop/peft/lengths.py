"""DoRA's magnitudes where a file or a run has none: the lengths of the frozen columns, which change nothing."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from jaxllm.model.adapters import STACKED, Sides, kernel_lengths
from jaxllm.model.spec import ModelSpec
from jaxllm.train.state import Params

Lengths = Callable[[str], np.ndarray]  # path of a matrix: the lengths of its columns in all layers


def column_lengths(spec: ModelSpec, restore: Callable[[], Params]) -> Lengths:
    """The lengths of the columns of a model's matrices; it is restored when the first of them is asked for.

    Args:
      spec: `linear_spec` of the model.
    """
    restored = functools.cache(restore)

    def lengths(path: str) -> np.ndarray:
        kernel = restored()
        for name in path.split("."):
            kernel = kernel[name]
        axes = spec.parameters[f"{path}.lora.a"].axes
        stacked = sum(axis in STACKED for axis in axes)
        sides = Sides(stacked, len(axes) - stacked - 1)
        return np.asarray(jax.jit(kernel_lengths, static_argnums=1)(kernel["kernel"], sides))

    return lengths
