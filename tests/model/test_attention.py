"""The attention backends against a softmax written out in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout, use_layout
from jaxllm.model import attention_backends, attention_check, attention_cudnn
from jaxllm.model.attention_backends import attend, choose_backend, query_blocks
from jaxllm.model.attention_cudnn import document_offsets
from jaxllm.model.attention_pattern import CAUSAL, Pattern, alibi_slopes
from jaxllm.model.dropout import DropoutKey, keep_mask
from tests.model.attention_reference import assert_close, naive

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 11, 4, 12
SEGMENTS = np.array([[1] * 4 + [2] * 5 + [0] * 2, [3] * 8 + [1] * 3], np.int32)
RATE = 0.3


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(attention_backends, "MIN_QUERY_BLOCK", 4)


@functools.cache
def inputs(kv_heads: int):
    """query, key, value and a gradient of the output."""
    random = np.random.default_rng(kv_heads)
    sizes = (HEADS, kv_heads, kv_heads, HEADS)
    return tuple(random.standard_normal((BATCH, LENGTH, size, HEAD_DIM)).astype(np.float32) for size in sizes)


# The slopes of ALiBi for 4 heads are given in the paper's section 3 by their ratio, 2^(-8/4).
PATTERNS = {
    "window": (Pattern(window=3), {"window": 3}),
    "alibi": (Pattern(alibi_heads=4), {"slopes": [1 / 4, 1 / 16, 1 / 64, 1 / 256]}),
    "bidirectional": (Pattern(causal=False), {"causal": False}),
    "bidirectional window": (Pattern(causal=False, window=4), {"causal": False, "window": 4}),
}


def computed(query, key, value, d_output, segments, dropout_key=None, pattern=CAUSAL):
    """The same four by the backend."""

    @jax.jit
    def run(query, key, value, d_output):
        drops = {"dropout_rate": RATE if dropout_key else 0.0, "dropout_key": dropout_key}
        output, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments, pattern, **drops), query, key, value)
        return output, *pull(d_output)

    return run(query, key, value, d_output)


@pytest.mark.parametrize(
    ("kv_heads", "segments"),
    [(4, SEGMENTS), (2, SEGMENTS), (2, None), (1, SEGMENTS)],
    ids=["mha", "gqa", "whole", "mqa"],
)
def test_xla(kv_heads, segments):
    assert len(query_blocks(LENGTH)) == 3
    assert_close(computed(*inputs(kv_heads), segments), naive(*inputs(kv_heads), segments))


@pytest.mark.parametrize(("pattern", "meaning"), PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("segments", [SEGMENTS, None], ids=["packed", "whole"])
def test_patterns(pattern, meaning, segments):
    assert_close(computed(*inputs(2), segments, pattern=pattern), naive(*inputs(2), segments, **meaning))


def test_alibi_slopes_of_six_heads():
    assert alibi_slopes(6).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]


@pytest.mark.parametrize("segments", [SEGMENTS, None], ids=["packed", "whole"])
@pytest.mark.parametrize(
    ("kv_heads", "model", "rules"),
    [
        (4, 2, ""),
        (2, 2, ""),
        (2, 4, ""),
        (2, 2, "kv_heads=none"),
        (2, 2, "heads=none"),
        (1, 2, "kv_heads=none"),
        (2, 2, "heads=none,kv_heads=none,head_dim=model"),
    ],
)
def test_cudnn_gives_each_device_the_key_heads_of_its_query_heads(monkeypatch, kv_heads, model, rules, segments):
    """On CPU, with the formula in place of the kernel on each device."""

    def local(pattern, query, key, value, segment_ids=None):
        whole = jnp.zeros(query.shape[:2], jnp.int32)
        return attention_check.reference(query, key, value, whole if segment_ids is None else segment_ids)

    monkeypatch.setattr(attention_cudnn, "_local", local)
    monkeypatch.setattr(attention_check, "constrain", lambda x, *_: x)
    config = LayoutConfig(attention="cudnn", rule_overrides=rules)
    layout = make_layout(MeshConfig(data=2, model=model), config, devices=jax.devices()[: 2 * model])
    with use_layout(layout):
        assert_close(computed(*inputs(kv_heads), segments), naive(*inputs(kv_heads), segments))


def test_query_blocks_cover_every_query_once(monkeypatch):
    for length in (1, 3, 4, 5, 11, 33, 1000):
        blocks = query_blocks(length)
        assert [t for start, end in blocks for t in range(start, end)] == list(range(length))
        assert len(blocks) <= attention_backends.MAX_QUERY_BLOCKS
    monkeypatch.undo()
    assert query_blocks(64) == [(0, 64)]


def test_large_logits_stay_finite():
    query, key, value, d_output = inputs(4)
    actual = computed(query * 100, key, value, d_output, SEGMENTS)
    assert all(np.isfinite(a).all() for a in actual)
    assert_close(actual, naive(query * 100, key, value, d_output, SEGMENTS), 1e-5)


def test_masks_are_not_moved_out_of_a_loop_over_layers():
    """There all of them, whole, would be in memory at once."""
    query, key, value, _ = inputs(2)

    def loss(query, key, value, segments):
        layer = lambda query, _: (attend(query, key, value, segments), None)  # noqa: E731
        return jax.lax.scan(layer, query, length=3)[0].sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value, SEGMENTS)
    outside = [out.aval for equation in program.eqns for out in equation.outvars]
    assert len(outside) > 3 and not any(aval.dtype == bool for aval in outside)


def test_dropout():
    """What is kept is read off by attending to unit vectors; with that, values and gradients are the formula's."""
    key = DropoutKey(jnp.array([7, 8], jnp.uint32))
    query, keys, value, d_output = inputs(2)
    unit = np.broadcast_to(np.eye(LENGTH, HEAD_DIM, dtype=np.float32)[None, :, None], value.shape)
    weights, *_ = computed(query, keys, unit, d_output, None, key)
    keep = np.asarray(weights).transpose(0, 2, 1, 3)[..., :LENGTH] > 0
    visible = np.tril(np.ones((LENGTH, LENGTH), bool))
    dropped = 1 - keep[:, :, visible].mean()
    assert abs(dropped - RATE) < 4 * np.sqrt(RATE * (1 - RATE) / keep[:, :, visible].size)
    assert_close(
        computed(query, keys, value, d_output, None, key), naive(query, keys, value, d_output, None, keep, RATE)
    )
    # The blocks take their parts of one mask, so how many there are does not matter.
    mask = keep_mask(key, [np.arange(size) for size in (LENGTH, HEADS, LENGTH)], RATE).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(keep[:, :, visible], np.asarray(mask)[:, :, visible])


def loop_over_documents(row, most):
    starts = [t for t in range(len(row)) if t == 0 or row[t] != row[t - 1]]
    ends = [*starts[1:], len(row)]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    offsets = [*starts, len(row)]
    return lengths + [-1] * (most - len(lengths)), offsets + [-1] * (most + 1 - len(offsets)), len(starts) <= most


@pytest.mark.parametrize("most", [2, 4, 11])
def test_document_offsets(most):
    rows = np.array([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11, [1, 2] * 5 + [0]][: 3 if most == 11 else 2], np.int32)
    lengths, offsets, fits = document_offsets(rows, most)
    expected = [loop_over_documents(row, most) for row in rows]
    assert fits == all(fit for *_, fit in expected)
    if fits:
        np.testing.assert_array_equal(lengths, [row for row, _, _ in expected])
        np.testing.assert_array_equal(offsets, [row for _, row, _ in expected])


def test_choose_backend():
    def choose(name, platform="gpu", compute="bfloat16", dropout=0.0, context=1):
        return choose_backend(name, platform, compute=compute, dropout=dropout, context=context)

    assert choose("auto") == choose("auto", compute="float16") == choose("cudnn") == "cudnn"
    assert choose("auto", "cpu") == choose("auto", compute="float32") == choose("auto", dropout=0.1) == "xla"
    assert choose("xla") == choose("auto", context=4) == "xla"
    with pytest.raises(UserError, match="'cudnn' does not attend over a sequence that is split in 4"):
        choose("cudnn", context=4)
    for wrong in ({"platform": "cpu"}, {"compute": "float32"}, {"dropout": 0.1}):
        with pytest.raises(
            UserError, match=r"needs a GPU .Hopper or later: .*, bfloat16 or float16 compute and attention_dropout=0"
        ):
            choose("cudnn", **wrong)
    with pytest.raises(UserError, match="Did you mean 'cudnn'"):
        choose("cuddn")
