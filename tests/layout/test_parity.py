"""The same numbers everywhere: loss and gradient norm do not depend on the layout."""

import numpy as np
import pytest

from jaxllm.layout import zero
from tests.layout.runs import GPT2, LLAMA, Shape, all_shapes, canonical, lowered, reference, run

SHAPES = list(dict.fromkeys(canonical(shape) for shape in all_shapes()))
SAMPLE = [
    Shape(1, 4, 2, zero_stage=3, sequence_parallel=True),
    Shape(1, 2, 4, zero_stage=2, num_microbatches=4),
    Shape(2, 2, 2, zero_stage=1),
    Shape(1, 1, 8, zero_stage=1, sequence_parallel=True),
]


@pytest.fixture(autouse=True)
def stage_3_gathers_even_tiny_weights(monkeypatch):
    monkeypatch.setattr(zero, "SMALL", 256)


def agrees(shape: Shape, model) -> None:
    np.testing.assert_allclose(run(model, shape.layout()), reference(model), rtol=1e-5, err_msg=str(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_gives_the_numbers_of_one_device(shape):
    """Llama: dropout on, uneven loss masks, packed rows, grouped queries (fewer key heads than `model` at 8)."""
    agrees(shape, LLAMA)


@pytest.mark.parametrize("shape", SAMPLE, ids=str)
def test_a_vocabulary_that_does_not_divide(shape):
    """GPT-2: learned positions, biases, a tied head, 37 tokens."""
    agrees(shape, GPT2)


def test_every_factorisation_is_there():
    assert len(all_shapes()) == 10 * 4 * 2 * 2
    assert {canonical(shape) for shape in all_shapes()} == set(SHAPES)


@pytest.mark.parametrize(
    "shape", [Shape(8, 1, 1, zero_stage=3, sequence_parallel=True), Shape(1, 8, 1, 2, True)], ids=str
)
def test_layouts_that_are_not_run_are_the_same_program(shape):
    text = lambda shape: lowered(LLAMA, shape.layout()).as_text()  # noqa: E731
    if shape.data == 1:
        monkeypatched = canonical(shape)
        assert text(monkeypatched) == text(shape)
    else:
        assert text(canonical(shape)) == text(shape)
