"""What a train step is made of. Everything else (microbatches, layout, precision, optimizer) is shared."""

from dataclasses import dataclass
from typing import Any, Protocol

from jaxllm.data.batch import BatchKind
from jaxllm.model.dropout import DropoutKey
from jaxllm.model.head import Loss
from jaxllm.model.transformer import Transformer


class LossFunction(Protocol):
    """A loss summed over the batch it is given, with the weight to divide it by."""

    def __call__(self, model: Transformer, batch: Any, *, dropout: DropoutKey | None) -> Loss: ...


@dataclass(frozen=True)
class TrainStep:
    """A loss, what it takes and what it trains."""

    loss: LossFunction
    batch: BatchKind
    causal: bool = True  # whether the model must see only what comes before a token
    predicts_every_token: bool = False  # then the held-out loss is what the text costs, also in bits a character
    adapters: tuple[str, ...] = ("none",)  # the kinds of config.adapter.kind: what is trained, "none" the whole model
