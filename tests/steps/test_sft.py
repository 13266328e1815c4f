"""The step sft: packed examples cost what they cost alone, and train the same under every kind of layout."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from jaxllm.data.batch import EXAMPLES, Batch
from jaxllm.data.config import DataConfig
from jaxllm.data.dataset import prepare
from jaxllm.data.tokenizer_training import train_tokenizer
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.model.spec import model_spec
from jaxllm.steps import STEPS
from tests.data.conversations import conversations
from tests.layout.runs import GPT2, LLAMA, train

LENGTH = 128


def example_config(folder) -> DataConfig:
    """Examples in `folder`, most of them conversations, and a tokenizer."""
    talks = conversations(40, tools=False)
    records = [{"messages": talk} if i % 4 else {"text": "却说 the fox"} for i, talk in enumerate(talks)]
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    train_tokenizer([m["content"] for talk in talks for m in talk], vocab_size=360).save(folder / "tokenizer")
    return DataConfig(
        source="jsonl",
        path=str(folder / "a.jsonl"),
        tokenizer=str(folder / "tokenizer"),
        chat_template="plain",
        truncation="cut",
        held_out="",
        cache=str(folder / "cache"),
    )


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Rows of real examples, several to one and one to one."""
    config = example_config(tmp_path_factory.mktemp("examples"))

    def rows(packing: str) -> Batch:
        data = prepare(dataclasses.replace(config, packing=packing), length=LENGTH, kind=EXAMPLES, progress=False)
        packed = data._rows(data.train[0], 0)
        return Batch(*(np.stack(leaves) for leaves in zip(*(packed[i] for i in range(len(packed))), strict=True)))

    return rows("best_fit"), rows("none")


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["rope", "learned"])
def test_packed_examples_cost_what_they_cost_alone(examples, model):
    """Summed loss and its gradient."""
    spec = model_spec(dataclasses.replace(model, vocab_size=360, max_length=LENGTH))
    params = jax.tree.map(lambda leaf: 5 * leaf, spec.init(0))  # attention that is far from uniform

    @jax.jit
    def cost(params, batch):
        total = lambda params: STEPS["sft"].loss(spec.merge(params), batch, dropout=None)[:2]  # noqa: E731
        return jax.value_and_grad(lambda params: total(params), has_aux=True)(params)

    (packed, alone) = examples
    assert len(packed.tokens) < 0.8 * len(alone.tokens) and packed.segment_ids.max() > 2
    ((loss, weight), gradient), ((loss_alone, weight_alone), gradient_alone) = (cost(params, b) for b in examples)
    assert weight == weight_alone > 500
    assert float(loss) == pytest.approx(float(loss_alone), rel=1e-5)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient_alone))
    for got, want in zip(*map(jax.tree.leaves, (gradient, gradient_alone)), strict=True):
        # (The bias of GPT-2's keys is only rounding: softmax does not see it.)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(np.abs(want).max(), 0.1 * largest))


def test_a_run_of_examples_that_see_each_other_would_differ(examples):
    """The control: what packing must not do changes the loss."""
    packed, _ = examples
    spec = model_spec(dataclasses.replace(LLAMA, vocab_size=360, max_length=LENGTH))
    params = jax.tree.map(lambda leaf: 5 * leaf, spec.init(0))
    seen = packed._replace(segment_ids=np.minimum(packed.segment_ids, 1))
    first, second = (float(STEPS["sft"].loss(spec.merge(params), b, dropout=None).total) for b in (packed, seen))
    assert abs(first - second) > 1e-3 * abs(first)


NOISY = dataclasses.replace(LLAMA, neftune_alpha=5.0)
ONE_DEVICE = make_layout(MeshConfig(data=1), LayoutConfig(zero_stage=0), devices=jax.devices()[:1])
STEPS_TAKEN = 3
LAYOUTS = {
    "data": ({"data": 4}, {"zero_stage": 3, "num_microbatches": 4}),
    "model": ({"model": 2}, {"sequence_parallel": True}),
    "context": ({"context": 2}, {}),
    "pipeline": ({"pipeline": 2}, {"num_microbatches": 4}),
    "all": ({"pipeline": 2, "context": 2, "model": 2}, {"num_microbatches": 2}),
}


@functools.cache
def on_one_device():
    return train(NOISY, ONE_DEVICE, STEPS_TAKEN, step="sft")


@pytest.mark.parametrize(("mesh", "fields"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_kind_of_layout_trains_the_same(mesh, fields):
    """Losses and gradient norms, with noise on the embeddings, dropout, packed examples and padding."""
    mesh = MeshConfig(**{"data": 1, **mesh})
    devices = jax.devices()[: mesh.data * mesh.model * mesh.context * mesh.pipeline]
    trained = train(NOISY, make_layout(mesh, LayoutConfig(**fields), devices=devices), STEPS_TAKEN, step="sft")
    np.testing.assert_allclose(trained.numbers, on_one_device().numbers, rtol=1e-5)


def test_the_noise_is_at_work():
    without = train(LLAMA, ONE_DEVICE, STEPS_TAKEN, step="sft")
    assert np.abs(without.numbers - on_one_device().numbers).max() > 1e-3
