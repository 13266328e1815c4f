"""Direct preference optimisation: what people prefer, learned without a reward model (Rafailov et al. 2023).

Also IPO, the reference-free ORPO and SimPO, and others: `config.dpo.loss` (steps/preference_losses.py).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.data.batch import MAX_PAIRS, PAIRS, PairBatch
from jaxllm.layout.sequence import to_device_order
from jaxllm.model.dropout import DropoutKey
from jaxllm.model.head import Loss, where_predicted
from jaxllm.model.transformer import Transformer
from jaxllm.steps.alignment_config import REFERENCE_FREE
from jaxllm.steps.preference_losses import preference_loss
from jaxllm.steps.segments import of_pairs, sums_by_segment
from jaxllm.steps.step import Options, TrainStep


class ReferredPairs(NamedTuple):
    """A batch, and what the reference model says of it."""

    pairs: PairBatch
    reference: Float[Array, "batch segments"]  # summed log-probability of each response


def loss(model: Transformer, batch: PairBatch | ReferredPairs, *, dropout: DropoutKey | None, options: Options) -> Loss:
    """The loss `config.dpo.loss`, summed over pairs, of the log-probabilities of their responses."""
    pairs, reference = batch if isinstance(batch, ReferredPairs) else (batch, None)
    hidden, sums = model.with_sums(
        pairs.tokens, pairs.positions, pairs.segment_ids, loss_mask=pairs.loss_mask, dropout=dropout
    )
    chosen, rejected = of_pairs(_response_log_probs(model, hidden, pairs))
    counts = sums_by_segment(pairs.loss_mask.astype(jnp.float32), pairs.segment_ids, 2 * MAX_PAIRS)
    references = (None, None) if reference is None else of_pairs(reference)
    is_pair = of_pairs(counts)[0] > 0
    return preference_loss(chosen, rejected, *references, *of_pairs(counts), is_pair, options.group).plus(sums)


def reference_log_probs(model: Transformer, pairs: PairBatch, options: Options) -> Float[Array, "batch segments"]:
    """The summed log-probability of each response under the reference model."""
    hidden = model(pairs.tokens, pairs.positions, pairs.segment_ids)
    return _response_log_probs(model, hidden, pairs)


def _response_log_probs(model: Transformer, hidden: Array, pairs: PairBatch) -> Float[Array, "batch segments"]:
    log_probs = model.head.log_probs(hidden, where_predicted(pairs.tokens)).log_probs
    counted = log_probs * where_predicted(pairs.loss_mask.astype(jnp.float32))
    return sums_by_segment(counted, to_device_order(pairs.segment_ids), 2 * MAX_PAIRS)


step = TrainStep(
    loss,
    batch=PAIRS,
    adapters=("none", "lora"),
    options="dpo",
    refers=lambda group: group.loss not in REFERENCE_FREE,
    reference=reference_log_probs,
    with_reference=ReferredPairs,
)
