"""Proximal policy optimisation (Schulman et al. 2017) of what a reward says of answers (Ouyang et al. 2022)."""

from jaxllm.model.dropout import DropoutKey
from jaxllm.model.head import Loss, where_predicted
from jaxllm.model.transformer import Transformer
from jaxllm.steps.experience import EXPERIENCE, Experience, drawn_log_probs
from jaxllm.steps.policy_losses import explained_variance, policy_loss, value_loss
from jaxllm.steps.step import Options, TrainStep


def loss(model: Transformer, batch: Experience, *, dropout: DropoutKey | None, options: Options) -> Loss:
    """The actor's: the clipped ratio of probabilities times the advantage, summed over the tokens of answers."""
    hidden, sums = model.with_sums(
        batch.tokens, batch.positions, batch.segment_ids, loss_mask=batch.loss_mask, dropout=dropout
    )
    now = drawn_log_probs(model, hidden, batch, options)
    then, advantages, mask = map(where_predicted, (batch.log_probs, batch.advantages, batch.loss_mask))
    return policy_loss(now.log_probs, then, advantages, mask, now.entropy, options.group).plus(sums)


def critic_loss(model: Transformer, batch: Experience, *, dropout: DropoutKey | None, options: Options) -> Loss:
    """The critic's: the clipped squared error of its values, summed over the tokens of answers."""
    hidden, sums = model.with_sums(
        batch.tokens, batch.positions, batch.segment_ids, loss_mask=batch.loss_mask, dropout=dropout
    )
    then, returns, mask = map(where_predicted, (batch.values, batch.returns, batch.loss_mask))
    return value_loss(model.score(hidden), then, returns, mask, options.group).plus(sums)


step = TrainStep(
    loss,
    batch=EXPERIENCE,
    adapters=("none", "lora"),
    options="ppo",
    refers=lambda group: group.kl_weight > 0,
    critic=critic_loss,
    critic_weight=lambda group: group.value_weight,
    derived=explained_variance,
    draws=True,
)
