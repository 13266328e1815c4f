"""Continuous batching: many prompts through a few rows, each answered by sampling from the exact distribution.

`slots` rows write at once, some tokens in one compiled call. Then the host reads what has ended and gives the rows that
are free to prompts that wait, so that one long answer holds nobody up. Where none waits any more and most rows have
ended, the others move together into fewer rows.

A token depends on its row alone: on the prompt, on how many prompts came before it, on the seed and on how many tokens
were drawn in that row. So how rows are scheduled changes nothing but rounding.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from jaxllm.generate.decode import CHUNK, SMALLEST_CHUNK, Weights, power_of_two, round_up
from jaxllm.layout.layout import Layout, constrain, pin, use_layout
from jaxllm.layout.mesh import one_at_a_time
from jaxllm.model.row_cache import AXES, RowCache, RowLayerCache, empty_row_cache
from jaxllm.model.spec import ModelSpec

STEPS = 32  # tokens a row that are drawn in one call, at most
SLOTS_STEP = 128  # a cache grows by so many slots, or by a quarter of the power of two above
BLOCK = 256  # tokens of the vocabulary that are told apart last when one is drawn


class Answer(NamedTuple):
    """What was written after one prompt."""

    tokens: list[int]  # what ends it included
    log_probs: list[float]  # of each under the distribution that it was drawn from, nats
    finish_reason: str  # "stop": a token that ends an answer | "length": it may have no more


class _Drawn(NamedTuple):
    """What one call draws."""

    tokens: Int[Array, "steps batch"]
    log_probs: Float[Array, "steps batch"]
    counts: Int[Array, " batch"]  # of each row


class _Loop(NamedTuple):
    """What a call takes from token to token."""

    cache: RowCache
    tokens: Int[Array, " batch"]  # the newest of each row, not in the cache
    is_done: Bool[Array, " batch"]
    drawn: _Drawn
    step: Int[Array, ""]


class _Row:
    """A row at work: the prompt it answers, and how far it is."""

    def __init__(self, number: int, prompt: Sequence[int], budget: int):
        self.number, self.prompt, self.budget = number, list(prompt), budget
        self.tokens: list[int] = []
        self.log_probs: list[float] = []

    @property
    def newest(self) -> int:
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    @property
    def position(self) -> int:
        """Of the newest token."""
        return len(self.prompt) + len(self.tokens) - 1


class ContinuousDecoder:
    """The compiled programs of one model under one layout.

    Args:
      num_tokens: of the vocabulary's rows that are tokens; the others are never drawn.
      slots: rows at work at once; rounded up to what the mesh divides.
      length: the most tokens of a prompt with its answer; virtual ones of an adapter come on top.
      temperature: of the distribution; 0 takes the most probable token.
      end_ids: tokens that end an answer.
      static: rows are given to new prompts only when all have ended: what continuous batching is held against.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        *,
        num_tokens: int,
        slots: int,
        length: int,
        temperature: float,
        end_ids: Collection[int],
        static: bool = False,
    ):
        self._spec, self._layout, self._num_tokens, self._static = spec, layout, num_tokens, static
        self._shards = layout.size("batch")
        self._slots, self._length = round_up(slots, self._shards), length
        self._virtual = spec.adapter.places  # tokens before every prompt
        self._temperature, self._end_ids = temperature, tuple(end_ids)
        self._draw = one_at_a_time(jax.jit(self._draw_some, donate_argnums=1))
        self._prefill = one_at_a_time(jax.jit(self._read, donate_argnums=1))
        self._empty = one_at_a_time(jax.jit(self._empty_cache, static_argnums=(0, 1, 2)))
        self._grow = one_at_a_time(jax.jit(self._grown, static_argnums=1))
        self._insert = one_at_a_time(jax.jit(_inserted, donate_argnums=0))
        self._take = one_at_a_time(jax.jit(_taken))

    def generate(
        self,
        weights: Weights,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        seed: int,
        on_tokens: Callable[[], None] = lambda: None,
    ) -> list[Answer]:
        """An answer to each prompt.

        Args:
          weights: in the dtype of compute, placed as the layout computes with them.
          prompts: one or more tokens each.
          max_new_tokens: of all, or of each; where prompt and answer have `length` tokens it ends before. An answer
            without room is empty.
          on_tokens: called each time that all rows have got some tokens more.
        """
        most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        budgets = [min(b, self._length - len(p)) for b, p in zip(most, prompts, strict=True)]
        texts = [[0] * self._virtual + list(prompt) for prompt in prompts]
        waiting = [_Row(i, t, b) for i, (t, b) in enumerate(zip(texts, budgets, strict=True)) if b > 0][::-1]
        answers = [Answer([], [], "length")] * len(prompts)
        with use_layout(self._layout):
            work = _Work(self, weights, min(self._slots, round_up(len(prompts), self._shards)), seed)
            while waiting or work.rows:
                if not (self._static and work.rows):
                    work.take_in(waiting)
                for row, reason in work.write():
                    answers[row.number] = Answer(row.tokens, row.log_probs, reason)
                on_tokens()
                if not waiting:
                    work.close_ranks()
        return answers

    # --- compiled ---

    def _empty_cache(self, batch: int, slots: int, dtype: str) -> RowCache:
        return empty_row_cache(self._spec.config, batch, slots, jnp.dtype(dtype))

    def _read(
        self,
        weights: Weights,
        cache: RowCache,
        tokens: Int[Array, "batch length"],
        first: Int[Array, ""],
        lengths: Int[Array, " batch"],
    ) -> RowCache:
        """The cache with a part of each prompt, from position `first` on."""
        model = self._spec.merge(weights)
        positions = jnp.broadcast_to(first + jnp.arange(tokens.shape[1]), tokens.shape)
        return model.extend_rows(cache, model.layer_weights(), tokens, positions, lengths)[1]

    def _draw_some(
        self,
        weights: Weights,
        cache: RowCache,
        tokens: Int[Array, " batch"],
        positions: Int[Array, " batch"],
        budgets: Int[Array, " batch"],
        numbers: Int[Array, " batch"],
        before: Int[Array, " batch"],
        seed: Int[Array, ""],
    ) -> tuple[RowCache, _Drawn]:
        """Up to STEPS tokens of each row, as long as any row goes on.

        Args:
          tokens, positions: the newest of each row.
          budgets: of tokens yet to draw; 0 of a row that is free.
          numbers: of the prompts that the rows answer.
          before: how many tokens were drawn in them.
        """
        model = self._spec.merge(weights)
        layers, batch = model.layer_weights(), tokens.shape[0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
        ends = jnp.array(self._end_ids or [-1], jnp.int32)

        def one(loop: _Loop) -> _Loop:
            at = (positions + loop.drawn.counts)[:, None]
            hidden, cache = model.extend_rows(loop.cache, layers, loop.tokens[:, None], at, at[:, 0] + 1)
            logits = constrain(model.head.logits(hidden)[:, 0], "batch", None)
            row_keys = jax.vmap(jax.random.fold_in)(keys, before + loop.drawn.counts)
            new, log_probs = draw(logits, row_keys, self._temperature, self._num_tokens)
            counts = loop.drawn.counts + ~loop.is_done
            drawn = _Drawn(
                loop.drawn.tokens.at[loop.step].set(new), loop.drawn.log_probs.at[loop.step].set(log_probs), counts
            )
            is_done = loop.is_done | (new[:, None] == ends).any(1) | (counts >= budgets)
            return _Loop(cache, jnp.where(loop.is_done, loop.tokens, new), is_done, drawn, loop.step + 1)

        nothing = _Drawn(jnp.zeros((STEPS, batch), jnp.int32), jnp.zeros((STEPS, batch)), jnp.zeros(batch, jnp.int32))
        start = _Loop(cache, tokens, budgets <= 0, nothing, jnp.int32(0))
        end = jax.lax.while_loop(lambda loop: (loop.step < STEPS) & ~loop.is_done.all(), one, start)
        whole = jax.tree.map(lambda a: pin(a, self._layout, P()), end.drawn)  # small, and every process reads it
        return end.cache, whole

    def _grown(self, cache: RowCache, slots: int) -> RowCache:
        more = slots - cache[0].keys.shape[2]
        wider = lambda a: constrain(jnp.pad(a, ((0, 0), (0, 0), (0, more), (0, 0))), *AXES)  # noqa: E731
        return jax.tree.map(wider, cache)


class _Work:
    """The rows of one call of `generate` and their cache."""

    def __init__(self, decoder: ContinuousDecoder, weights: Weights, slots: int, seed: int):
        self._decoder, self._weights, self._seed = decoder, weights, np.uint32(seed)
        self.rows: dict[int, _Row] = {}  # by their place
        self._places, self._dtype = slots, weights["layers"]["attention_norm"]["scale"].dtype.name
        self._cache = decoder._empty(slots, SLOTS_STEP, self._dtype)

    def take_in(self, waiting: list[_Row]) -> None:
        """Gives free places to prompts, the last of `waiting` first."""
        free = [place for place in range(self._places) if place not in self.rows]
        new = {place: waiting.pop() for place in free[: len(waiting)]}
        self.rows |= new
        self._read_prompts({place: row for place, row in new.items() if len(row.prompt) > 1})

    def _read_prompts(self, new: dict[int, _Row]) -> None:
        """Reads all of new prompts but the last token, which the first step reads."""
        if not new:
            return
        decoder = self._decoder
        longest = max(len(row.prompt) - 1 for row in new.values())
        chunk = min(CHUNK, max(SMALLEST_CHUNK, power_of_two(longest)))
        width, batch = round_up(longest, chunk), round_up(power_of_two(len(new)), decoder._shards)
        self._make_room(width)
        tokens = np.zeros((batch, width), np.int32)
        for number, row in enumerate(new.values()):
            tokens[number, : len(row.prompt) - 1] = row.prompt[:-1]
        lengths = np.array([len(row.prompt) for row in new.values()] + [1] * (batch - len(new)), np.int32)
        part = decoder._empty(batch, width, self._dtype)
        for start in range(0, width, chunk):
            pieces = self._put(tokens[:, start : start + chunk]), np.int32(start), self._put(lengths)
            part = decoder._prefill(self._weights, part, *pieces)
        # Rows that no prompt fills are written where nothing is: beyond the last place.
        places = np.array([*new, *[self._places] * (batch - len(new))], np.int32)
        self._cache = decoder._insert(self._cache, part, places)

    def _make_room(self, slots: int) -> None:
        """Grows the cache, a long one by more, since each size is a program to compile."""
        most = round_up(self._decoder._length + self._decoder._virtual, SLOTS_STEP)
        step = max(SLOTS_STEP, power_of_two(slots) // 4)
        slots = max(round_up(slots, SLOTS_STEP), min(round_up(slots, step), most))
        if slots > self._cache[0].keys.shape[2]:
            self._cache = self._decoder._grow(self._cache, slots)

    def write(self) -> list[tuple[_Row, str]]:
        """Draws tokens; returns the rows that have ended, and why. Their places are free then."""
        if not self.rows:
            return []
        self._make_room(max(row.position + min(STEPS, row.budget) for row in self.rows.values()) + 1)
        columns = np.zeros((5, self._places), np.int32)
        columns[1] = self._decoder._virtual  # of free rows too: so virtual tokens are not made at each step
        for place, row in self.rows.items():
            left = row.budget - len(row.tokens)
            columns[:, place] = row.newest, row.position, left, row.number, len(row.tokens)
        placed = (self._put(column) for column in columns)
        self._cache, drawn = self._decoder._draw(self._weights, self._cache, *placed, self._seed)
        drawn = jax.tree.map(np.asarray, drawn)
        ended = []
        for place, row in list(self.rows.items()):
            count = int(drawn.counts[place])
            row.tokens += drawn.tokens[:count, place].tolist()
            row.log_probs += drawn.log_probs[:count, place].tolist()
            stops = row.tokens[-1] in self._decoder._end_ids
            if stops or len(row.tokens) >= row.budget:
                ended.append((self.rows.pop(place), "stop" if stops else "length"))
        return ended

    def close_ranks(self) -> None:
        """Moves the rows at work into fewer places where half of them or less are at work."""
        wanted = round_up(power_of_two(max(len(self.rows), 1)), self._decoder._shards)
        if not self.rows or wanted > self._places // 2:
            return
        at_work = list(self.rows)
        places = np.array([*at_work, *[0] * (wanted - len(at_work))], np.int32)
        self._cache = self._decoder._take(self._cache, places)
        self.rows = dict(enumerate(self.rows.values()))
        self._places = wanted

    def _put(self, value: np.ndarray) -> Array:
        axes = ("batch", None)[: value.ndim]
        return jax.device_put(value, self._decoder._layout.sharding(*axes))


def _inserted(cache: RowCache, part: RowCache, places: Int[Array, " new"]) -> RowCache:
    """The cache with new rows at these places."""

    def insert(all_rows: Array, new: Array) -> Array:
        return constrain(all_rows.at[places, :, : new.shape[2]].set(new, mode="drop"), *AXES)

    return tuple(RowLayerCache(*map(insert, old, new)) for old, new in zip(cache, part, strict=True))


def _taken(cache: RowCache, places: Int[Array, " rows"]) -> RowCache:
    """Some rows of the cache."""
    return jax.tree.map(lambda a: constrain(a[places], *AXES), cache)


@functools.partial(jax.named_call, name="draw")
def draw(
    logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], temperature: float, num_tokens: int
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """A token a row from softmax(logits / temperature) over the first `num_tokens`, and its log-probability.

    One uniform number a row is looked up in the distribution's sum, by blocks of the vocabulary and then within one. Of
    temperature 0 it is the most probable token, with its log-probability at temperature 1.
    """
    logits = jnp.where(jnp.arange(logits.shape[1]) < num_tokens, logits / (temperature or 1.0), -jnp.inf)
    top = logits.max(1, keepdims=True)
    masses = jnp.exp(logits - top)
    log_z = jnp.log(masses.sum(1)) + top[:, 0]
    if temperature == 0:
        tokens = jnp.argmax(logits, axis=1).astype(jnp.int32)
    else:
        tokens = _looked_up(masses, jax.vmap(jax.random.uniform)(keys))
    return tokens, jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - log_z


def _looked_up(masses: Float[Array, "batch vocab"], uniform: Float[Array, " batch"]) -> Int[Array, " batch"]:
    """The index at which the running sum of masses passes `uniform` of the whole."""
    batch, vocab = masses.shape
    blocks = jnp.pad(masses, ((0, 0), (0, -vocab % BLOCK))).reshape(batch, -1, BLOCK)
    by_block = blocks.sum(2)
    sums = jnp.cumsum(by_block, axis=1)
    wanted = uniform * sums[:, -1]
    block = _first_above(sums, wanted, by_block)
    before = jnp.take_along_axis(sums - by_block, block[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = _first_above(jnp.cumsum(inside, axis=1), wanted - before, inside)
    return (block * BLOCK + place).astype(jnp.int32)


def _first_above(
    sums: Float[Array, "batch items"], wanted: Float[Array, " batch"], masses: Float[Array, "batch items"]
) -> Int[Array, " batch"]:
    """The first item whose running sum is above what is wanted; where rounding leaves none, the last with any mass."""
    items = jnp.arange(sums.shape[1])
    last = jnp.where(masses > 0, items, 0).max(1)
    first = jnp.where((sums > wanted[:, None]) & (masses > 0), items, sums.shape[1]).min(1)
    return jnp.minimum(first, last)
