"""A sequence split over devices: the numbers of one device, balanced work, a fraction of the memory, known traffic."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.layout.collectives import collectives
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import CONTEXT_ATTENTION, Layout, make_layout, use_layout
from jaxllm.layout.sequence import text_indices, to_device_order, to_text_order, token_order
from jaxllm.model import attention_backends
from jaxllm.model.attention_backends import KEY_AXES, QUERY_AXES, Blocks, attend
from jaxllm.model.attention_pattern import CAUSAL, Pattern
from jaxllm.model.dropout import DropoutKey, keep_mask
from tests.layout.runs import GPT2, Shape, make_batch, parts
from tests.model.attention_reference import assert_close, naive

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 32, 4, 8
RATE = 0.3
# Documents that begin and end inside chunks, at their ends, and that span several; padding.
SEGMENTS = np.array([[1] * 9 + [2] * 15 + [3] * 4 + [0] * 4, [1] * 4 + [2] * 28], np.int32)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(attention_backends, "MIN_QUERY_BLOCK", 4)


def layout_of(context: int, variant: str = "ring", **mesh: int) -> Layout:
    sizes = {"data": 1, "context": context, **mesh}
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return make_layout(MeshConfig(**sizes), LayoutConfig(context_attention=variant), devices=devices)


@functools.cache
def inputs(kv_heads: int):
    """query, key, value and a gradient of the output, in text order."""
    random = np.random.default_rng(kv_heads)
    sizes = (HEADS, kv_heads, kv_heads, HEADS)
    return tuple(random.standard_normal((BATCH, LENGTH, size, HEAD_DIM)).astype(np.float32) for size in sizes)


def attention(layout: Layout, segments, streams, pattern=CAUSAL):
    """(query, key, value, d_output) -> the output and the gradients of the first three, all in device order."""

    def run(query, key, value, d_output):
        with use_layout(layout):
            dropout = {"dropout_rate": RATE, "dropout_key": DropoutKey(streams)} if streams is not None else {}
            output, pull = jax.vjp(lambda *args: attend(*args, segments, pattern, **dropout), query, key, value)
            return output, *pull(d_output)

    return run


def expected(kv_heads: int, segments, streams):
    keep = None
    if streams is not None:
        indices = [np.arange(size) for size in (LENGTH, HEADS, LENGTH)]
        keep = np.asarray(keep_mask(DropoutKey(streams), indices, RATE)).transpose(0, 2, 1, 3)
    return naive(*inputs(kv_heads), segments, keep, RATE)


CASES = {  # context, model, variant, kv_heads, segments, dropout
    "ring": (4, 1, "ring", 2, SEGMENTS, False),
    "ring of two, dropout": (2, 2, "ring", 2, SEGMENTS, True),
    "ring of four, dropout": (4, 2, "ring", 4, SEGMENTS, True),
    "ring of eight, whole rows": (8, 1, "ring", 1, None, False),
    "ring, fewer key heads than parts": (4, 2, "ring", 1, SEGMENTS, False),
    "all_gather": (4, 2, "all_gather", 2, SEGMENTS, False),
    "all_gather of two, dropout": (2, 2, "all_gather", 1, SEGMENTS, True),
    "all_gather of eight": (8, 1, "all_gather", 4, SEGMENTS, True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_are_those_of_the_formula(case):
    context, model, variant, kv_heads, segments, dropout = case
    layout = layout_of(context, variant, model=model)
    order = token_order(layout, LENGTH)
    streams = jnp.array([7, 8], jnp.uint32) if dropout else None
    placed = None if segments is None else segments[:, order]
    computed = jax.jit(attention(layout, placed, streams))(*(a[:, order] for a in inputs(kv_heads)))
    wanted = expected(kv_heads, segments, streams)
    assert_close(computed, [a[:, order] for a in wanted], tolerance=1e-5)


@pytest.mark.parametrize(
    ("variant", "pattern", "meaning"),
    [
        ("ring", Pattern(window=7), {"window": 7}),
        ("ring", Pattern(alibi_heads=4), {"slopes": [1 / 4, 1 / 16, 1 / 64, 1 / 256]}),
        ("ring", Pattern(causal=False), {"causal": False}),
        ("all_gather", Pattern(causal=False), {"causal": False}),
    ],
    ids=["window", "alibi", "bidirectional", "bidirectional, all_gather"],
)
def test_patterns(variant, pattern, meaning):
    layout = layout_of(4, variant, model=2)
    order = token_order(layout, LENGTH)
    run = jax.jit(attention(layout, SEGMENTS[:, order], None, pattern))
    computed = run(*(a[:, order] for a in inputs(2)))
    wanted = naive(*inputs(2), SEGMENTS, **meaning)
    assert_close(computed, [a[:, order] for a in wanted], tolerance=1e-5)


@pytest.mark.parametrize("variant", CONTEXT_ATTENTION)
def test_inside_a_pipeline_where_other_stages_skip_it(variant):
    """On CPU a collective-permute there would wait for the stages that do not come."""
    layout = layout_of(2, variant, pipeline=2, model=2)
    order = token_order(layout, LENGTH)
    run = attention(layout.inside("pipeline"), jnp.array(SEGMENTS[:, order]), None)

    def stage(*args):
        skipped = lambda *args: (args[0], *args[:3])  # noqa: E731
        results = jax.lax.cond(jax.lax.axis_index("pipeline") == 1, run, skipped, *args)
        return tuple(a[None] for a in results)

    def program(*args):
        manual = {"mesh": layout.mesh, "axis_names": {"pipeline"}, "check_vma": False}
        return jax.shard_map(stage, in_specs=(P(),) * 4, out_specs=P("pipeline"), **manual)(*args)

    with jax.set_mesh(layout.mesh):
        computed = jax.jit(program)(*(a[:, order] for a in inputs(2)))
    wanted = expected(2, SEGMENTS, None)
    assert_close([a[1] for a in computed], [a[:, order] for a in wanted], tolerance=1e-5)


# --- the order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [2, 4, 8])
def test_device_order_and_back(context):
    layout = layout_of(context)
    tokens = np.random.default_rng(0).integers(0, 99, (BATCH, LENGTH, 3))

    @jax.jit
    def run(x):
        with use_layout(layout):
            placed = to_device_order(x)
            return placed, to_text_order(placed)

    placed, back = run(tokens)
    assert placed.sharding.is_equivalent_to(layout.sharding("batch", "length", None), 3)
    np.testing.assert_array_equal(placed, tokens[:, token_order(layout, LENGTH)])
    np.testing.assert_array_equal(back, tokens)
    chunk = LENGTH // (2 * context)
    first = np.asarray(placed.addressable_shards[0].data)
    np.testing.assert_array_equal(first, np.concatenate([tokens[:, :chunk], tokens[:, -chunk:]], axis=1))


def test_tokens_are_put_in_order_without_communication():
    layout = layout_of(4, model=2)

    def place(x):
        with use_layout(layout):
            return to_device_order(x)

    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=layout.sharding("batch", None))
    assert collectives(jax.jit(place).lower(tokens).compile().as_text(), layout.mesh) == []


def test_logits_are_in_text_order():
    spec, _, _, first = parts(GPT2)
    layout = Shape(1, 1, 1, context=4).layout()
    batch = make_batch(spec, 0, layout)

    def logits(layout, params, batch):
        with use_layout(layout):
            model = spec.merge(params)
            return model.head.logits(model(batch.tokens, batch.positions, batch.segment_ids))

    split = jax.jit(functools.partial(logits, layout))(first.params, batch)
    whole = jax.jit(functools.partial(logits, None))(first.params, jax.device_get(batch))
    np.testing.assert_allclose(split, whole, atol=1e-6)


# --- what it costs -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counted(Blocks):
    """Notes how many (query, key) pairs each block computes, by whether it is a device's own."""

    seen: tuple[list, list] = dataclasses.field(default=([], []), hash=False, compare=False)

    def forward(self, queries, keys, *, aligned):
        self.seen[aligned].append(queries.indices.size * keys.indices.size)
        return super().forward(queries, keys, aligned=aligned)

    def backward(self, queries, keys, gradient, *, aligned):
        self.seen[aligned].append(queries.indices.size * keys.indices.size)
        return super().backward(queries, keys, gradient, aligned=aligned)


@pytest.mark.parametrize("variant", CONTEXT_ATTENTION)
def test_every_device_computes_the_same_in_each_step(variant, monkeypatch):
    """The two branches of a step, keys from an earlier and from a later device, are equally large."""
    counted = Counted(0.0)
    monkeypatch.setattr(attention_backends, "Blocks", lambda rate, pattern: counted)
    jax.eval_shape(attention(layout_of(4, variant), None, None), *inputs(2))
    own, chunk = LENGTH // 4, LENGTH // 8
    others, mine = counted.seen
    assert set(others) == {own * chunk} and len(others) >= 4
    assert set(mine) == {own * own}


@pytest.mark.parametrize("context", [2, 4, 8])
def test_nothing_is_computed_that_the_mask_hides(context):
    """What the schedule computes of another device's keys is all visible, and with the own block it is all there is."""
    own, chunk = LENGTH // context, LENGTH // (2 * context)
    indices = [text_indices(device, context, own) for device in range(context)]
    visible = np.zeros((context, context), int)
    for me in range(context):
        for origin in range(context):
            sees = indices[me][:, None] >= indices[origin]
            visible[me, origin] = sees.sum()
            if origin < me:
                assert sees[:, :chunk].all() and not sees[:, chunk:].any()
            elif origin > me:
                assert sees[chunk:].all() and not sees[:chunk].any()
    assert len(set(visible.sum(1))) == 1 and visible.sum() == LENGTH * (LENGTH + 1) // 2


def compiled(layout: Layout, length: int, layers: int, gradients: bool = True):
    """The attention of some layers to one packed row, or its gradients too, compiled."""

    def loss(query, keys, values, segments):
        with use_layout(layout):
            layer = lambda query, kv: (attend(query, *kv, segments), None)  # noqa: E731
            return jnp.sum(jax.lax.scan(layer, query, (keys, values))[0] ** 2)

    run = jax.value_and_grad(loss, argnums=(0, 1, 2)) if gradients else loss
    shapes = [((), HEADS, QUERY_AXES), ((layers,), 2, (None, *KEY_AXES)), ((layers,), 2, (None, *KEY_AXES))]
    arguments = [
        jax.ShapeDtypeStruct((*stacked, 1, length, heads, HEAD_DIM), jnp.float32, sharding=layout.sharding(*axes))
        for stacked, heads, axes in shapes
    ]
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=layout.sharding("batch", "length"))
    return jax.jit(run).lower(*arguments, segments).compile()


def sent(layout: Layout, gradients: bool) -> dict[str, int]:
    """How often a layer sends arrays of the size of a device's keys, by kind; an all-gather counts once."""
    layers = 3
    found = collectives(compiled(layout, LENGTH, layers, gradients).as_text(), layout.mesh)
    of_keys = [c for c in found if c.shape[-2:] == (2, HEAD_DIM)]
    assert all(c.mesh_axes == ("context",) for c in of_keys)
    runs = {kind: sum(c.runs for c in of_keys if c.kind == kind) for kind in {c.kind for c in of_keys}}
    return {kind: number / layers for kind, number in runs.items()}


@pytest.mark.parametrize("context", [2, 4, 8])
def test_the_ring_sends_each_block_context_minus_1_times(context):
    """Keys and values: context - 1 each. In the backward pass again, and their gradients come home with one more."""
    layout = layout_of(context)
    assert sent(layout, gradients=False) == {"collective-permute": 2 * (context - 1)}
    if context == 4:
        backward = 2 * (context - 1) + 2 * context
        assert sent(layout, gradients=True) == {"collective-permute": 2 * (context - 1) + backward}


def test_all_gather_gathers_once_a_pass():
    layout = layout_of(4, "all_gather")
    assert sent(layout, gradients=False) == {"all-gather": 2}
    assert sent(layout, gradients=True) == {"all-gather": 4, "reduce-scatter": 2}


@pytest.mark.parametrize("variant", CONTEXT_ATTENTION)
def test_memory_falls_with_context(variant, monkeypatch):
    """XLA's own count of the peak on one device."""
    monkeypatch.undo()
    length = 2048

    def peak(layout: Layout) -> int:
        return compiled(layout, length, layers=1).memory_analysis().temp_size_in_bytes

    assert peak(layout_of(4, variant)) <= 0.30 * peak(layout_of(1))
