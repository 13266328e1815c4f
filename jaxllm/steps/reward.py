"""The reward model: what people prefer, as one number for a text (Christiano et al. 2017, Stiennon et al. 2020)."""

import jax.numpy as jnp

from jaxllm.data.batch import MAX_PAIRS, PAIRS, PairBatch
from jaxllm.layout.sequence import to_device_order
from jaxllm.model.dropout import DropoutKey
from jaxllm.model.head import Loss
from jaxllm.model.transformer import Transformer
from jaxllm.steps.preference_losses import bradley_terry
from jaxllm.steps.segments import ends_of_segments, of_pairs, sums_by_segment
from jaxllm.steps.step import Options, TrainStep


def loss(model: Transformer, batch: PairBatch, *, dropout: DropoutKey | None, options: Options) -> Loss:
    """-log sigmoid(score of the chosen - score of the rejected - margin), summed over pairs (Bradley & Terry 1952).

    The score is the scalar head's on the last token of a text.
    """
    hidden, sums = model.with_sums(
        batch.tokens, batch.positions, batch.segment_ids, loss_mask=batch.loss_mask, dropout=dropout
    )
    segments = to_device_order(batch.segment_ids)
    ends = ends_of_segments(batch.segment_ids).astype(jnp.float32)
    chosen, rejected = of_pairs(sums_by_segment(model.score(hidden) * ends, segments, 2 * MAX_PAIRS))
    is_pair, _ = of_pairs(sums_by_segment(ends, segments, 2 * MAX_PAIRS) > 0)
    margins, _ = of_pairs(sums_by_segment(batch.margins, batch.segment_ids, 2 * MAX_PAIRS))
    return bradley_terry(chosen, rejected, margins, is_pair, options.group).plus(sums)


step = TrainStep(loss, batch=PAIRS, adapters=("none", "lora"), options="reward", scalar_head=True)
