"""Supervised fine-tuning: what the assistant says, from all that comes before it in its conversation."""

from jaxllm.data.batch import EXAMPLES, Batch
from jaxllm.model.dropout import DropoutKey
from jaxllm.model.head import Loss
from jaxllm.model.transformer import Transformer
from jaxllm.steps.step import TrainStep


def loss(model: Transformer, batch: Batch, *, dropout: DropoutKey | None) -> Loss:
    """Cross-entropy of the tokens where `loss_mask` is true, summed: answers, and what ends them.

    The shared machinery divides by the number of such tokens in the whole batch, so an example weighs what it says.
    """
    packed = (batch.tokens, batch.positions, batch.segment_ids)
    hidden, sums = model.with_sums(*packed, loss_mask=batch.loss_mask, dropout=dropout)
    return model.head.next_token_loss(hidden, batch.tokens, batch.loss_mask).plus(sums)


step = TrainStep(loss, batch=EXAMPLES)
