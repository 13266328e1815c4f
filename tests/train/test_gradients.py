"""The gradients of float16 at loss scales that its largest number, 65,504, would not hold in a table's gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layout.layout import use_layout
from jaxllm.layout.vocabulary import cross_entropy
from jaxllm.train.gradients import loss_and_gradients
from tests.layout.runs import BATCH, GPT2, LENGTH, LLAMA, STEPS, Shape, make_batch, parts

TIED = dataclasses.replace(LLAMA, vocab_size=GPT2.vocab_size, tied_head=True)


def gradients(model, shape: Shape, compute: str, scale: float):
    """Those of the mean loss over a batch, taken at a loss scale that is divided out again."""
    spec, _, _, first = parts(dataclasses.replace(model, dropout=0.0, attention_dropout=0.0))
    layout = shape.layout()

    @jax.jit
    def run(params, batch):
        with use_layout(layout):
            return loss_and_gradients(
                lambda weights, batch: STEPS["pretrain"].loss(spec.merge(weights), batch, dropout=None),
                params,
                spec.axes,
                batch,
                num_microbatches=1,
                compute=jnp.dtype(compute),
                scale=scale / (BATCH * LENGTH),
            ).gradients

    return jax.tree.map(lambda g: np.asarray(g) / scale, run(first.params, make_batch(spec, 0, layout)))


@pytest.mark.parametrize(("model", "scale"), [(LLAMA, 2.0**23), (TIED, 2.0**22)], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 0), Shape(1, 2, 2, 2)], ids=str)
def test_tables_at_a_large_loss_scale(model, scale, shape):
    expected = gradients(model, Shape(1, 1, 1, 0), "float32", 1.0)
    assert scale * np.abs(expected["embedding"]["table"]).max() > np.finfo(np.float16).max
    actual = gradients(model, shape, "float16", scale)
    for (path, e), a in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-2 * np.abs(e).max(), err_msg=jax.tree_util.keystr(path))


def test_a_mean_whose_sum_float16_does_not_hold():
    """The head's gradient is known before it is scaled: then it is still a sum over tokens."""
    tokens, vocab, embed = 16_384, 8, 4
    random = np.random.default_rng(0)
    hidden = (10 * random.random((8, tokens // 8, embed))).astype(np.float16)
    table = np.zeros((vocab, embed), np.float16)
    targets = np.zeros(hidden.shape[:2], np.int32)

    def loss(hidden, table):
        return cross_entropy(hidden, table, targets, np.ones(targets.shape, np.float32)) / tokens

    actual = jax.jit(jax.grad(loss, argnums=1))(hidden, table)
    mean = hidden.astype(np.float64).mean((0, 1))
    expected = np.outer(1 / vocab - (np.arange(vocab) == 0), mean)  # every token is as probable as every other
    assert tokens * np.abs(expected).max() > np.finfo(np.float16).max
    np.testing.assert_allclose(actual, expected, rtol=2e-3)
