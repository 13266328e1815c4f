"""The same numbers everywhere: loss and gradient norm do not depend on the layout."""

import itertools
import os

import jax
import numpy as np
import pytest

from jaxllm.layout import zero
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.train.state import init_state
from tests.layout.runs import GPT2, LLAMA, Shape, all_shapes, canonical, parts, reference, run

# JAXLLM_ALL_LAYOUTS=1 runs all 160. Else one a factorisation, of those that make different programs (a ZeRO stage has
# nothing to spread where data=1, nor has sequence parallelism where model=1), and a few of the others below.
# test_matrix.py draws from all mesh axes.
EVERY = os.environ.get("JAXLLM_ALL_LAYOUTS") == "1"
DIFFERENT = [list(shapes) for _, shapes in itertools.groupby(all_shapes(), lambda shape: shape[:3])]
DIFFERENT = [list(dict.fromkeys(map(canonical, shapes))) for shapes in DIFFERENT]
SHAPES = all_shapes() if EVERY else [shapes[5 * i % len(shapes)] for i, shapes in enumerate(DIFFERENT)]
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
    "fields",
    [{"remat": "full"}, {"remat": "selective"}, {"scan_layers": False}, {"rules": "fsdp"}, {"rules": "2d"}],
    ids=lambda fields: "{}={}".format(*next(iter(fields.items()))),
)
def test_remat_unrolled_layers_and_rule_sets(fields):
    layout = Shape(1, 2, 2, zero_stage=3, sequence_parallel=True, num_microbatches=2).layout(**fields)
    np.testing.assert_allclose(run(LLAMA, layout), reference(LLAMA), rtol=1e-5)


@pytest.mark.parametrize(
    ("compute", "loss_tolerance", "norm_tolerance"), [("bfloat16", 1e-3, 2e-2), ("float16", 1e-4, 4e-3)]
)
def test_half_precision_within_rounding(compute, loss_tolerance, norm_tolerance):
    """Against one device, and that against float32; float16 with its loss scale."""
    alone = reference(GPT2, compute)
    laid_out = run(GPT2, Shape(1, 2, 2, zero_stage=2).layout(), compute=compute)
    for column, tolerance in enumerate((loss_tolerance, norm_tolerance)):
        np.testing.assert_allclose(laid_out[:, column], alone[:, column], rtol=tolerance)
        np.testing.assert_allclose(alone[:, column], reference(GPT2)[:, column], rtol=tolerance)
    assert not np.array_equal(alone, reference(GPT2))


@pytest.mark.parametrize("stages", [1, 2])
def test_gradients_in_bfloat16(stages):
    """Reduced over devices and accumulated in bfloat16, with and without a pipeline."""
    mesh = MeshConfig(pipeline=stages, data=2, model=2)
    layout = make_layout(
        mesh, LayoutConfig(num_microbatches=2), reduce_dtype="bfloat16", devices=jax.devices()[: 4 * stages]
    )
    rounded, exact = run(LLAMA, layout, 2), reference(LLAMA)[:2]
    np.testing.assert_allclose(rounded[:, 0], exact[:, 0], rtol=1e-4)
    np.testing.assert_allclose(rounded[:, 1], exact[:, 1], rtol=2e-2)
    assert not np.allclose(rounded[:, 1], exact[:, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "shape", "rules"),
    [
        (GPT2, Shape(8, 1, 1, zero_stage=0), "megatron"),
        (GPT2, Shape(1, 1, 8, zero_stage=1), "megatron"),
        (GPT2, Shape(2, 2, 2, zero_stage=2), "megatron"),
        (LLAMA, Shape(1, 4, 2, zero_stage=3), "megatron"),
        (LLAMA, Shape(1, 4, 2, zero_stage=3), "fsdp"),
    ],
)
def test_the_first_parameters_are_the_same_bit_for_bit(model, shape, rules):
    spec, optimizer, _, first = parts(model)
    state = init_state(spec, optimizer, shape.layout(rules=rules), seed=0)
    for (path, actual), expected in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(first.params), strict=True
    ):
        np.testing.assert_array_equal(actual, expected, err_msg=jax.tree_util.keystr(path))


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


def test_what_is_run_by_default_has_everything_once():
    assert len(all_shapes()) == 10 * 4 * 2 * 2
    for field in Shape._fields:
        assert {getattr(shape, field) for shape in SHAPES} == {getattr(shape, field) for shape in all_shapes()}, field
    assert {shape[:3] for shape in SHAPES} == {shape[:3] for shape in all_shapes()}
