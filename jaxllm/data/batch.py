"""The batch every language-model step takes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int


class Batch(NamedTuple):
    """Packed sequences. Host side the leaves are NumPy arrays, on the devices global `jax.Array`s."""

    tokens: Int[Array | np.ndarray, "batch length"]  # int32
    positions: Int[Array | np.ndarray, "batch length"]  # int32, from 0 in each document
    segment_ids: Int[Array | np.ndarray, "batch length"]  # int32: 1, 2, … a document of the row; 0 is padding
    loss_mask: Bool[Array | np.ndarray, "batch length"]  # true where this token is to be predicted from those before


# Whole along the length also where the layout splits sequences: tokens are few bytes, and the model puts its part of
# them in the order of the devices without communication.
BATCH_AXES = Batch(*[("batch", None)] * 4)
