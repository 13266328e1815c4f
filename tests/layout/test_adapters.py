"""Adapters under layouts: the numbers of one device, and what a step holds of the frozen model."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxllm.layout import zero
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.model.adapter_config import AdapterConfig
from tests.benchmarks import adapter_memory
from tests.layout.runs import GPT2, LEARNING_RATE, LLAMA, MOE, train

LORA = AdapterConfig(kind="lora", rank=4)
ADAPTERS = {
    "lora": (LLAMA, dataclasses.replace(LORA, dropout=0.1)),
    "dora": (GPT2, dataclasses.replace(LORA, dora=True)),
    "pissa": (LLAMA, dataclasses.replace(LORA, rank=2, init="pissa")),
    "qlora": (LLAMA, dataclasses.replace(LORA, base_weights="nf4")),
    "experts": (MOE, LORA),
}
LAYOUTS = {
    "model": ({"data": 2, "model": 4}, {"zero_stage": 1, "sequence_parallel": True}),
    "zero3": ({"data": 8}, {"zero_stage": 3, "num_microbatches": 2}),
    "pipeline": ({"pipeline": 2, "data": 2}, {"num_microbatches": 4}),
    "context": ({"context": 2, "data": 2, "model": 2}, {"zero_stage": 3}),
    "mixed": ({"pipeline": 2, "context": 2, "model": 2}, {"num_microbatches": 2, "zero_stage": 2}),
}


@pytest.fixture(autouse=True)
def stage_3_gathers_even_tiny_weights(monkeypatch):
    monkeypatch.setattr(zero, "SMALL", 256)


def trained(name: str, mesh: dict, fields: dict):
    model, adapter = ADAPTERS[name]
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    layout = make_layout(MeshConfig(**{"data": 1} | mesh), LayoutConfig(**fields), devices=devices)
    return train(model, layout, 3, adapter=adapter)


@pytest.fixture(scope="module", params=ADAPTERS)
def reference(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "SMALL", 256)
        return request.param, trained(request.param, {"data": 1}, {"zero_stage": 0})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_of_one_device(reference, layout):
    """Dropout on, packed rows, uneven masks; the parameters relative to their largest, or the learning rate."""
    name, expected = reference
    found = trained(name, *LAYOUTS[layout])
    np.testing.assert_allclose(found.numbers, expected.numbers, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        assert np.abs(one - other).max() <= 1e-4 * max(np.abs(other).max(), LEARNING_RATE)


def test_memory_of_a_billion_parameters():
    """As compiled: no gradient and no optimizer state of frozen weights, and 4 bits are 4 bits."""
    lora = adapter_memory.measure(adapter_memory.KINDS["LoRA"], "float32")
    base = lora.num_parameters - lora.num_trained
    assert base == 1_137_772_544
    assert lora.frozen == 4 * base
    assert lora.trained == 4 * lora.num_trained
    assert lora.optimizer == pytest.approx(8 * lora.num_trained, abs=64)
    # Far below the 4.6 GB that one gradient of the frozen weights would be.
    assert lora.temporary < 0.2 * lora.frozen
    qlora = adapter_memory.measure(adapter_memory.KINDS["QLoRA"], "bfloat16")
    assert qlora.matrices <= 0.56
    assert qlora.temporary < 0.4 * 2 * base  # nor are all matrices made whole at once
    assert qlora.frozen < 0.4 * 2 * base
