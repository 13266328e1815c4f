"""Loss of texts in windows against the definition, token by token."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.generate import score as score_module
from jaxllm.generate.score import score, score_each

TEXTS = ["却说曹操引兵追赶，玄德大惊。" * 6, "the quick brown fox jumps over the lazy dog", "dog"]


def definition(run, texts, length, overlap) -> tuple[float, int]:
    """Sum of -log p of every token but the first of its document, each window of a document run alone, float64."""
    model = run.spec.merge(run.weights)
    logits = jax.jit(lambda tokens: model.head.logits(model(tokens)))
    nats, count = 0.0, 0
    for text in texts:
        ids = [run.tokenizer.bos_id, *run.tokenizer.encode(text), run.tokenizer.eos_id]
        start, done = 0, 1
        while done < len(ids):
            window = ids[start : start + length]
            padded = np.array([window + [0] * (length - len(window))], np.int32)
            scores = np.asarray(logits(padded), np.float64)[0]
            log_z = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
            for at in range(done, start + len(window)):
                nats += log_z[at - start - 1] - scores[at - start - 1, ids[at]]
                count += 1
            done = start + len(window)
            start = done - overlap
    return nats, count


def test_rows_are_no_longer_than_the_longest_text(run, monkeypatch):
    """A model of a long context that says nothing of rows is not asked for them in vain."""
    lengths, windows = [], score_module.EvaluationWindows

    def noted(starts, length, overlap, places):
        lengths.append(length)
        return windows(starts, length, overlap, places)

    monkeypatch.setattr(score_module, "EvaluationWindows", noted)
    data = dataclasses.replace(run.config.data, length=0)
    unsaid = run._replace(config=dataclasses.replace(run.config, data=data))
    short = score(unsaid, ["dog"])
    assert lengths == [16]
    np.testing.assert_allclose(short.nats, definition(run, ["dog"], 16, 8)[0], rtol=1e-5)


@pytest.mark.parametrize(("length", "overlap", "batch_size"), [(16, 0, 16), (16, 3, 2), (64, 0, 3)])
def test_score_is_the_definition(run, length, overlap, batch_size):
    result = score(run, TEXTS, length=length, overlap=overlap, batch_size=batch_size)
    nats, count = definition(run, TEXTS, length, overlap or length // 2)
    assert result.tokens == count
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.documents == 3
    assert result.characters == sum(map(len, TEXTS))
    assert result.bytes == sum(len(text.encode()) for text in TEXTS)
    assert result.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert result.bits_per_character == pytest.approx(nats / math.log(2) / result.characters, rel=1e-5)
    assert result.bits_per_byte < result.bits_per_character


def test_groups_are_scored_each_and_add_up(run):
    first, second = score_each(run, [TEXTS[:1], TEXTS[1:]], length=16)
    assert first.nats == pytest.approx(score(run, TEXTS[:1], length=16).nats, rel=1e-5)
    assert second.nats == pytest.approx(score(run, TEXTS[1:], length=16).nats, rel=1e-5)
    total, together = first + second, score(run, TEXTS, length=16)
    assert total.nats == pytest.approx(together.nats, rel=1e-5)
    assert (total.tokens, total.characters, total.bytes) == (together.tokens, together.characters, together.bytes)
    with pytest.raises(UserError, match="no text"):
        score_each(run, [TEXTS, []])


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        (TEXTS, {"length": 65}, "length=65 must be from 2 to the model's context, 64"),
        (TEXTS, {"length": 8, "overlap": 8}, "overlap=8 must be from 1 to 7"),
        ([], {}, "no text to evaluate"),
    ],
)
def test_what_cannot_be_scored(run, texts, options, says):
    with pytest.raises(UserError, match=says):
        score(run, texts, **options)
