"""The step prompt: packed examples behind their virtual tokens cost what they cost alone."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxllm.data.batch import EXAMPLES, Batch
from jaxllm.data.dataset import prepare
from jaxllm.layout.scope import joined
from jaxllm.model.spec import model_spec
from jaxllm.steps import STEPS
from tests.layout.runs import GPT2, LLAMA
from tests.model.test_prompts import KINDS, NUMBER
from tests.steps.test_sft import LENGTH, example_config

ALIBI = dataclasses.replace(GPT2, positions="alibi")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Rows of real examples, several to one and one to one."""
    config = example_config(tmp_path_factory.mktemp("examples"))

    def rows(packing: str) -> Batch:
        how = {"length": LENGTH, "kind": EXAMPLES, "places": NUMBER, "progress": False}
        packed = prepare(dataclasses.replace(config, packing=packing), **how)
        made = packed._rows(packed.train[0], 0)
        return Batch(*(np.stack(leaves) for leaves in zip(*(made[i] for i in range(len(made))), strict=True)))

    return rows("best_fit"), rows("none")


@pytest.mark.parametrize(
    ("kind", "model"), [("p_tuning_lstm", LLAMA), ("prefix", ALIBI), ("prefix_projected", LLAMA), ("prompt", GPT2)]
)
def test_packed_examples_cost_what_they_cost_alone(examples, kind, model):
    """Summed loss and its gradient, each example with the places of its own virtual tokens."""
    sizes = {"vocab_size": 360, "max_length": LENGTH, "mlp_dim": 64}
    spec = model_spec(dataclasses.replace(model, **sizes), KINDS[kind])
    base = jax.tree.map(lambda leaf: 5 * leaf, spec.base(spec.init(0)))  # attention that is far from uniform
    own = spec.own(spec.init(0))

    @jax.jit
    def cost(own, batch):
        def total(own):
            return STEPS["prompt"].loss(spec.merge(joined(base, own)), batch, dropout=None)[:2]

        return jax.value_and_grad(total, has_aux=True)(own)

    packed, alone = examples
    assert len(packed.tokens) < 0.8 * len(alone.tokens) and packed.segment_ids.max() > 2
    assert not packed.loss_mask[packed.positions <= NUMBER].any()
    ((loss, weight), gradient), ((loss_alone, weight_alone), gradient_alone) = (cost(own, b) for b in examples)
    assert weight == weight_alone > 500
    assert float(loss) == pytest.approx(float(loss_alone), rel=1e-5)
    for got, want in zip(*map(jax.tree.leaves, (gradient, gradient_alone)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
        assert np.any(want)
