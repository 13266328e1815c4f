"""reward, dpo, ppo and grpo under layouts, full and LoRA: the losses of one device."""

import jax
import numpy as np
import pytest

from jaxllm.layout import zero
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from tests.layout.alignment_runs import CASES, run

LAYOUTS = {
    "model": ({"data": 2, "model": 4}, {"zero_stage": 1, "sequence_parallel": True, "num_microbatches": 2}),
    "zero3": ({"data": 8}, {"zero_stage": 3, "num_microbatches": 2}),
    "pipeline": ({"pipeline": 2, "data": 2}, {"num_microbatches": 4}),
    "context": ({"context": 2, "data": 2, "model": 2}, {"zero_stage": 3}),
    "mixed": ({"pipeline": 2, "context": 2, "model": 2}, {"num_microbatches": 2, "zero_stage": 2}),
}


@pytest.fixture(autouse=True)
def stage_3_gathers_even_tiny_weights(monkeypatch):
    monkeypatch.setattr(zero, "SMALL", 256)


def numbers(case: str, mesh: dict, fields: dict) -> list[dict[str, float]]:
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    return run(case, make_layout(MeshConfig(**{"data": 1} | mesh), LayoutConfig(**fields), devices=devices))


@pytest.fixture(scope="module", params=CASES)
def reference(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "SMALL", 256)
        return request.param, numbers(request.param, {"data": 1}, {"zero_stage": 0})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_of_one_device(reference, layout):
    """Loss, gradient norm and every metric of two steps; packed rows, uneven masks, ids that are no tokens."""
    case, expected = reference
    found = numbers(case, *LAYOUTS[layout])
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
