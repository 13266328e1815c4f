"""What an evaluation counts, and how it computes it."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxllm.model import attention_backends
from jaxllm.train.train_step import make_eval_step
from tests.layout.runs import FLOAT32, LLAMA, STEPS, Shape, make_batch, parts
from tests.model import reference

MODEL = dataclasses.replace(LLAMA, z_loss=0.5)
LAYOUT = Shape(1, 1, 1, 0).layout()


def evaluated():
    spec, _, _, first = parts(MODEL)
    batch = make_batch(spec, 0, LAYOUT)
    return make_eval_step(STEPS["pretrain"], spec, FLOAT32, LAYOUT)(first, batch)[:2], first.params, batch


def test_evaluation_is_in_nats_of_the_text():
    """No z-loss, which is large here, and no dropout."""
    (nats, tokens), params, batch = evaluated()
    exact = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    tokens_read, positions, segments, counted = jax.device_get(batch)
    config = dataclasses.replace(MODEL, z_loss=0.0)
    assert nats == pytest.approx(reference.loss(exact, config, tokens_read, positions, segments, counted), rel=1e-5)
    assert tokens == counted[:, 1:].sum()


def test_evaluation_may_use_the_kernel_that_dropout_keeps_training_from(monkeypatch):
    """The backend is chosen for attention without dropout, as the check at the start of a run takes it."""
    rates = []
    monkeypatch.setattr(
        attention_backends, "choose_backend", lambda *_, compute, dropout, pattern: rates.append(dropout) or "xla"
    )
    evaluated()
    assert MODEL.attention_dropout > 0 and set(rates) == {0.0}
