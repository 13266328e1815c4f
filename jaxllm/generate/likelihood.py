"""How probable a model finds a text after another: log-likelihoods of many pairs of context and continuation.

Rows are padded on the left, so that the targets of all are predicted from the last columns, and only those columns meet
the head: a few positions at a time, so that `[batch, length, vocab]` is never made. Lengths are rounded up to a few
buckets, each one compiled program. What leaves the devices is one number and one bit a target.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxllm.errors import UserError
from jaxllm.generate.decode import bucket, pad_left, round_up
from jaxllm.generate.run import Run, refuse_bidirectional
from jaxllm.layout.layout import Layout, constrain, pin, use_layout
from jaxllm.layout.vocabulary import LOGITS_BYTES
from jaxllm.model.head import Head

SHORTEST = 16  # tokens a row: shorter ones share one program
FEW_TARGETS = 64  # rows with at most so many targets share one program a length; others are scored in every column


class Pair(NamedTuple):
    """Tokens to predict, and those they follow. There is one or more of each."""

    context: list[int]
    targets: list[int]


class Likelihood(NamedTuple):
    """How probable the targets are after the context."""

    nats: float  # log-probability, the sum over the targets: 0 or below
    is_greedy: bool  # every target is the most probable token where it stands


class Scorer:
    """Log-likelihoods under a trained model: `Scorer(open_run(workdir)).likelihoods(pairs)`."""

    def __init__(self, run: Run, batch_size: int = 16, *, special: bool = False):
        """`batch_size` rows at once, over all devices; rounded up to what the mesh divides.

        With `special`, contexts are a chat template's: names of special tokens in them are those tokens, bos too.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be 1 or more.")
        refuse_bidirectional(run, "gives texts no probability")
        self.tokenizer, self.max_length = run.tokenizer, run.spec.context
        self.special, self._run, self._batch_size = special, run, batch_size
        num_tokens = run.tokenizer.vocab_size

        def score(weights, tokens, positions, segment_ids, targets):
            model = run.spec.merge(weights)
            hidden = model(tokens, positions, segment_ids)[:, -targets.shape[1] :]
            at_once = positions_at_once(run.layout, *targets.shape, run.spec.config.vocab_size)
            results = target_log_probabilities(model.head, hidden, targets, num_tokens, at_once)
            return tuple(pin(result, run.layout, P()) for result in results)  # small, and every process reads them all

        self._score = jax.jit(score)

    def pair(self, context: str, continuation: str) -> Pair:
        """The tokens of two texts, cut where lm-evaluation-harness cuts them.

        The continuation is what follows in both texts, encoded as one, after as many tokens as the context has alone;
        spaces at the context's end are taken for the continuation's. Where tokens span the border, nothing may follow
        (there the harness fails): then the last token of both is predicted from those before it. bos comes first, as
        in training; where there is neither bos nor context, eos does.

        Raises:
          UserError: an empty continuation, one longer than the model's context, or nothing to begin with.
        """
        text, kept = context + continuation, context.rstrip()
        ids = self.tokenizer.encode(text, special=self.special) if continuation else []
        if not ids:
            raise UserError("an empty continuation has no probability.")
        begin = [] if kept and (self.special or self.tokenizer.bos_id is None) else [self._first()]
        alone = self.tokenizer.encode(kept, special=self.special)
        before, targets = (alone, ids[len(alone) :]) if len(alone) < len(ids) else (ids[:-1], ids[-1:])
        if len(targets) > self.max_length:
            raise UserError(
                f"the continuation has {len(targets)} tokens, more than the model's context of {self.max_length}."
            )
        return Pair([*begin, *before] or [self._first()], targets)

    def rolling(self, text: str) -> list[Pair]:
        """Pairs that predict every token of `text` once: bos (or eos) and the first window, then windows as full.

        As lm-evaluation-harness's `get_rolling_token_windows` with a context of one token: the targets of a window
        begin with the first token not yet predicted, the last window reaches back to be as long as the others.
        """
        tokens = [self._first(), *self.tokenizer.encode(text)]
        pairs, done = [], 1
        while done < len(tokens):
            end = min(done + self.max_length, len(tokens))
            pairs.append(Pair(tokens[max(end - self.max_length - 1, 0) : done], tokens[done:end]))
            done = end
        return pairs

    def likelihoods(self, pairs: Sequence[Pair], on_done: Callable[[int], None] | None = None) -> list[Likelihood]:
        """The log-likelihood of every pair. Of a pair longer than the model's context the end is taken.

        Args:
          on_done: called with the number of pairs done since it was called last.

        Raises:
          UserError: more targets than the model's context.
        """
        results: list[Likelihood | None] = [None] * len(pairs)
        for length, columns, numbers in self._batches(pairs):
            log_p, greedy = self._run_batch([pairs[number] for number in numbers], length, columns)
            for row, number in enumerate(numbers):
                count = len(pairs[number].targets)
                nats = float(log_p[row, -count:].sum(dtype=np.float64))
                results[number] = Likelihood(nats, bool(greedy[row, -count:].all()))
            if on_done:
                on_done(len(numbers))
        return results

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, int, list[int]]]:
        """(length, columns to predict, numbers of pairs), the longest first, so that memory fails early."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number, pair in enumerate(pairs):
            count = len(pair.targets)
            if not 1 <= count <= self.max_length:
                raise UserError(f"{count} tokens to predict must be from 1 to the model's context, {self.max_length}.")
            places = self._run.spec.adapter.places
            length = bucket(min(len(pair.context) + count - 1, self.max_length) + places, SHORTEST)
            groups.setdefault((length, min(length, FEW_TARGETS) if count <= FEW_TARGETS else length), []).append(number)
        for (length, columns), numbers in sorted(groups.items(), reverse=True):
            for start in range(0, len(numbers), self._batch_size):
                yield length, columns, numbers[start : start + self._batch_size]

    def _run_batch(self, pairs: Sequence[Pair], length: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        """(log-probabilities, whether greedy) of the targets, right-aligned: [rows, columns]."""
        layout = self._run.layout
        batch = round_up(self._batch_size, layout.size("batch"))
        inputs = [[*pair.context, *pair.targets][-self.max_length - 1 : -1] for pair in pairs]
        targets, _, _ = pad_left([pair.targets for pair in pairs], batch, columns)
        with use_layout(layout):
            arrays = (*pad_left(inputs, batch, length, self._run.spec.adapter.places), targets)
            placed = [jax.device_put(array, layout.sharding("batch", None)) for array in arrays]
            return tuple(np.asarray(result) for result in self._score(self._run.weights, *placed))

    def _first(self) -> int:
        """The token that stands before a text."""
        first = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        if first is None:
            raise UserError("this tokenizer has neither bos nor eos: nothing comes before the first token of a text.")
        return first


def target_log_probabilities(
    head: Head,
    hidden: Float[Array, "batch targets embed"],
    targets: Int[Array, "batch targets"],
    num_tokens: int,
    at_once: int,
) -> tuple[Float[Array, "batch targets"], Bool[Array, "batch targets"]]:
    """log softmax(logits)[target] in float32, and whether the target is what greedy decoding would write.

    Args:
      num_tokens: ids from here on are rows of the table that no token has: greedy decoding never writes them.
      at_once: columns whose logits exist at a time; divides their number.
    """

    def score(columns):
        hidden, targets = columns
        logits = head.logits(hidden)
        ids = jnp.arange(logits.shape[-1])
        picked = jnp.where(ids == targets[..., None], logits, 0).sum(-1)
        # Of equals the first, like argmax; written so that a split vocabulary is reduced and never gathered.
        top = jnp.where(ids < num_tokens, logits, -jnp.inf).max(-1, keepdims=True)
        first = jnp.where((logits == top) & (ids < num_tokens), ids, logits.shape[-1]).min(-1)
        return picked - jax.nn.logsumexp(logits, axis=-1), first == targets

    batch, count = targets.shape
    split = lambda a: a.reshape(batch, count // at_once, at_once, *a.shape[2:]).swapaxes(0, 1)  # noqa: E731
    results = jax.lax.map(score, (constrain(split(hidden), None, "batch", None, None), split(targets)))
    return tuple(result.swapaxes(0, 1).reshape(batch, count) for result in results)


def positions_at_once(layout: Layout, batch: int, targets: int, vocab_size: int) -> int:
    """The most columns, a power of two that divides `targets`, whose float32 logits fit in LOGITS_BYTES a device."""
    bytes_a_column = 4 * batch * vocab_size / (layout.size("batch") * layout.size("vocab"))
    limit = max(1, int(LOGITS_BYTES // bytes_a_column))
    return min(targets & -targets, 1 << (limit.bit_length() - 1))
