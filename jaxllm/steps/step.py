"""What a train step is made of. Everything else (microbatches, layout, precision, optimizer) is shared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Array, Float

from jaxllm.data.batch import BatchKind
from jaxllm.model.dropout import DropoutKey
from jaxllm.model.head import Loss
from jaxllm.model.transformer import Transformer

Metrics = dict[str, Float[Array, ""]]


class LossFunction(Protocol):
    """A loss summed over the batch it is given, with the weight to divide it by.

    A step with options gets them as `options`.
    """

    def __call__(self, model: Transformer, batch: Any, *, dropout: DropoutKey | None) -> Loss: ...


@dataclass(frozen=True)
class Options:
    """What the loss of a step is told besides its batch: of the config, and of what is known only at the start."""

    group: Any  # the config group of the step: a DPOConfig, …
    num_tokens: int | None = None  # of the vocabulary that are tokens; None: all
    temperature: float = 1.0  # of the distribution that texts are drawn from
    max_new_tokens: int = 0  # of a text that is drawn


@dataclass(frozen=True)
class TrainStep:
    """A loss, what it takes and what it trains."""

    loss: LossFunction
    batch: BatchKind
    causal: bool = True  # whether the model must see only what comes before a token
    predicts_every_token: bool = False  # then the held-out loss is what the text costs, also in bits a character
    adapters: tuple[str, ...] = ("none",)  # the kinds of config.adapter.kind: what is trained, "none" the whole model
    options: str = ""  # the config group that its loss gets; "": none
    scalar_head: bool = False  # whether the model has one, and that is what learns
    refers: Callable[[Any], bool] = lambda group: False  # whether, by that config group, it needs a reference
    reference: Callable[..., Any] | None = None  # (model, batch, options) -> what the reference says of each row
    with_reference: Callable[[Any, Any], Any] | None = None  # (batch, that of all rows) -> the batch of the loss
    critic: LossFunction | None = None  # the loss of a second model (model/actor_critic.py), on the same batch
    critic_weight: Callable[[Any], float] = lambda group: 1.0  # of that loss, by the config group
    derived: Callable[[Metrics], Metrics] = lambda metrics: metrics  # metrics that are no means
    draws: bool = False  # whether its batches are texts that the model itself writes (jaxllm/rollout)
