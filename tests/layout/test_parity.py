"""The same numbers everywhere: loss and gradient norm do not depend on the layout."""

import os

import numpy as np
import pytest

from jaxllm.layout import zero
from tests.layout.runs import GPT2, LLAMA, Shape, all_shapes, canonical, reference, run

# A ZeRO stage has nothing to spread where data=1, nor has sequence parallelism where model=1: such layouts are run
# once, and a few of the others below. JAXLLM_ALL_LAYOUTS=1 runs all 160.
EVERY = os.environ.get("JAXLLM_ALL_LAYOUTS") == "1"
SHAPES = all_shapes() if EVERY else list(dict.fromkeys(canonical(shape) for shape in all_shapes()))
LEFT_OUT = [Shape(8, 1, 1, zero_stage=3, sequence_parallel=True), Shape(2, 1, 4, zero_stage=2, num_microbatches=4)]
SAMPLE = [
    Shape(1, 4, 2, zero_stage=3, sequence_parallel=True),
    Shape(1, 2, 4, zero_stage=2, num_microbatches=4),
    Shape(2, 2, 2, zero_stage=1),
    Shape(1, 1, 8, zero_stage=1, sequence_parallel=True),
]


@pytest.fixture(autouse=True)
def stage_3_gathers_even_tiny_weights(monkeypatch):
    monkeypatch.setattr(zero, "SMALL", 256)


def agrees(shape: Shape, model, **fields) -> None:
    np.testing.assert_allclose(run(model, shape.layout(**fields)), reference(model), rtol=1e-5, err_msg=str(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_gives_the_numbers_of_one_device(shape):
    """Llama: dropout on, uneven loss masks, packed rows, grouped queries (fewer key heads than `model` at 8)."""
    agrees(shape, LLAMA)


@pytest.mark.skipif(EVERY, reason="all layouts are run above")
@pytest.mark.parametrize("shape", LEFT_OUT, ids=str)
def test_layouts_left_out_above(shape):
    assert shape not in SHAPES
    agrees(shape, LLAMA)


@pytest.mark.parametrize("shape", SAMPLE, ids=str)
def test_a_vocabulary_that_does_not_divide(shape):
    """GPT-2: learned positions, biases, a tied head, 37 tokens."""
    agrees(shape, GPT2)


@pytest.mark.parametrize(
    ("shape", "variant", "model"),
    [
        (Shape(1, 1, 1, 0, context=8), "ring", LLAMA),
        (Shape(1, 1, 2, 1, context=4), "ring", LLAMA),
        (Shape(1, 2, 2, 3, True, 4, context=2), "ring", LLAMA),
        (Shape(2, 1, 1, 2, context=4), "all_gather", LLAMA),
        (Shape(1, 2, 2, 3, True, 4, context=2), "all_gather", GPT2),
        (Shape(1, 2, 1, 3, context=4), "ring", GPT2),
        (Shape(1, 1, 4, 1, True, context=2), "ring", GPT2),
    ],
    ids=lambda value: "llama" if value is LLAMA else "gpt2" if value is GPT2 else str(value),
)
def test_a_split_sequence(shape, variant, model):
    """Dropout, packed documents and positions of every kind across the cut."""
    agrees(shape, model, context_attention=variant)


def test_every_factorisation_is_there():
    assert len(all_shapes()) == 10 * 4 * 2 * 2
    assert {canonical(shape) for shape in all_shapes()} <= set(SHAPES)
