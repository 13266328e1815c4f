"""From logits to the next token: temperature, top-k, top-p, min-p and repetition penalty, each row with its own.

The settings are arrays, one value a row, so that one compiled function serves every setting and rows of one batch may
differ. They are applied in the order of Hugging Face transformers' logits processors: repetition penalty, temperature,
top-k, top-p, min-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxllm.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Every default but the temperature changes nothing."""

    temperature: float = 1.0  # divides the logits; 0: greedy, the most probable token
    top_k: int = 0  # only the k most probable tokens; 0: all
    top_p: float = 1.0  # the fewest tokens that together have this probability (Holtzman et al. 2020); 1: all
    min_p: float = 0.0  # only tokens at least this part as probable as the most probable (Nguyen et al. 2024); 0: all
    repetition_penalty: float = (
        1.0  # logits of tokens seen in prompt or output shrink by it (Keskar et al. 2019); 1: none
    )

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        _check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1: no penalty)")


def _check(name: str, value: float, fine: bool, says: str) -> None:
    if not fine:
        raise UserError(f"{name}={value} must be {says}.")


class SamplingArrays(NamedTuple):
    """The settings of a batch, one value a row; see `Sampling`."""

    temperature: Float[Array | np.ndarray, "batch"]
    top_k: Int[Array | np.ndarray, "batch"]
    top_p: Float[Array | np.ndarray, "batch"]
    min_p: Float[Array | np.ndarray, "batch"]
    repetition_penalty: Float[Array | np.ndarray, "batch"]


def stack(rows: Sequence[Sampling]) -> SamplingArrays:
    """The settings of each row as arrays, float32 and int32."""
    return SamplingArrays(
        *(
            np.array([getattr(row, name) for row in rows], np.int32 if name == "top_k" else np.float32)
            for name in SamplingArrays._fields
        )
    )


def row_keys(seed: int, rows: int) -> Key[Array, "batch"]:
    """A random key for each row: a function of the seed and the row's number, not of how many rows there are."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


def sample(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    settings: SamplingArrays,
    keys: Key[Array, "batch"],
) -> Int[Array, "batch"]:
    """Draws one token a row, int32.

    Args:
      logits: float32.
      seen: tokens that the row's prompt or output already holds, for the repetition penalty.
      settings: one value a row.
      keys: one random key a row; a row's token depends on nothing of the other rows.
    """
    logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(_):
        kept, order = keep_probable(logits, settings)
        choice = jax.vmap(jax.random.categorical)(keys, kept)
        drawn = jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0]
        return jnp.where(settings.temperature > 0, drawn, greedy)

    # A greedy batch is spared the sort over the vocabulary.
    return jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda _: greedy, None)


def penalize_repetition(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], penalty: Float[Array, "batch"]
) -> Float[Array, "batch vocab"]:
    """Keskar et al. 2019 (CTRL) as transformers has it: a seen token's logit is divided by the penalty where it is
    positive and multiplied by it where it is negative, so that a penalty above 1 always makes it less probable."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_probable(
    logits: Float[Array, "batch vocab"], settings: SamplingArrays
) -> tuple[Float[Array, "batch vocab"], Int[Array, "batch vocab"]]:
    """Logits after temperature, top-k, top-p and min-p, most probable first, and the token ids in that order.

    Tokens that are left out are -inf. The most probable token always stays. As in transformers, tokens that tie with
    the k-th most probable stay too. Rows of temperature 0 are handled as of temperature 1.
    """
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1)[:, None]
    order = jnp.argsort(logits, axis=-1, descending=True).astype(jnp.int32)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature

    k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, logits.shape[-1]), logits.shape[-1])
    kth = jnp.take_along_axis(ranked, k[:, None] - 1, axis=-1)
    ranked = jnp.where(ranked >= kth, ranked, -jnp.inf)

    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the probability of all that rank above a token
    top_p = settings.top_p[:, None]
    kept = (before < top_p) | (top_p >= 1)  # rounding must not cut the tail off where nothing is asked
    kept &= probabilities >= settings.min_p[:, None] * probabilities[:, :1]
    kept = kept.at[:, 0].set(True)
    return jnp.where(kept, ranked, -jnp.inf), order
