"""Group relative policy optimisation (Shao et al. 2024): answers to one prompt are held against each other.

With DAPO's clip-higher and token-level loss and Dr. GRPO's normalisation: `config.grpo` (steps/policy_losses.py).
"""

from jaxllm.model.dropout import DropoutKey
from jaxllm.model.head import Loss, where_predicted
from jaxllm.model.transformer import Transformer
from jaxllm.steps.experience import EXPERIENCE, Experience, drawn_log_probs
from jaxllm.steps.policy_losses import grpo_loss
from jaxllm.steps.step import Options, TrainStep


def loss(model: Transformer, batch: Experience, *, dropout: DropoutKey | None, options: Options) -> Loss:
    """The clipped ratio of probabilities times the advantage, and the divergence from the reference, summed."""
    hidden, sums = model.with_sums(
        batch.tokens, batch.positions, batch.segment_ids, loss_mask=batch.loss_mask, dropout=dropout
    )
    now = drawn_log_probs(model, hidden, batch, options)
    said = (batch.log_probs, batch.reference_log_probs, batch.advantages, batch.loss_mask)
    then, reference, advantages, mask = map(where_predicted, said)
    reference = reference if options.group.kl_weight > 0 else None
    how_long = options.max_new_tokens
    return grpo_loss(now.log_probs, then, reference, advantages, mask, now.entropy, how_long, options.group).plus(sums)


step = TrainStep(
    loss,
    batch=EXPERIENCE,
    adapters=("none", "lora"),
    options="grpo",
    refers=lambda group: group.kl_weight > 0,
    draws=True,
)
