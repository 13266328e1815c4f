"""Which tokens of its document a token attends to, and how their distance weighs."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.model.config import ModelConfig


@dataclass(frozen=True)
class Pattern:
    """A mask and a bias, functions of where query and key stand in the text. Never an array of a whole text."""

    causal: bool = True  # keys after the query are not seen
    window: int = 0  # a query sees so many tokens at most, its own included; 0: all
    alibi_heads: int = 0  # ALiBi with the slopes of a model of so many heads; 0: none

    def visible(
        self, queries: Int[Array, "*rows queries"], keys: Int[Array, " keys"]
    ) -> Bool[Array, "*rows queries keys"] | None:
        """The mask, or None where all is visible."""
        distance = queries[..., None] - keys
        mask = distance >= 0 if self.causal else None
        if self.window:
            near = distance < self.window if self.causal else jnp.abs(distance) < self.window
            mask = near if mask is None else mask & near
        return mask

    def bias(
        self, heads: Int[Array, " heads"], queries: Int[Array, " queries"], keys: Int[Array, " keys"]
    ) -> Float[Array, "heads queries keys"] | None:
        """What is added to the logits of the heads with these numbers, float32, or None (Press et al. 2022)."""
        if not self.alibi_heads:
            return None
        distance = jnp.abs(queries[:, None] - keys).astype(jnp.float32)
        return -jnp.asarray(alibi_slopes(self.alibi_heads))[heads][:, None, None] * distance

    def keys_seen(self, start: int, end: int, length: int) -> tuple[int, int]:
        """Of a text of `length` tokens, the first and the last + 1 that queries `start` to `end` may see."""
        first = max(0, start - self.window + 1) if self.window else 0
        last = end if self.causal else min(length, end + self.window - 1) if self.window else length
        return first, last


CAUSAL = Pattern()


def pattern_of(config: ModelConfig) -> Pattern:
    """The pattern of a model."""
    alibi = config.num_heads if config.positions == "alibi" else 0
    return Pattern(config.causal, config.sliding_window, alibi)


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " heads"]:
    """2^(-8i/n), i = 1 … n, for n heads, n a power of two; else those of the power below, and every other of the one
    above (Press et al. 2022, and their code)."""

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8 * i / n) for i in range(1, n + 1)]

    below = 2 ** math.floor(math.log2(num_heads))
    return np.array([*powers(below), *powers(2 * below)[::2]][:num_heads], np.float32)
