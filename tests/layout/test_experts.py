"""Experts over devices: the numbers of one device, no token lost, and no more sent than the theory says."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.layout.collectives import collectives
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.experts import LATER_ROUNDS, Dispatch, run_experts
from jaxllm.layout.layout import Layout, make_layout, use_layout
from jaxllm.model.moe import FeedForward
from tests.layout.runs import BATCH, LENGTH, MOE, lowered, parts, run, train

AXES = (("experts", "embed", "mlp"), ("experts", "embed", "mlp"), ("experts", "mlp", "embed"))
EXPERTS, EMBED, HIDDEN, CHOICES, ROWS, TOKENS = 8, 20, 10, 2, 8, 12


def layout_of(zero_stage: int = 1, num_microbatches: int = 1, **fields) -> Layout:
    mesh = {name: fields.pop(name) for name in list(fields) if name in MeshConfig.__dataclass_fields__}
    sizes = {"data": 1, **mesh}
    config = LayoutConfig(zero_stage=zero_stage, num_microbatches=num_microbatches, **fields)
    return make_layout(MeshConfig(**sizes), config, devices=jax.devices()[: math.prod(sizes.values())])


MODELS = {
    "dropless": MOE,
    "capacity": dataclasses.replace(MOE, expert_dispatch="capacity", capacity_factor=0.7),
}
LAYOUTS = {
    "expert 4": {"expert": 4, "data": 2},
    "expert 2 model 2": {"expert": 2, "model": 2, "data": 2, "zero_stage": 3},
    "microbatches": {"expert": 2, "data": 2, "model": 2, "zero_stage": 2, "num_microbatches": 4},
    "pipeline": {"pipeline": 2, "expert": 2, "data": 2, "num_microbatches": 4},
    "pipeline, zero bubble": {
        "pipeline": 2,
        "expert": 2,
        "model": 2,
        "zero_stage": 3,
        "num_microbatches": 4,
        "schedule": "zero_bubble",
    },
    "fsdp": {"expert": 2, "data": 2, "model": 2, "zero_stage": 3, "rules": "fsdp"},
    "state over experts too": {
        "pipeline": 2,
        "expert": 2,
        "data": 2,
        "zero_stage": 3,
        "num_microbatches": 2,
        "rule_overrides": "state=data+expert",
    },
    "remat": {"expert": 4, "data": 2, "remat": "full", "scan_layers": False},
}


@functools.cache
def reference(dispatch: str):
    return train(MODELS[dispatch], layout_of(zero_stage=0), steps=3)


CASES = [("dropless", name) for name in LAYOUTS] + [("capacity", "expert 4"), ("capacity", "pipeline, zero bubble")]


@pytest.mark.parametrize(("dispatch", "name"), CASES, ids=map(", ".join, CASES))
def test_losses_gradients_and_parameters_are_those_of_one_device(dispatch, name):
    fields = LAYOUTS[name]
    trained, wanted = train(MODELS[dispatch], layout_of(**fields), steps=3), reference(dispatch)
    np.testing.assert_allclose(trained.numbers, wanted.numbers, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), *(trained[1], wanted[1]))


def test_dropless_over_a_split_sequence():
    layout = layout_of(expert=2, context=2, data=2)
    np.testing.assert_allclose(run(MOE, layout), run(MOE, layout_of(zero_stage=0)), rtol=1e-5)


def test_bfloat16_trains_under_experts_and_model():
    computed = run(MOE, layout_of(expert=2, model=2, data=2), compute="bfloat16")
    np.testing.assert_allclose(computed, run(MOE, layout_of(zero_stage=0), compute="bfloat16"), rtol=2e-2)


# --- the exchange alone -------------------------------------------------------------------------------------------


def arguments(skew: bool):
    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS, TOKENS, EMBED)).astype(np.float32)
    choices = np.argsort(random.random((ROWS, TOKENS, EXPERTS)), axis=-1)[..., :CHOICES]
    if skew:  # nearly all to the experts of one device, and some tokens to none
        choices = np.where(random.random((ROWS, TOKENS, 1)) < 0.9, [[[6, 7]]], choices)
        choices = np.where(random.random((ROWS, TOKENS, 1)) < 0.1, EXPERTS, choices)
    shares = random.random((ROWS, TOKENS, CHOICES)).astype(np.float32)
    shapes = ((EXPERTS, EMBED, HIDDEN),) * 2 + ((EXPERTS, HIDDEN, EMBED),)
    return x, choices.astype(np.int32), shares, tuple(random.standard_normal(s).astype(np.float32) for s in shapes)


def by_hand(x, choices, shares, weights):
    """Every expert for every token, and all but the chosen ones thrown away."""
    gate, up, down = weights
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
    every = jnp.einsum("btef,efd->bted", hidden, down)
    return jnp.einsum("btke,btk,bted->btd", jax.nn.one_hot(choices, EXPERTS), shares, every)


def exchanged(layout: Layout, dispatch: Dispatch, choices):
    def function(x, shares, weights):
        with use_layout(layout):
            return run_experts(dispatch, FeedForward("silu", True), x, choices, shares, weights, AXES, ("w",) * 3)

    return function


@pytest.mark.parametrize("skew", [False, True], ids=["even", "nearly all to one device"])
@pytest.mark.parametrize("mesh", [{"expert": 4, "data": 2}, {"expert": 2, "model": 2, "context": 2}], ids=str)
def test_no_token_is_lost_however_many_rounds_it_takes(mesh, skew):
    x, choices, shares, weights = arguments(skew)
    layout = layout_of(**mesh)
    function = exchanged(layout, Dispatch(EXPERTS, 1.0, dropless=True), choices)
    if skew:  # the fullest expert gets more than two rounds hold
        assert np.sum(choices == 6) > 1.5 * x.shape[0] * x.shape[1] * CHOICES / EXPERTS
    d_y = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)

    def both(f):
        y, pull = jax.vjp(f, x, shares, weights)
        return y, *pull(d_y)

    computed = jax.jit(lambda: both(lambda *a: function(*a)[0]))()
    wanted = both(lambda x, shares, weights: by_hand(x, choices, shares, weights))
    for a, e in zip(jax.tree.leaves(computed), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5 * np.abs(e).max())


@pytest.mark.parametrize("dropless", [True, False], ids=["dropless", "capacity"])
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_all_to_alls_carry_the_slots_and_nothing_else(dropless, factor):
    """Tokens to the experts and back, forward; tokens again, gradients there and back, backward: five activations."""
    x, choices, shares, weights = arguments(skew=False)
    layout = layout_of(expert=4, data=2)
    function = exchanged(layout, Dispatch(EXPERTS, factor, dropless=dropless), choices)

    def step(x, shares, weights):
        y, pull = jax.vjp(lambda *a: function(*a)[0], x, shares, weights)
        return y, *pull(y)

    hlo = jax.jit(step).lower(x, shares, weights).compile().as_text()
    found = collectives(hlo, layout.mesh)
    sent = [c for c in found if c.kind == "all-to-all"]
    share = TOKENS * CHOICES / EXPERTS  # of an expert in a row; a device has one row
    slots = EXPERTS * math.ceil(share * factor)
    if dropless:  # and once the loop of further rounds
        slots += EXPERTS * math.ceil(share * LATER_ROUNDS)
    assert {c.mesh_axes for c in sent} == {("expert",)}
    of_tokens = sum(c.bytes for c in sent if c.shape[-1] == EMBED)
    assert of_tokens == 5 * slots * EMBED * 4
    others = sum(c.bytes for c in sent if c.shape[-1] != EMBED)
    assert others == 3 * slots * 4  # the tokens' shares, there and there again, and their gradients back
    # Weights: each expert's gradient is summed over `data` alone.
    summed = [c for c in found if c.kind == "all-reduce" and c.bytes >= 4 * EMBED * HIDDEN]
    assert {c.mesh_axes for c in summed} == {("data",)}


@pytest.mark.parametrize(
    ("mesh", "activations"),
    [
        ({"expert": 4, "data": 2}, 5),
        ({"expert": 2, "model": 2, "data": 2}, 5),  # each of the devices along `model` sends whole activations
        ({"pipeline": 2, "expert": 2, "data": 2}, 5 + 2),  # a stage runs its layers again before the backward pass
    ],
    ids=str,
)
def test_all_to_all_volume_of_a_train_step(mesh, activations):
    """That of the formula: layers x microbatches x activations, in the dtype of compute."""
    layout = layout_of(**mesh, num_microbatches=2)
    found = collectives(lowered(MOE, layout).compile().as_text(), layout.mesh, branch_runs=2)
    rows = BATCH // 2 // layout.size("batch")
    share = rows * LENGTH * MOE.experts_per_token / MOE.num_experts
    slots = MOE.num_experts * (math.ceil(share * MOE.capacity_factor) + math.ceil(share * LATER_ROUNDS))
    layers = MOE.num_layers // mesh.get("pipeline", 1)
    sent = [c for c in found if c.kind == "all-to-all" and c.shape[-1] == MOE.embed_dim]
    assert {c.mesh_axes for c in sent} == {("expert",)}
    assert sum(c.bytes * c.runs for c in sent) == layers * 2 * activations * slots * MOE.embed_dim * 4


def test_experts_are_split_over_what_splits_the_batch_alone():
    layout = layout_of(model=2, rule_overrides="experts=model,mlp=none")
    with pytest.raises(UserError, match="split experts over model, which must be among the mesh axes that split"):
        x, choices, shares, weights = arguments(skew=False)
        exchanged(layout, Dispatch(EXPERTS, 1.0, dropless=True), choices)(x, shares, weights)


def test_parameters_of_experts_lie_on_their_devices():
    spec, *_ = parts(MOE)
    layout = layout_of(expert=4, data=2, zero_stage=0)
    kernel = spec.parameters["layers.mlp.up.kernel"]
    assert layout.spec(kernel.axes, kernel.shape) == jax.P(None, "expert", None, None)
