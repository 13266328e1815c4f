"""The step mlm: its loss against a float64 computation, and the same training under every kind of layout."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxllm.data.masking import MaskedBatch
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.model import presets
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import model_spec
from jaxllm.plan.measure import synthetic_batch
from jaxllm.steps import STEPS
from jaxllm.train.config import TRAIN_STEPS, Config
from jaxllm.train.train_step import abstract_batch
from tests.layout.runs import BATCH, LENGTH, make_batch, train
from tests.model import reference

# A vocabulary that no `model` divides, dropout, and all that BERT has and GPT-2 has not.
SIZES = {"num_layers": 2, "embed_dim": 32, "num_heads": 4, "mlp_dim": 64, "max_length": 16}
BERT = ModelConfig(**presets.bert_base(**SIZES), vocab_size=37).resolved()
TRAINED = dataclasses.replace(BERT, dropout=0.1, attention_dropout=0.1)
ONE_DEVICE = make_layout(MeshConfig(data=1), LayoutConfig(zero_stage=0), devices=jax.devices()[:1])
STEPS_TAKEN = 3


def test_the_loss_is_that_of_the_papers():
    """Against float64, with numbers large enough that every part matters: nothing stays at 0 or 1."""
    spec = model_spec(BERT)
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.3 * random.standard_normal(leaf.shape), np.float32), spec.init(0)
    )
    batch = MaskedBatch(*(np.asarray(leaf) for leaf in make_batch(spec, 0, ONE_DEVICE, "mlm")))
    loss = jax.jit(lambda params, batch: STEPS["mlm"].loss(spec.merge(params), batch, dropout=None))(params, batch)
    float64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    assert batch.loss_mask.sum() == loss.weight > 15
    assert float(loss.total) == pytest.approx(reference.masked_loss(float64, BERT, *batch), rel=1e-5)
    # A token is told from those on both sides, and not from its own place alone.
    assert (batch.tokens != batch.targets).any()


LAYOUTS = {
    "data": ({"data": 2}, {"zero_stage": 3, "num_microbatches": 4}),
    "model": ({"model": 2}, {"sequence_parallel": True}),
    "context": ({"context": 2}, {}),
    "pipeline": ({"pipeline": 2}, {"num_microbatches": 4}),
    "all": ({"pipeline": 2, "context": 2, "model": 2}, {"num_microbatches": 2}),
}


@functools.cache
def on_one_device():
    return train(TRAINED, ONE_DEVICE, STEPS_TAKEN, step="mlm")


@pytest.mark.parametrize(("mesh", "fields"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_kind_of_layout_trains_the_same(mesh, fields):
    """Losses and gradient norms, with dropout, packed documents and padding."""
    mesh = MeshConfig(**{"data": 1, **mesh})
    devices = jax.devices()[: mesh.data * mesh.model * mesh.context * mesh.pipeline]
    trained = train(TRAINED, make_layout(mesh, LayoutConfig(**fields), devices=devices), STEPS_TAKEN, step="mlm")
    np.testing.assert_allclose(trained.numbers, on_one_device().numbers, rtol=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_the_batch_of_the_planner_is_that_of_the_loader(name):
    """What is compiled and timed without data has the tree, shapes and dtypes of what is trained on."""
    config = Config(train_step=name, model=BERT)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=BATCH, length=LENGTH))
    made = jax.eval_shape(
        lambda: jax.tree.map(lambda leaf: leaf[...], make_batch(model_spec(BERT), 0, ONE_DEVICE, name))
    )
    for batch in (abstract_batch(config, ONE_DEVICE), synthetic_batch(config, ONE_DEVICE)):
        assert jax.tree.structure(batch) == jax.tree.structure(made)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(batch)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(made)
        ]


def test_every_step_can_be_named_in_a_config():
    assert set(TRAIN_STEPS) == set(STEPS)
