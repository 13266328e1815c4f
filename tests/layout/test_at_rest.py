"""Layers that the stages of a pipeline do not divide: spread at rest like others, and the numbers of one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.model.adapter_config import NO_ADAPTER, AdapterConfig
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.checkpoint.tree_hash import tree_hash
from jaxllm.train.state import abstract_state, bytes_per_device, init_state
from tests.layout.runs import LLAMA, parts, train

MODEL = dataclasses.replace(LLAMA, num_layers=6, dropout=0.0, attention_dropout=0.0)
LORA = AdapterConfig(kind="lora", rank=4)
ONE = make_layout(MeshConfig(data=1), LayoutConfig(zero_stage=0), devices=jax.devices()[:1])


def uneven(**fields):
    mesh = MeshConfig(pipeline=4, data=2)
    return make_layout(mesh, LayoutConfig(**{"num_microbatches": 2, "stage_layers": "1,2,2,1"} | fields))


LAYOUTS = {
    "list": uneven(),
    "light ends, ZeRO 3": uneven(stage_layers="light_ends", zero_stage=3),
    "one short stage": uneven(stage_layers="2,2,1,1", schedule="zero_bubble", zero_stage=2),
}


def trained(layout, adapter: AdapterConfig):
    return train(MODEL, layout, 2, step="lora" if adapter.kind == "lora" else "pretrain", adapter=adapter)


@functools.cache
def alone(adapter: AdapterConfig):
    return trained(ONE, adapter)


@pytest.mark.parametrize("adapter", [NO_ADAPTER, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_numbers_of_one_device(layout, adapter):
    found, expected = trained(layout, adapter), alone(adapter)
    np.testing.assert_allclose(found.numbers, expected.numbers, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found.params, expected.params)


def test_a_device_keeps_its_share():
    """Of six layers on four stages the share of eight: two layers, not six."""
    spec, optimizer, *_ = parts(MODEL)
    keeps = lambda model, layout: bytes_per_device(abstract_state(parts(model)[0], optimizer, layout))  # noqa: E731
    assert spec.config.num_layers == 6
    even = uneven(stage_layers="")
    assert keeps(MODEL, uneven()) == keeps(dataclasses.replace(MODEL, num_layers=8), even)


def test_a_checkpoint_goes_from_there_to_any_layout_and_back(tmp_path):
    """Bit for bit, under one hash, though the arrays of one have two layers more."""
    spec, optimizer, *_ = parts(MODEL)
    there = LAYOUTS["list"]
    state = init_state(spec, optimizer, there, seed=3)
    query = lambda state: state.params["layers"]["attention"]["query"]["kernel"]  # noqa: E731
    assert query(state).shape[0] == 8 and not np.asarray(query(state))[6:].any()
    run = {"model": {"num_layers": 6}}
    with Checkpoints(tmp_path / "there") as checkpoints:
        checkpoints.save(state, {}, run, {})
    with Checkpoints(tmp_path / "there") as checkpoints:
        alone = checkpoints.restore(abstract_state(spec, optimizer, ONE)).state
    assert query(alone).shape[0] == 6
    np.testing.assert_array_equal(np.asarray(query(alone)), np.asarray(query(state))[:6])
    assert tree_hash(alone.params) == tree_hash(state.params)
    with Checkpoints(tmp_path / "alone") as checkpoints:
        checkpoints.save(alone, {}, run, {})
    with Checkpoints(tmp_path / "alone") as checkpoints:
        back = checkpoints.restore(abstract_state(spec, optimizer, there)).state
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), back, state)
