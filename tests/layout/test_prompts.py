"""Virtual tokens under layouts: the numbers of one device. All of them: python -m tests.benchmarks.prompt_layouts."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxllm.layout import zero
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.model.adapter_config import AdapterConfig
from tests.layout.runs import GPT2, LEARNING_RATE, LLAMA, MOE, train

MODELS = {"llama": LLAMA, "gpt2": GPT2, "moe": MOE}
PROMPT = AdapterConfig(kind="prompt", num_virtual_tokens=2, encoder_dim=24)
KINDS = {
    "prompt": PROMPT,
    "p_tuning": dataclasses.replace(PROMPT, kind="p_tuning"),
    "p_tuning_lstm": dataclasses.replace(PROMPT, kind="p_tuning", encoder="lstm"),
    "prefix": dataclasses.replace(PROMPT, kind="prefix"),
    "prefix_projected": dataclasses.replace(PROMPT, kind="prefix", prefix_projection=True),
}
LAYOUTS = {
    "model": ({"data": 2, "model": 4}, {"zero_stage": 1, "sequence_parallel": True}),
    "zero3": ({"data": 8}, {"zero_stage": 3, "num_microbatches": 2}),
    "pipeline": ({"pipeline": 2, "data": 2}, {"num_microbatches": 4}),
    "zero_bubble": ({"pipeline": 2, "model": 2}, {"num_microbatches": 4, "schedule": "zero_bubble"}),
    "context": ({"context": 2, "data": 2, "model": 2}, {"zero_stage": 3}),
    "mixed": ({"pipeline": 2, "context": 2, "model": 2}, {"num_microbatches": 2, "zero_stage": 2}),
}
# A projected prefix has what all others have: weights before the layers, in them, and shared by them.
CASES = [("llama", "prefix_projected", layout) for layout in LAYOUTS]
CASES += [("llama", "p_tuning", layout) for layout in ("model", "zero3", "context", "mixed")]
CASES += [("gpt2", "prefix", "pipeline"), ("gpt2", "prefix", "context")]
CASES += [("gpt2", "p_tuning_lstm", "mixed"), ("moe", "prompt", "mixed")]


def trained(model: str, kind: str, mesh: dict, fields: dict):
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    layout = make_layout(MeshConfig(**{"data": 1} | mesh), LayoutConfig(**fields), devices=devices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "SMALL", 256)  # stage 3 gathers even tiny weights
        return train(MODELS[model], layout, 3, adapter=KINDS[kind])


@functools.cache
def reference(model: str, kind: str):
    return trained(model, kind, {"data": 1}, {"zero_stage": 0})


def differences(model: str, kind: str, layout: str) -> tuple[float, float]:
    """The largest of losses and gradient norms, relative; of parameters, relative to their largest or the rate."""
    found, expected = trained(model, kind, *LAYOUTS[layout]), reference(model, kind)
    of_one = lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), LEARNING_RATE)  # noqa: E731
    return (
        float(np.abs(found.numbers / expected.numbers - 1).max()),
        float(max(jax.tree.leaves(jax.tree.map(of_one, found.params, expected.params)))),
    )


@pytest.mark.parametrize(("model", "kind", "layout"), CASES)
def test_the_numbers_of_one_device(model, kind, layout):
    """Dropout on, packed rows, uneven masks."""
    numbers, params = differences(model, kind, layout)
    assert numbers <= 1e-5 and params <= 1e-4, (numbers, params)
