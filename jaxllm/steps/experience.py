"""What a model has written, and what was made of it: the batch of PPO and GRPO, one text a row."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.data.batch import Batch, BatchKind, Vocabulary
from jaxllm.data.config import DataConfig
from jaxllm.layout.log_probs import TokenLogProbs
from jaxllm.model.head import where_predicted
from jaxllm.model.transformer import Transformer
from jaxllm.steps.segments import ends_of_segments
from jaxllm.steps.step import Options


class Experience(NamedTuple):
    """Prompts with answers. What is said of a token stands in its place, and is 0 where it is none of an answer."""

    tokens: Int[Array | np.ndarray, "batch length"]
    positions: Int[Array | np.ndarray, "batch length"]
    segment_ids: Int[Array | np.ndarray, "batch length"]
    loss_mask: Bool[Array | np.ndarray, "batch length"]  # true on the tokens of an answer that is learned from
    log_probs: Float[Array | np.ndarray, "batch length"]  # of the model that wrote them
    reference_log_probs: Float[Array | np.ndarray, "batch length"]
    advantages: Float[Array | np.ndarray, "batch length"]
    returns: Float[Array | np.ndarray, "batch length"]  # PPO: what the critic is to learn
    values: Float[Array | np.ndarray, "batch length"]  # PPO: what it expected


def _row(row: Batch, random: np.random.RandomState, vocabulary: Vocabulary, config: DataConfig) -> Experience:
    nothing = np.zeros(row.tokens.shape, np.float32)
    return Experience(*row, nothing, nothing, nothing, nothing, nothing)


EXPERIENCE = BatchKind(_row)


def drawn_log_probs(
    model: Transformer, hidden: Float[Array, "batch length embed"], rows: Batch | Experience, options: Options
) -> TokenLogProbs:
    """Of each token under the distribution that answers are drawn from: where it is predicted, in device order."""
    how = {"temperature": options.temperature, "num_tokens": options.num_tokens}
    return model.head.log_probs(hidden, where_predicted(rows.tokens), **how)


def answer_log_probs(model: Transformer, rows: Batch, options: Options) -> Float[Array, "batch length"]:
    """The first of what `drawn_log_probs` returns."""
    return drawn_log_probs(model, model(rows.tokens, rows.positions, rows.segment_ids), rows, options).log_probs


def values(model: Transformer, rows: Batch) -> Float[Array, "batch length"]:
    """What a critic expects of each text up to each token; in device order."""
    return model.score(model(rows.tokens, rows.positions, rows.segment_ids))


def scores(model: Transformer, rows: Batch) -> Float[Array, " batch"]:
    """A reward model's score of each text: on its last token."""
    hidden = model(rows.tokens, rows.positions, rows.segment_ids)
    return (model.score(hidden) * ends_of_segments(rows.segment_ids)).sum(1)
