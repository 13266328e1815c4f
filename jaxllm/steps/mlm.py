"""Masked language modelling, as BERT is pretrained: hidden tokens from those on both sides (Devlin et al. 2019)."""

from jaxllm.data.masking import MASKED_ROWS, MaskedBatch
from jaxllm.model.dropout import DropoutKey
from jaxllm.model.head import Loss
from jaxllm.model.transformer import Transformer
from jaxllm.steps.step import TrainStep


def loss(model: Transformer, batch: MaskedBatch, *, dropout: DropoutKey | None) -> Loss:
    """Cross-entropy of what stood where `loss_mask` is true, summed. There is no loss on pairs of sentences."""
    packed = (batch.tokens, batch.positions, batch.segment_ids)
    hidden, sums = model.with_sums(*packed, loss_mask=batch.loss_mask, dropout=dropout)
    return model.head.token_loss(hidden, batch.targets, batch.loss_mask).plus(sums)


step = TrainStep(loss, batch=MASKED_ROWS, causal=False)
