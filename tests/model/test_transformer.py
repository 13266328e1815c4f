"""The model against a float64 transcription of the papers: activations, logits, loss, gradients; and packing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layout import vocabulary
from jaxllm.model import presets
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import model_spec
from tests.model import reference

SMALL = {"num_layers": 2, "embed_dim": 16, "num_heads": 4, "mlp_dim": 24, "max_length": 12}
MODELS = {
    "gpt2": ModelConfig(**presets.gpt2(**SMALL)).resolved(29),
    "llama": ModelConfig(**presets.llama3_8b(**SMALL, num_kv_heads=2, rope_theta=100.0), z_loss=1e-2).resolved(29),
    "mqa": ModelConfig(
        **SMALL, num_kv_heads=1, head_dim=6, positions="rope", activation="gelu", tied_head=False
    ).resolved(29),
}
DOCUMENTS = [(0, 0, 5), (0, 5, 11), (1, 0, 8), (1, 8, 11)]  # row, start, end; the last slot of each row is padding
models = pytest.mark.parametrize("name", MODELS)


def batch():
    """tokens, positions, segment ids, loss mask: two documents a row, padding, uneven masks."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 29, (2, 12)).astype(np.int32)
    positions, segments = np.zeros((2, 12), np.int32), np.zeros((2, 12), np.int32)
    for number, (row, start, end) in enumerate(DOCUMENTS, start=1):
        positions[row, start:end] = np.arange(end - start)
        segments[row, start:end] = number
    counted = (positions > 0) & (random.random((2, 12)) < 0.8)
    return tokens, positions, segments, counted


@functools.cache
def params(name: str):
    """Numbers large enough that every part matters: nothing stays at 0 or 1."""
    leaves, tree = jax.tree.flatten(jax.jit(model_spec(MODELS[name]).init, static_argnums=0)(0))
    random = np.random.default_rng(1)
    noise = [0.3 * random.standard_normal(leaf.shape) for leaf in leaves]
    return tree.unflatten([np.asarray(leaf + n, np.float32) for leaf, n in zip(leaves, noise, strict=True)])


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@functools.cache
def compiled(name: str):
    """(params, batch) -> ((loss, (weight, activations, logits)), gradients)."""
    spec = model_spec(MODELS[name])

    def run(weights, tokens, positions, segments, counted):
        model = spec.merge(weights)
        activations = model(tokens, positions, segments)
        loss = model.head.next_token_loss(activations, tokens, counted)
        return loss.total, (loss.weight, activations, model.head.logits(activations))

    return jax.jit(jax.value_and_grad(run, has_aux=True))


@functools.cache
def ran(name: str):
    return jax.device_get(compiled(name)(params(name), *batch()))


def assert_close(actual, expected, tolerance=1e-5):
    """Relative to the largest number."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@models
def test_activations_logits_and_loss(name):
    (loss, (weight, activations, logits)), _ = ran(name)
    tokens, positions, segments, counted = batch()
    weights = float64(params(name))
    expected = reference.hidden(weights, MODELS[name], tokens, positions, segments)
    assert_close(activations, expected)
    assert_close(logits, reference.logits(weights, MODELS[name], expected))
    assert loss == pytest.approx(reference.loss(weights, MODELS[name], *batch()), rel=1e-5)
    assert weight == counted[:, 1:].sum()


@models
def test_gradients(name):
    """Along a random direction of each parameter, and of all together, against central differences in float64."""
    _, gradients = ran(name)
    gradients, tree = jax.tree.flatten(float64(gradients))
    whole = np.sqrt(sum(np.vdot(g, g) for g in gradients))
    start = jax.tree.leaves(float64(params(name)))
    random = np.random.default_rng(2)
    along = [random.standard_normal(leaf.shape) for leaf in start]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params(name))]
    each = {path: [d * (i == j) for j, d in enumerate(along)] for i, path in enumerate(paths)}
    for path, direction in {**each, "all": along}.items():

        def loss(step, direction=direction):
            moved = [leaf + step * d for leaf, d in zip(start, direction, strict=True)]
            return reference.loss(tree.unflatten(moved), MODELS[name], *batch())

        step = 1e-5
        expected = (loss(step) - loss(-step)) / (2 * step)
        actual = sum(np.vdot(g, d) for g, d in zip(gradients, direction, strict=True))
        own = np.sqrt(sum(np.vdot(g, g) for g, d in zip(gradients, direction, strict=True) if d.any()))
        # A bias of the keys moves all logits of a query alike, so without rotation its gradient is 0 but for rounding.
        assert actual == pytest.approx(expected, abs=1e-5 * own + 1e-7 * whole), path


@models
def test_a_packed_document_is_as_if_alone(name):
    (_, (_, _, packed)), _ = ran(name)
    tokens, *_ = batch()
    for row, start, end in DOCUMENTS:
        size = end - start
        alone, zeros = np.zeros((2, 12), np.int32), np.zeros((2, 12), np.int32)
        alone[0, :size] = tokens[row, start:end]
        positions, segments = zeros.copy(), zeros.copy()
        positions[0, :size], segments[0, :size] = np.arange(size), 1
        (_, (_, _, logits)), _ = compiled(name)(params(name), alone, positions, segments, zeros.astype(bool))
        assert_close(packed[row, start:end], logits[0, :size], 2e-6)


def test_positions_and_segments_may_be_left_out():
    spec = model_spec(MODELS["llama"])
    tokens = batch()[0]

    @jax.jit
    def both(weights):
        model = spec.merge(weights)
        positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
        return model(tokens), model(tokens, positions, jnp.ones((2, 12), jnp.int32))

    left_out, given = both(params("llama"))
    assert_close(left_out, given, 2e-6)


def test_the_future_is_not_seen():
    tokens, positions, segments, counted = batch()
    changed = tokens.copy()
    changed[:, 7:] = (tokens[:, 7:] + 1) % 29
    (_, (_, _, logits)), _ = compiled("gpt2")(params("gpt2"), changed, positions, segments, counted)
    (_, (_, _, before)), _ = ran("gpt2")
    np.testing.assert_array_equal(logits[:, :7], before[:, :7])
    assert np.abs(logits[:, 7:] - before[:, 7:]).max() > 0.1


def test_the_loss_in_chunks(monkeypatch):
    """A chunk of the sequence at a time: the same loss and gradients, and the logits never exist as a whole."""
    random = np.random.default_rng(3)
    hidden, table = (random.standard_normal(shape).astype(np.float32) for shape in ((2, 12, 16), (37, 16)))
    targets = random.integers(0, 37, (2, 12))
    weights = random.random((2, 12)).astype(np.float32)

    def run(limit):
        monkeypatch.setattr(vocabulary, "LOGITS_BYTES", limit)

        def loss(hidden, table):
            return 0.5 * vocabulary.cross_entropy(hidden, table, targets, weights, 1e-2)

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, table).compile()
        return compiled(hidden, table), compiled.as_text()

    (whole, whole_gradients), text = run(2**20)
    assert "f32[2,12,37]" in text
    (chunked, chunked_gradients), text = run(3 * 4 * 2 * 37)  # three positions
    assert "f32[2,12,37]" not in text and "f32[2,3,37]" in text
    assert float(chunked) == pytest.approx(float(whole), rel=1e-6)
    for actual, expected in zip(chunked_gradients, whole_gradients, strict=True):
        assert_close(actual, expected, 1e-6)


def test_chunks_divide_the_sequence(monkeypatch):
    monkeypatch.setattr(vocabulary, "LOGITS_BYTES", 4 * 2 * 10 * 5)  # five positions of two rows
    assert vocabulary.chunk_length(batch=2, length=12, vocab=10) == 4
    assert vocabulary.chunk_length(batch=2, length=13, vocab=10) == 1
    assert vocabulary.chunk_length(batch=2, length=4, vocab=10) == 4
    assert vocabulary.chunk_length(batch=200, length=12, vocab=10) == 1
