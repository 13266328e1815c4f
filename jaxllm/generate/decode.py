"""Token ids in, token ids out: prefill in chunks, then one compiled step a token, with a KV cache.

Prompts of unequal lengths are padded on the left, so that all rows of a batch fill the same cache slot at the same
step and end at the same one; padding is segment 0, which nothing attends. Sizes are rounded up to a few buckets, so
that other prompts find their program compiled already.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from jaxllm.generate.sampling import Sampling, SamplingArrays, row_keys, sample, stack
from jaxllm.layout.layout import Layout, constrain, pin, use_layout
from jaxllm.model.cache import KVCache, empty_cache
from jaxllm.model.spec import ModelSpec

Weights = dict[str, Any]  # nested by attribute name, as the parameters of a train state
CHUNK = 256  # prompt tokens a row that are read at once: bounds the memory of attention over a long prompt
SMALLEST_CHUNK, SMALLEST_CACHE = 16, 64  # tokens and slots a row: short prompts share one program


class Rows(NamedTuple):
    """What a batch carries from one step to the next, beside the cache."""

    tokens: Int[Array, "batch 1"]  # the newest token of each row, not yet in the cache
    positions: Int[Array, "batch 1"]  # where it stands in its row
    segment_ids: Int[Array, "batch 1"]  # 1
    seen: Bool[Array, "batch vocab"]  # tokens of prompt and output, for the repetition penalty
    drawn: Int[Array, ""]  # tokens drawn so far


class Decoder:
    """The compiled prefill and step of one model under one layout."""

    def __init__(self, spec: ModelSpec, weights: Weights, layout: Layout, num_tokens: int | None = None):
        """`weights` are those of the model in the dtype of compute, placed as the layout computes with them.

        Of a vocabulary with more rows than the tokenizer has tokens, `num_tokens`, the others are never drawn.
        """
        num_tokens = spec.config.vocab_size if num_tokens is None else num_tokens
        self.config, self.layout, self._weights = spec.config, layout, weights
        self._places = spec.adapter.places
        self._dtype = weights["layers"]["attention"]["query"]["kernel"].dtype

        def extend(weights, cache, tokens, positions, segment_ids, lengths=None):
            model = spec.merge(weights)
            hidden, cache = model.extend(cache, tokens, positions, segment_ids, lengths)
            logits = constrain(model.head.logits(hidden[:, -1:])[:, 0], "batch", None)
            return jnp.where(jnp.arange(logits.shape[1]) < num_tokens, logits, -jnp.inf), cache

        def draw(logits, rows: Rows, settings: SamplingArrays, keys: Key[Array, "batch"]) -> Rows:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, rows.drawn)
            tokens = sample(logits, rows.seen, settings, keys)
            seen = rows.seen.at[jnp.arange(len(tokens)), tokens].set(True)
            tokens = pin(tokens[:, None], layout, P())  # small, and every process reads them all
            positions, seen = (constrain(a, "batch", None) for a in (rows.positions + 1, seen))
            return Rows(tokens, positions, rows.segment_ids, seen, rows.drawn + 1)

        self._extend = jax.jit(extend, donate_argnums=1)
        self._draw = jax.jit(draw)
        self._empty = jax.jit(
            lambda batch, slots: empty_cache(self.config, batch, slots, self._dtype), static_argnums=(0, 1)
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[Sampling], max_new_tokens: int, seed: int
    ) -> Iterator[Int[np.ndarray, "batch"]]:
        """Yields the next token of every row, `max_new_tokens` times; close the iterator to end sooner.

        A row's tokens are a function of its prompt, its settings, the seed and its number in the batch. The device
        works on the next token while the caller handles this one.

        Args:
          prompts: one or more tokens each.
          settings: one a prompt.
        """
        with use_layout(self.layout):
            batch = round_up(len(prompts), self.layout.size("batch"))
            logits, cache, rows = self._prefill(prompts, batch, max_new_tokens)
            arrays = stack([*settings, *[Sampling(temperature=0)] * (batch - len(prompts))])
            arrays = SamplingArrays(*(self._put(value, "batch") for value in arrays))
            keys = row_keys(seed, batch)
            rows = self._draw(logits, rows, arrays, keys)
        for _ in range(max_new_tokens - 1):
            tokens = rows.tokens
            with use_layout(self.layout):
                logits, cache = self._extend(self._weights, cache, rows.tokens, rows.positions, rows.segment_ids)
                rows = self._draw(logits, rows, arrays, keys)
            yield np.asarray(tokens)[: len(prompts), 0]
        yield np.asarray(rows.tokens)[: len(prompts), 0]

    def _prefill(
        self, prompts: Sequence[Sequence[int]], batch: int, max_new_tokens: int
    ) -> tuple[Float[Array, "batch vocab"], KVCache, Rows]:
        longest = max(map(len, prompts)) + self._places
        chunk = min(CHUNK, max(SMALLEST_CHUNK, power_of_two(longest)))
        width = round_up(longest, chunk)
        tokens, positions, segment_ids = pad_left(prompts, batch, width, self._places)
        cache = self._empty(batch, bucket(width + max_new_tokens, SMALLEST_CACHE))
        lengths = self._put(positions[:, -1] + 1, "batch")
        for start in range(0, width, chunk):
            part = [self._put(a[:, start : start + chunk], "batch", None) for a in (tokens, positions, segment_ids)]
            logits, cache = self._extend(self._weights, cache, *part, lengths)
        seen = np.zeros((batch, self.config.vocab_size), bool)
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
        last = [self._put(tokens[:, -1:]), self._put(positions[:, -1:], "batch", None)]
        last += [self._put(np.ones((batch, 1), np.int32), "batch", None), self._put(seen, "batch", None)]
        return logits, cache, Rows(*last, self._put(np.int32(0)))

    def _put(self, value: np.ndarray, *axes: str | None) -> Array:
        return jax.device_put(value, self.layout.sharding(*axes))


def pad_left(
    prompts: Sequence[Sequence[int]], batch: int, width: int, places: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, positions, segment_ids), int32 [batch, width]: prompts end in the last column, padding is segment 0.

    Before each prompt there are `places` for virtual tokens (jaxllm/model/prompts.py).
    """
    tokens, positions, segment_ids = (np.zeros((batch, width), np.int32) for _ in range(3))
    for row, prompt in enumerate(prompts):
        length = places + len(prompt)
        tokens[row, width - len(prompt) :] = prompt
        positions[row, width - length :] = np.arange(length)
        segment_ids[row, width - length :] = 1
    return tokens, positions, segment_ids


def round_up(size: int, factor: int) -> int:
    """The smallest multiple of `factor` that is at least `size`."""
    return -(-size // factor) * factor


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def bucket(size: int, least: int) -> int:
    """What `size` is rounded up to: a power of two from `least` to 1024, then a multiple of 1024."""
    return max(least, power_of_two(size)) if size <= 1024 else round_up(size, 1024)
