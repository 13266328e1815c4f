"""A stack of layers run in a loop or unrolled, and what the backward pass recomputes: one answer, less memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layers import run_layers
from jaxllm.layout.layout import make_layout, use_layout
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import model_spec

# Activations outweigh parameters: 8 x 32 tokens of width 16.
MODEL = ModelConfig(num_layers=6, embed_dim=16, num_heads=2, mlp_dim=64, max_length=32, positions="rope").resolved(24)
REMAT = ("none", "selective", "full")
TOKENS = np.random.default_rng(0).integers(0, 24, (8, 32)).astype(np.int32)


@functools.cache
def params():
    return jax.jit(model_spec(MODEL).init, static_argnums=0)(0)


@functools.cache
def lowered(remat: str, scan_layers: bool):
    """The loss and its gradients, lowered for one device."""
    config = LayoutConfig(remat=remat, scan_layers=scan_layers)
    layout = make_layout(MeshConfig(data=1), config, devices=jax.devices()[:1])
    spec = model_spec(MODEL)

    def loss(weights):
        with use_layout(layout):
            model = spec.merge(weights)
            return model.head.next_token_loss(model(TOKENS), TOKENS, np.ones(TOKENS.shape, bool)).total

    return jax.jit(jax.value_and_grad(loss)).lower(params())


@functools.cache
def compiled(remat: str, scan_layers: bool):
    return lowered(remat, scan_layers).compile()


@pytest.mark.parametrize(("remat", "scan_layers"), list(itertools.product(REMAT, (True, False))))
def test_the_same_loss_and_gradients(remat, scan_layers):
    expected, expected_gradients = jax.device_get(compiled("none", True)(params()))
    loss, gradients = jax.device_get(compiled(remat, scan_layers)(params()))
    assert loss == pytest.approx(expected, rel=1e-6)
    for actual, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_memory_falls_with_what_is_recomputed():
    none, selective, full = (compiled(remat, True).memory_analysis().temp_size_in_bytes for remat in REMAT)
    assert none > 1.2 * selective and selective > 1.2 * full, (none, selective, full)


def test_unrolled_layers_are_recomputed_apart():
    """XLA's CPU backend takes no notice of the barriers, so this looks at what it is given.

    `full` multiplies again, `selective` only does what comes between the matmuls again.
    """
    matmuls, norms, barriers = (
        [lowered(remat, False).as_text().count(f"stablehlo.{name}") for remat in REMAT]
        for name in ("dot_general", "rsqrt", "optimization_barrier")
    )
    assert matmuls[0] == matmuls[1] < matmuls[2]
    assert norms[0] < norms[1] == norms[2]
    assert min(barriers[1:]) >= barriers[0] + MODEL.num_layers


def test_outputs_are_stacked():
    """With a layer's inputs picked in turn, whether in a loop or not."""

    def layer(x, number, inputs):
        return x * inputs["factor"], x + inputs["add"] * (number + 1)

    per_layer = {"factor": jnp.array([2.0, 3.0, 5.0]), "add": jnp.array([10.0, 10.0, 10.0])}
    for scan_layers in (True, False):
        layout = make_layout(MeshConfig(data=1), LayoutConfig(scan_layers=scan_layers), devices=jax.devices()[:1])
        with use_layout(layout):
            x, outputs = run_layers(layer, jnp.float32(1), per_layer, 3)
        assert x == 30
        np.testing.assert_array_equal(outputs, [11, 22, 36])
