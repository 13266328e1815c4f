"""Biases and norms: their gradients, sums over all tokens, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.layout.layout import use_layout
from jaxllm.model.config import ModelConfig
from jaxllm.model.linear import Linear
from jaxllm.model.norms import Norm
from tests.layout.runs import Shape

ROWS, LENGTH, EMBED = 16, 8192, 4  # 131,072 tokens


def inputs(dtype):
    """An activation and a gradient of the same shape, all of one sign so that a sum in few bits stops growing."""
    random = np.random.default_rng(0)
    return tuple((1 + random.random((ROWS, LENGTH, EMBED))).astype(dtype) for _ in range(2))


def gradients(module: nnx.Module, layout, x, dy):
    """Those of the module's float32 parameters."""
    graph, params = nnx.split(module, nnx.Param)

    @jax.jit
    def run(params, x, dy):
        with use_layout(layout):
            return jax.vjp(lambda params: nnx.merge(graph, params)(x), params)[1](dy)[0]

    if layout is not None:
        x, dy = jax.device_put((x, dy), layout.sharding("batch", "length"))
    return nnx.to_pure_dict(run(params, x, dy))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [None, Shape(2, 2, 2, 2)], ids=str)
def test_small_gradients_are_summed_in_float32(dtype, shape):
    layout = shape and shape.layout()
    x, dy = inputs(dtype)
    exact_x, exact_dy = x.astype(np.float64), dy.astype(np.float64)

    linear = Linear("btd,df->btf", ("embed", "mlp"), (EMBED, EMBED), bias_axes=("mlp",), std=0.0, rngs=nnx.Rngs(0))
    bias = gradients(linear, layout, x, dy)["bias"]
    np.testing.assert_allclose(bias, exact_dy.sum((0, 1)), rtol=1e-5)

    norm = gradients(Norm(ModelConfig(embed_dim=EMBED, norm_epsilon=1e-9)), layout, x, dy)
    apart = exact_x - exact_x.mean(-1, keepdims=True)
    normed = apart / np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-9)
    np.testing.assert_allclose(norm["bias"], exact_dy.sum((0, 1)), rtol=1e-5)
    summands = exact_dy * normed  # of both signs
    assert np.all(np.abs(norm["scale"] - summands.sum((0, 1))) <= 1e-5 * np.abs(summands).sum((0, 1)))
