"""4-bit NormalFloat against a float64 transcription of the paper, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from jaxllm.layout.nf4 import BLOCK, LEVELS, block_size, dequantize, packed_shapes, quantize
from jaxllm.layout.weights import weight_einsums

AXES = ("embed", "mlp")


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_levels_are_those_of_the_paper():
    """Dettmers et al. 2023, section 3: quantiles of a standard normal, eight of them above zero and seven below."""
    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    exact = np.sort(np.concatenate([above, [0.0], below]))
    np.testing.assert_allclose(LEVELS, exact / exact.max(), atol=2e-7)


@pytest.mark.parametrize(("shape", "axis"), [((128, 6), 0), ((3, 4, 192), 2), ((2, 64, 2, 3), 1), ((5, 48), 1)])
def test_each_weight_becomes_the_nearest_level(shape, axis):
    w = normal(shape)
    made = np.asarray(dequantize(quantize(jnp.asarray(w), axis), jnp.float32))
    size = block_size(shape[axis])
    moved = np.moveaxis(w, axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], -1, size)
    scales = np.asarray(jnp.asarray(np.abs(blocks).max(-1, keepdims=True)).astype(jnp.bfloat16), np.float32)
    choices = LEVELS * scales[..., None]
    nearest = np.abs(blocks[..., None] - choices).min(-1)
    found = np.moveaxis(made, axis, -1).reshape(blocks.shape)
    np.testing.assert_allclose(np.abs(blocks - found), nearest, atol=1e-6)
    assert made.dtype == np.float32 and made.shape == shape


def test_bytes_a_weight():
    codes, scales = packed_shapes((4096, 11008), 0)
    held = sum(part.size * part.dtype.itemsize for part in (codes, scales))
    assert held / (4096 * 11008) == 0.5 + 2 / BLOCK == 0.53125


def test_a_block_of_zeros():
    assert not np.any(dequantize(quantize(jnp.zeros((64, 2)), 0), jnp.float32))


@pytest.mark.parametrize("together", [False, True])
def test_a_product_and_the_gradient_of_what_is_multiplied(together):
    """As with the same matrices whole; the packed ones have no gradient."""
    packed = [quantize(jnp.asarray(normal((64, 32), seed)), 0) for seed in (range(2) if together else range(1))]
    x, n = jnp.asarray(normal((2, 3, 64))), len(packed)

    def total(x, weights):
        ys = weight_einsums(["btd,df->btf"] * n, x, weights, [AXES] * n, [""] * n)
        return sum(jnp.sum(jnp.sin(y)) for y in ys)

    whole = [dequantize(w, jnp.float32) for w in packed]
    (value, dx), (expected, expected_dx) = (jax.value_and_grad(total)(x, w) for w in (packed, whole))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-5, atol=1e-6)
