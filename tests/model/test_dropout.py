"""Dropout is a function of coordinates: its rate, its independence, and what it does not depend on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.model.dropout import DropoutKey, dropout, dropout_key, keep_mask

ROWS, LENGTH, WIDTH = 8, 32, 64
RATE = 0.25


def keys(seed=0, step=0, rows=ROWS) -> DropoutKey:
    return dropout_key(seed, jnp.int32(step), jnp.arange(rows))


def mask(key: DropoutKey, rate=RATE) -> np.ndarray:
    return np.asarray(keep_mask(key, (np.arange(LENGTH), np.arange(WIDTH)), rate))


def assert_independent(masks: list[np.ndarray]) -> None:
    """No two are correlated beyond 5 standard deviations of the correlation of independent ones, 1/sqrt(n)."""
    flat = np.stack([m.ravel() for m in masks]).astype(np.float64)
    correlations = np.corrcoef(flat)
    off_diagonal = correlations[~np.eye(len(masks), dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(flat.shape[1])


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate(rate):
    kept = mask(keys(), rate)
    deviation = np.sqrt(rate * (1 - rate))
    assert abs(kept.mean() - (1 - rate)) < 4 * deviation / np.sqrt(kept.size)
    # Nor is a row, a position or a unit favoured.
    for axes in ((1, 2), (0, 2), (0, 1)):
        means = kept.mean(axes)
        assert np.abs(means - (1 - rate)).max() < 5 * deviation / np.sqrt(kept.size / means.size)


def test_rows_are_independent():
    assert_independent(list(mask(keys())))


def test_neighbours_are_independent():
    """Along each axis an element says nothing of the next one."""
    kept = mask(keys())
    assert_independent([kept[:-1], kept[1:]])
    assert_independent([kept[:, :-1], kept[:, 1:]])
    assert_independent([kept[..., :-1], kept[..., 1:]])


def test_layers_and_places_are_independent():
    places = itertools.product(("after_attention", "after_mlp", "attention"), range(4))
    assert_independent([mask(keys().fold("layer", layer).fold(place)) for place, layer in places])


def test_steps_and_seeds_are_independent():
    assert_independent([mask(keys(seed, step)) for seed, step in itertools.product((0, 1, 2, 1000), (0, 1, 2, 1000))])


def test_seeds_beyond_32_bits_differ():
    """Of two seeds that agree in their low 32 bits, too."""
    seeds = (1, 1 + 2**32, 1 + 2**33, 2**32, 2**63)
    assert_independent([mask(keys(seed)) for seed in seeds])
    np.testing.assert_array_equal(mask(keys(1 + 2**33)), mask(keys(1 + 2**33)))


def test_a_row_depends_on_its_global_index_only():
    """A microbatch, or a device, that holds some of the rows in any order drops what the whole batch drops."""
    whole = mask(keys())
    for rows in ([5], [1, 3, 5, 7], [7, 0, 2]):
        part = mask(dropout_key(0, jnp.int32(0), jnp.array(rows)))
        np.testing.assert_array_equal(part, whole[rows])


def test_an_offset_takes_the_later_part_of_the_mask():
    part = keep_mask(keys(), (np.arange(10, LENGTH), np.arange(WIDTH)), RATE)
    np.testing.assert_array_equal(part, mask(keys())[:, 10:])


def test_dropout_scales_what_it_keeps():
    x = jnp.ones((ROWS, LENGTH, WIDTH), jnp.bfloat16)
    y = dropout(x, RATE, keys())
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(np.unique(np.asarray(y, np.float32)), [0, np.float32(jnp.bfloat16(1 / (1 - RATE)))])
    np.testing.assert_array_equal(np.asarray(y) > 0, mask(keys()))
    assert dropout(x, RATE, None) is x and dropout(x, 0.0, keys()) is x


def test_tokens_in_another_order_keep_their_masks():
    order = np.random.default_rng(0).permutation(LENGTH)
    y = dropout(jnp.ones((ROWS, LENGTH, WIDTH)), RATE, keys(), order)
    np.testing.assert_array_equal(np.asarray(y) > 0, mask(keys())[:, order])


def test_the_gradient_has_the_same_mask():
    gradient = jax.grad(lambda x: dropout(x, RATE, keys()).sum())(jnp.ones((ROWS, LENGTH, WIDTH)))
    np.testing.assert_allclose(gradient, mask(keys()) / (1 - RATE), rtol=1e-6)
