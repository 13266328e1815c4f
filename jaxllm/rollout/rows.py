"""Prompts with their answers as rows of a batch, one to a row."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float, Int

from jaxllm.data.batch import Batch
from jaxllm.data.prompts import Prompt
from jaxllm.generate.continuous import Answer


class Rows(NamedTuple):
    """What was written, on the host."""

    batch: Batch  # loss_mask: true on the tokens of answers
    sampled_log_probs: Float[np.ndarray, "batch length"]  # as they were drawn, in the places of the tokens
    answer_lengths: Int[np.ndarray, " batch"]


def make_rows(prompts: Sequence[Prompt], answers: Sequence[Answer], length: int, pad_id: int) -> Rows:
    """Rows of `length` tokens: a prompt, its answer, padding."""
    shape = (len(prompts), length)
    tokens = np.full(shape, pad_id, np.int32)
    positions, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    loss_mask, sampled = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, end = len(prompt.ids), len(prompt.ids) + len(answer.tokens)
        tokens[row, :start], tokens[row, start:end] = prompt.ids, answer.tokens
        positions[row, :end], segment_ids[row, :end] = np.arange(end), 1
        loss_mask[row, start:end], sampled[row, start:end] = True, answer.log_probs
    lengths = np.array([len(answer.tokens) for answer in answers], np.int32)
    return Rows(Batch(tokens, positions, segment_ids, loss_mask), sampled, lengths)


def on_devices(tree: Batch, sharding: NamedSharding) -> Batch:
    """Arrays that every process has whole, laid out by `sharding`."""
    place = lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])  # noqa: E731
    return jax.tree.map(place, tree)
