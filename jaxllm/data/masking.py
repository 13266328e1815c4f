"""Masked language modelling (Devlin et al. 2019, section 3.1): hidden tokens, to be told from the others."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int

from jaxllm.data.batch import Batch, BatchKind, Vocabulary
from jaxllm.data.config import DataConfig
from jaxllm.errors import UserError

MASK_TOKEN = "<mask>"
MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the others stay


class MaskedBatch(NamedTuple):
    """A `Batch` in which tokens were hidden."""

    tokens: Int[Array | np.ndarray, "batch length"]  # int32, what the model sees
    targets: Int[Array | np.ndarray, "batch length"]  # int32, what stood there
    positions: Int[Array | np.ndarray, "batch length"]
    segment_ids: Int[Array | np.ndarray, "batch length"]
    loss_mask: Bool[Array | np.ndarray, "batch length"]  # true where a token was chosen


def mask_tokens(row: Batch, random: np.random.RandomState, vocabulary: Vocabulary, config: DataConfig) -> MaskedBatch:
    """Chooses `config.mask_fraction` of the tokens, at least one: 80 % of these become the mask token, 10 % any token.

    Special tokens are never chosen, nor is the first of a segment, which no packing predicts. The context of an
    evaluation window is masked as densely as the rest but not counted, so that each held-out token counts at most once.

    Raises:
      UserError: the tokenizer has no mask token.
    """
    if vocabulary.mask_id is None:
        raise UserError(
            f"config.data.tokenizer={config.tokenizer} has no mask token ({MASK_TOKEN}, or [MASK]) to hide others "
            f"with. Train one: bpe:{vocabulary.size}, or jaxllm tokenizer --special_tokens '{MASK_TOKEN}'."
        )
    ordinary = ~np.isin(row.tokens, vocabulary.special_ids)
    candidates = np.flatnonzero(ordinary & (row.positions > 0))  # padding has positions 0
    share = config.mask_fraction * len(candidates)
    count = min(
        max(int(share + random.random_sample()), 1), len(candidates)
    )  # the share on average, whatever the length
    chosen = random.permutation(candidates)[:count]
    fate = random.random_sample(count)
    tokens = row.tokens.copy()
    tokens[chosen[fate < MASKED]] = vocabulary.mask_id
    replaced = chosen[fate >= 1 - REPLACED]
    tokens[replaced] = random.randint(vocabulary.size, size=len(replaced), dtype=np.int32)
    is_chosen = np.zeros_like(row.loss_mask)
    is_chosen[chosen] = True
    return MaskedBatch(tokens, row.tokens, row.positions, row.segment_ids, is_chosen & row.loss_mask)


MASKED_ROWS = BatchKind(mask_tokens, special_tokens=(MASK_TOKEN,))
