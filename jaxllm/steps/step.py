"""What a train step is made of. Everything else (microbatches, layout, precision, optimizer) is shared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from flax import nnx

from jaxllm.model.dropout import DropoutKey
from jaxllm.model.head import Loss
from jaxllm.model.transformer import Transformer


class LossFunction(Protocol):
    """A loss summed over the batch it is given, with the weight to divide it by."""

    def __call__(self, model: Transformer, batch: Any, *, dropout: DropoutKey | None) -> Loss: ...


@dataclass(frozen=True)
class TrainStep:
    """A loss and what it trains."""

    loss: LossFunction
    axes: Any  # the logical axes of each leaf of its batch
    trains: Callable[..., bool] | type[nnx.Variable] = nnx.Param  # an nnx filter
