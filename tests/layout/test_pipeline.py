"""The executor: what it keeps, what it sends, what it does on every tick."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxllm.data.batch import Batch
from jaxllm.layout.collectives import collectives
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layers import run_layers
from jaxllm.layout.layout import Layout, make_layout, use_layout
from jaxllm.layout.pipeline import run_pipeline
from jaxllm.layout.schedules import SCHEDULES, Action, make_schedule
from jaxllm.model.head import Loss
from jaxllm.steps import STEPS
from jaxllm.train.state import abstract_state
from jaxllm.train.train_step import make_eval_step, make_train_step
from tests.layout.runs import FLOAT32, LLAMA, make_batch, parts

STAGES, LENGTH = 4, 64
MODEL = dataclasses.replace(
    LLAMA, num_layers=8, embed_dim=64, max_length=LENGTH, dropout=0.0, attention_dropout=0.0, num_kv_heads=8
)
VIRTUAL = {name: 2 if name == "interleaved" else 1 for name in SCHEDULES}
INPUT_BYTES = 2 * LENGTH * MODEL.embed_dim * 4  # of a microbatch of two rows a device


def pipeline(schedule: str, num_microbatches: int, **fields) -> Layout:
    mesh = {name: fields.pop(name) for name in ("data", "model", "replica") if name in fields} or {"data": 2}
    layers = LayoutConfig(
        schedule=schedule, virtual_stages=VIRTUAL[schedule], num_microbatches=num_microbatches, **fields
    )
    mesh = MeshConfig(**{"pipeline": STAGES, "data": 1} | mesh)
    devices = STAGES * mesh.data * mesh.model * mesh.replica
    return make_layout(mesh, layers, devices=jax.devices()[:devices])


@functools.cache
def compiled(layout: Layout):
    """The train step for two rows a microbatch and data shard."""
    spec, optimizer, schedule, _ = parts(MODEL)
    place = NamedSharding(layout.mesh, layout.spec(("batch", None)))
    rows = 2 * layout.num_microbatches * layout.size("batch")
    int32, boolean = (jax.ShapeDtypeStruct((rows, LENGTH), dtype, sharding=place) for dtype in (np.int32, bool))
    step = make_train_step(STEPS["pretrain"], spec, optimizer, schedule, FLOAT32, layout)
    state = abstract_state(spec, optimizer, layout)
    return step.trace(state, Batch(int32, int32, int32, boolean)).lower().compile()


def temporary(schedule: str, num_microbatches: int) -> int:
    return compiled(pipeline(schedule, num_microbatches)).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("schedule", ["1f1b", "1f1b_aligned", "interleaved", "zero_bubble"])
def test_memory_does_not_grow_with_the_microbatches(schedule):
    """Their papers bound what is in flight by the stages; 1F1B at 64 microbatches is allowed 1.02 times that at 8."""
    assert temporary(schedule, 64) <= 1.02 * temporary(schedule, 8)


def test_gpipe_keeps_an_input_a_microbatch():
    assert temporary("gpipe", 64) - temporary("gpipe", 8) >= 56 * INPUT_BYTES
    assert temporary("gpipe", 64) > 1.3 * temporary("1f1b", 64)


def test_zero_bubble_takes_the_memory_of_1f1b():
    """Qi et al. 2023, ZB-H1: but for gradients of outputs, held until the weights' gradients are made from them."""
    assert temporary("zero_bubble", 64) <= 1.15 * temporary("1f1b", 64)


def test_interleaved_stays_within_the_memory_of_its_paper():
    """Narayanan et al. 2021, section 2.2: 1 + (P-1)/(Pv) times that of 1F1B."""
    assert temporary("interleaved", 64) <= (1 + (STAGES - 1) / (STAGES * 2)) * temporary("1f1b", 64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_send_one_activation_a_tick_and_direction(schedule):
    layout = pipeline(schedule, 8)
    ticks = make_schedule(schedule, STAGES, 8, VIRTUAL[schedule]).num_ticks
    found = collectives(compiled(layout).as_text(), layout.mesh)
    permuted = [c for c in found if c.kind == "collective-permute" and c.runs > 1]
    assert [(c.shape, c.mesh_axes, c.runs) for c in permuted] == [
        ((2, LENGTH, MODEL.embed_dim), ("pipeline",), ticks)
    ] * 2
    # Nothing else between the stages but once a step: the sum of what the ends have, and virtual stages being dealt.
    others = [c for c in found if "pipeline" in c.mesh_axes and c not in permuted]
    assert all(c.runs == 1 for c in others), others
    if schedule != "interleaved":
        assert not any(c.kind in ("all-to-all", "collective-permute") for c in others)


@pytest.mark.parametrize("zero_stage", range(4))
def test_gradients_are_reduced_as_zero_says(zero_stage):
    """Once a step at stages 0 and 1, each microbatch at 2 and 3, when a shard of the accumulator is all there is."""
    layout = pipeline("1f1b", 4, zero_stage=zero_stage)
    found = collectives(compiled(layout).as_text(), layout.mesh)
    big = MODEL.embed_dim * MODEL.embed_dim * 4
    runs = Counter(c.runs > 1 for c in found if "data" in c.mesh_axes and "reduce" in c.kind and c.bytes >= big)
    assert runs[True] > 0 if zero_stage >= 2 else not runs[True], runs


def toy(schedule: str):
    """A pipeline of eight small layers, jitted: (params, batch) -> sums; with the params, the batch and the loss."""
    layout = pipeline(schedule, 4, data=1)

    def layer(x, number, w):
        return jnp.tanh(x @ w), None

    def loss(weights, microbatch):
        x, _ = run_layers(layer, microbatch @ weights["ends"], weights["layers"], 8)
        return Loss((x * x).sum(), jnp.float32(1))

    params = {"ends": jnp.eye(3), "layers": jnp.ones((8, 3, 3)) / 3}
    axes = {"ends": (None, "embed"), "layers": ("layers", "embed", "mlp")}

    @jax.jit
    def run(params, batch):
        with use_layout(layout):
            arguments = {"num_microbatches": 4, "compute": jnp.dtype("float32")}
            return run_pipeline(layout, loss, params, axes, batch, **arguments)

    return run, params, jnp.arange(24.0).reshape(4, 2, 3) / 24, loss


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_executed_is_the_table(schedule):
    """The counter sits in the branches of the work: what each stage did is the table, and right."""
    run, params, batch, loss = toy(schedule)
    sums = run(params, batch)
    table = make_schedule(schedule, STAGES, 4, VIRTUAL[schedule])
    expected = np.array([np.bincount(column, minlength=len(Action)) for column in table.action.T])
    np.testing.assert_array_equal(sums.executed, expected)
    expected, gradients = jax.value_and_grad(lambda p: sum(loss(p, m)[0] for m in batch))(params)
    np.testing.assert_allclose(sums.total, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), sums.gradients, gradients)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_an_idle_tick_computes_nothing(schedule):
    """In the compiled program every matmul, and every loop over layers, lies in a branch that not all stages take."""
    run, params, batch, _ = toy(schedule)
    callees, matmuls, computation = {}, set(), ""
    for line in run.lower(params, batch).compile().as_text().splitlines():
        if line and not line[0].isspace():
            computation = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
        branches = re.search(
            r"(?:branch_computations=\{([^}]*)\}|true_computation=([^,]*), false_computation=([^,]*))", line
        )
        called = re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)", line)
        callees.setdefault(computation, set()).update((name, False) for name in called)
        if branches:
            names = re.findall(r"[\w.\-]+", " ".join(filter(None, branches.groups())))
            callees[computation].update((name, True) for name in names)
        if " dot(" in line:
            matmuls.add(computation)
    unconditional, waiting = set(), [name for name in callees if name.startswith("main")]
    assert matmuls and waiting and any(conditional for called in callees.values() for _, conditional in called)
    while waiting:
        name = waiting.pop()
        if name not in unconditional:
            unconditional.add(name)
            waiting += [callee for callee, conditional in callees.get(name, ()) if not conditional]
    assert not matmuls & unconditional


def test_evaluation_runs_forwards_alone():
    spec, _, _, first = parts(MODEL)
    small = dataclasses.replace(LLAMA, num_layers=8)
    spec, _, _, first = parts(small)
    layout = pipeline("1f1b", 4, model=2)
    single = make_layout(MeshConfig(data=1), LayoutConfig(), devices=jax.devices()[:1])
    found = make_eval_step(STEPS["pretrain"], spec, FLOAT32, layout)(first, make_batch(spec, 0, layout))
    expected = make_eval_step(STEPS["pretrain"], spec, FLOAT32, single)(first, make_batch(spec, 0, single))
    np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-6)


def test_the_program_does_not_grow_with_microbatches_or_layers():
    """But for the table, which is data: a row of a few numbers a tick."""

    def size(num_layers: int, num_microbatches: int) -> int:
        spec, optimizer, schedule, _ = parts(dataclasses.replace(MODEL, num_layers=num_layers))
        layout = pipeline("1f1b", num_microbatches)
        place = NamedSharding(layout.mesh, layout.spec(("batch", None)))
        tokens = jax.ShapeDtypeStruct((2 * num_microbatches, LENGTH), np.int32, sharding=place)
        step = make_train_step(STEPS["pretrain"], spec, optimizer, schedule, FLOAT32, layout)
        traced = step.trace(abstract_state(spec, optimizer, layout), Batch(tokens, tokens, tokens, tokens))
        return sum(line.count(" = ") for line in str(traced.jaxpr).splitlines())

    assert size(8, 4) == size(8, 32) == size(32, 4)


def test_a_loss_without_layers_is_refused():
    layout = pipeline("1f1b", 4)
    params, axes = {"layers": jnp.ones((4, 3, 3))}, {"layers": ("layers", "embed", "mlp")}

    @jax.jit
    def run(params):
        arguments = {"num_microbatches": 4, "compute": jnp.dtype("float32")}
        return run_pipeline(layout, lambda w, m: Loss(m.sum(), m.sum()), params, axes, jnp.ones((8, 2)), **arguments)

    with use_layout(layout), pytest.raises(TypeError, match="never runs its layers"):
        run(params)
