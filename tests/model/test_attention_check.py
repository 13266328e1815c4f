"""A run does not start with an attention backend that differs from the formula."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import CONTEXT_ATTENTION, make_layout
from jaxllm.model import attention_backends, attention_check
from jaxllm.model.attention_check import check_backend, packed_segments
from jaxllm.model.config import ModelConfig

MODEL = ModelConfig(num_layers=1, embed_dim=8, num_heads=4, num_kv_heads=2, head_dim=4).resolved(16)
_flash = attention_backends._flash


def one_device(**fields):
    return make_layout(MeshConfig(data=1), LayoutConfig(**fields), devices=jax.devices()[:1])


@pytest.fixture
def sabotaged(monkeypatch):
    """Puts another function in place of the xla backend; nothing compiled before or after is used."""

    def replace(backend):
        monkeypatch.setattr(attention_backends, "_flash", backend)
        attention_check._differences.clear_cache()

    yield replace
    attention_check._differences.clear_cache()


def test_a_batch_of_several_documents():
    segments = np.asarray(packed_segments(3, 128))
    for row in segments:
        assert sorted(set(row)) == [0, 1, 2, 3]
        assert (row[:64] != row[63]).any() and row[63] == row[64]  # one document lies across two blocks of queries
    assert not np.array_equal(segments[0], segments[1])


def test_xla_is_as_the_formula():
    said = check_backend(one_device(), MODEL, "float32")
    assert said.startswith("attention: xla, checked on a packed batch (largest difference ")
    assert 0 < float(said.split()[-1].rstrip(")")) < 1e-5


def test_on_a_mesh_in_bfloat16():
    """More parts than key heads, and rows on every device."""
    layout = make_layout(MeshConfig(data=2, model=4), LayoutConfig(attention="xla"))
    assert "attention: xla, checked" in check_backend(layout, MODEL, "bfloat16")


@pytest.mark.parametrize("variant", CONTEXT_ATTENTION)
def test_where_the_sequence_is_split(variant):
    layout = make_layout(MeshConfig(data=1, context=4, model=2), LayoutConfig(context_attention=variant))
    said = check_backend(layout, MODEL, "float32")
    assert said.startswith(f"attention: xla, {variant} over context=4, checked on a packed batch")


def test_a_ring_that_ignores_segment_ids_is_refused(monkeypatch):
    ring = attention_backends.context_attention
    monkeypatch.setattr(attention_backends, "context_attention", lambda *args: ring(*args[:-2], None, None))
    attention_check._differences.clear_cache()
    layout = make_layout(MeshConfig(data=2, context=4), LayoutConfig())
    with pytest.raises(UserError, match=r"backend 'xla, ring' differs .* --config.layout.context_attention=all_gather"):
        check_backend(layout, MODEL, "float32")
    attention_check._differences.clear_cache()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_backend_that_ignores_segment_ids_is_refused(sabotaged, compute):
    sabotaged(lambda rate, query, key, value, segment_ids, rows: _flash(rate, query, key, value, None, rows))
    with pytest.raises(
        UserError, match=r"backend 'xla' differs from the reference .* Use --config.layout.attention=cudnn"
    ):
        check_backend(one_device(), MODEL, compute)


@pytest.mark.parametrize(
    ("words", "forgotten"),
    [({"sliding_window": 4096}, {"window": 0}), ({"positions": "alibi"}, {"alibi_heads": 0})],
    ids=["window", "alibi"],
)
def test_a_backend_that_ignores_the_pattern_is_refused(sabotaged, words, forgotten):
    model = dataclasses.replace(MODEL, **words)
    assert "attention: xla" in check_backend(one_device(), model, "float32")

    def forgets(blocks, *rest):
        return _flash(dataclasses.replace(blocks, pattern=dataclasses.replace(blocks.pattern, **forgotten)), *rest)

    sabotaged(forgets)
    with pytest.raises(UserError, match=r"backend 'xla' differs"):
        check_backend(one_device(), model, "float32")


def test_a_backend_with_another_gradient_is_refused(sabotaged):
    def no_gradient_of_keys(rate, query, key, value, segment_ids, rows):
        return _flash(rate, query, jax.lax.stop_gradient(key), value, segment_ids, rows)

    sabotaged(no_gradient_of_keys)
    with pytest.raises(UserError, match=r"output by \d\.\de-0[678], gradients by 1\.0e\+00"):
        check_backend(one_device(), MODEL, "float32")


def test_a_backend_that_does_not_run_is_refused(monkeypatch):
    """Nothing else is tried in its place."""

    def chosen(name, platform, **_):
        return "cudnn"

    def fails(*arguments):
        raise NotImplementedError("packed offsets need a Hopper GPU")

    monkeypatch.setattr(attention_check, "choose_backend", chosen)
    monkeypatch.setattr(attention_backends, "cudnn_attention", fails)
    with pytest.raises(UserError, match="'cudnn' does not run here: packed offsets need a Hopper GPU\nUse --config"):
        check_backend(one_device(), MODEL, "bfloat16")


def test_two_backends_in_use_are_both_checked(monkeypatch):
    """Dropout on the attention probabilities keeps training from the fused kernel, not evaluation."""
    checked = []
    monkeypatch.setattr(attention_check, "choose_backend", lambda *_, dropout, **__: "xla" if dropout else "cudnn")
    monkeypatch.setattr(attention_check, "_checked", lambda layout, *_: checked.append(layout.attention) or 1e-3)
    said = check_backend(one_device(), dataclasses.replace(MODEL, attention_dropout=0.1), "bfloat16")
    assert checked == ["xla", "cudnn"]
    assert said.startswith("attention: xla, checked") and "; cudnn without dropout, checked" in said
