"""Filling masks: what a model trained by masked language modelling takes hidden tokens for."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jaxllm.data.batch import Vocabulary
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import UserError
from jaxllm.generate.decode import SMALLEST_CHUNK, power_of_two, round_up
from jaxllm.generate.run import Run
from jaxllm.layout.layout import pin, use_layout


class Filled(NamedTuple):
    """A prompt and what it became."""

    prompt: str
    text: str  # the whole of it, each mask filled with the most probable token
    tokens: list[int]  # those tokens, from left to right


def fill(run: Run, prompts: Sequence[str]) -> list[Filled]:
    """Fills every mask of every prompt, each without knowing what the others are filled with.

    A mask is written by the name of the tokenizer's mask token, <mask> or [MASK] for example; spaces in front of it
    belong to the token that is hidden.

    Raises:
      UserError: a model that sees one side of a token alone, a prompt without a mask, or one longer than the context.
    """
    if run.spec.config.causal:
        raise UserError("config.model.causal=True: this model does not see what follows a mask. Let it continue texts.")
    rows = [_encode(prompt, run.tokenizer) for prompt in prompts]
    longest, context = max(map(len, rows)), run.spec.config.max_length
    if longest > context:
        raise UserError(f"a prompt has {longest} tokens, but the model's context is {context}. Shorten it.")
    batch = round_up(len(rows), run.layout.size("batch"))
    tokens, segment_ids = np.zeros((2, batch, min(max(power_of_two(longest), SMALLEST_CHUNK), context)), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], segment_ids[number, : len(row)] = row, 1
    best = np.asarray(_most_probable(run, tokens, segment_ids))
    return [
        _filled(prompt, row, best[i], run.tokenizer) for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]


def _encode(prompt: str, tokenizer: Tokenizer) -> list[int]:
    names = [name for name, token in tokenizer.specials.items() if token == tokenizer.mask_id]
    if not names or names[0] not in prompt:
        mask = names[0] if names else "a mask token, which its tokenizer lacks,"
        raise UserError(f"this model fills masks and does not continue texts. Write {mask} where a token is missing.")
    *before, last = prompt.split(names[0])
    ids = tokenizer.encode_batch([*(part.rstrip(" ") for part in before), last])
    row = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for part in ids[:-1]:
        row += [*part, tokenizer.mask_id]
    return [*row, *ids[-1], *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]


def _most_probable(run: Run, tokens: np.ndarray, segment_ids: np.ndarray) -> Int[Array, "batch length"]:
    """The most probable token that stands for text, at every place."""
    vocabulary = Vocabulary.of(run.tokenizer)
    is_text = np.arange(run.spec.config.vocab_size) < vocabulary.size
    is_text[list(vocabulary.special_ids)] = False

    @jax.jit
    def predict(weights, tokens, segment_ids):
        with use_layout(run.layout):
            model = run.spec.merge(weights)
            logits = model.head.logits(model(tokens, segment_ids=segment_ids))
            best = jnp.where(is_text, logits, -jnp.inf).argmax(-1)
            return pin(best, run.layout, P())  # small, and every process reads them all

    placed = (jax.device_put(leaf, run.layout.sharding("batch", None)) for leaf in (tokens, segment_ids))
    return predict(run.weights, *placed)


def _filled(prompt: str, row: list[int], best: np.ndarray, tokenizer: Tokenizer) -> Filled:
    places = [place for place, token in enumerate(row) if token == tokenizer.mask_id]
    found = [int(best[place]) for place in places]
    whole = dict(enumerate(row)) | dict(zip(places, found, strict=True))
    return Filled(prompt, tokenizer.decode(whole.values()), found)
