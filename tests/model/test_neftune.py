"""Noise on embeddings: its size and distribution, what it is a function of, and where there is none."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.model.config import ModelConfig
from jaxllm.model.dropout import dropout_key, example_lengths, neftune
from jaxllm.model.spec import model_spec

ROWS, LENGTH, WIDTH, ALPHA = 8, 64, 48, 5.0


def noise(lengths, step=0, seed=0, rows=None, places=None):
    rows = jnp.arange(ROWS) if rows is None else rows
    zeros = jnp.zeros((len(rows), LENGTH, WIDTH))
    key = dropout_key(seed, jnp.int32(step), rows)
    return np.asarray(neftune(zeros, ALPHA, key, jnp.asarray(lengths)[: len(rows)], places))


def test_it_is_uniform_of_the_size_of_the_paper():
    """alpha / sqrt(L d), with the L of each token's own example."""
    lengths = np.where(np.arange(LENGTH) < 16, 16, 48) * np.ones((ROWS, 1), int)
    made = noise(lengths)
    for part, size in ((made[:, :16], 16), (made[:, 16:], 48)):
        unit = part * np.sqrt(size * WIDTH) / ALPHA
        assert -1 <= unit.min() < -0.99 and 0.99 < unit.max() <= 1
        assert abs(unit.mean()) < 4 / np.sqrt(3 * unit.size)
        counts = np.histogram(unit, 10, (-1, 1))[0]
        assert np.abs(counts / unit.size - 0.1).max() < 5 * np.sqrt(0.09 / unit.size)


def test_it_is_a_function_of_seed_step_row_and_place():
    lengths = np.full((ROWS, LENGTH), LENGTH)
    made = noise(lengths)
    assert (made == noise(lengths)).all()
    assert not np.isclose(made, noise(lengths, step=1)).mean() > 0.01
    assert not np.isclose(made, noise(lengths, seed=1)).mean() > 0.01
    flat = made.reshape(ROWS, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(ROWS)).max() < 5 / np.sqrt(flat.shape[1])
    order = np.random.default_rng(0).permutation(LENGTH)
    np.testing.assert_array_equal(noise(lengths, places=order), made[:, order])
    np.testing.assert_array_equal(noise(lengths, rows=jnp.array([5])), made[5:6])


def test_lengths_of_examples():
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7, 8]])
    positions = np.array([[0, 1, 2, 0, 1, 0, 0, 0], range(8), [0] * 8])
    lengths = np.asarray(example_lengths(jnp.asarray(positions), jnp.asarray(segments)))
    want = np.array([[(row == one).sum() for one in row] for row in segments])
    np.testing.assert_array_equal(lengths[segments > 0], want[segments > 0])


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_a_model_has_it_in_training_alone(alpha):
    config = ModelConfig(num_layers=1, embed_dim=16, num_heads=2, vocab_size=20, max_length=8).resolved()
    spec = model_spec(dataclasses.replace(config, neftune_alpha=alpha))
    model = spec.merge(spec.init(0))
    tokens = jnp.arange(16).reshape(2, 8)
    key = dropout_key(0, jnp.int32(0), jnp.arange(2))
    without, with_key = model(tokens), model(tokens, dropout=key)
    np.testing.assert_array_equal(model(tokens), without)
    assert (np.asarray(without) != np.asarray(with_key)).any() == (alpha > 0)
    # The size of it, before the layers: a row of 8 tokens, 16 wide.
    lengths = jnp.full((2, 8), 8)
    noisy, plain = (
        model._embed(tokens, 0 * tokens, stream, noisy=lengths if stream else None) for stream in (key, None)
    )
    added = np.asarray(noisy[0] - plain[0])
    assert np.abs(added).max() <= alpha / np.sqrt(8 * 16) + 1e-6
    assert np.abs(added).max() >= 0.95 * alpha / np.sqrt(8 * 16)
