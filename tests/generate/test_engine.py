"""Prompts in, text out: stops, budgets, batches, streaming."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxllm.errors import UserError
from jaxllm.generate.engine import Engine
from jaxllm.generate.sampling import Sampling
from jaxllm.model.spec import model_spec

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def engine(run):
    return Engine(run)


def test_text_is_that_of_the_tokens_and_streams_in_parts(engine):
    shown: dict[int, str] = {0: "", 1: ""}

    def on_text(row: int, text: str) -> None:
        assert text
        shown[row] += text

    done = engine.generate(["却说曹操", "the quick"], 20, Sampling(1.5), seed=3, on_text=on_text)
    for row, completion in enumerate(done):
        assert completion.finish_reason in ("length", "stop")
        ended = completion.tokens[-1] == engine.tokenizer.eos_id
        assert len(completion.tokens) == 20 or ended
        assert completion.text == engine.tokenizer.decode(completion.tokens) == shown[row]
    assert done[0].prompt == "却说曹操"


def test_rows_of_the_vocabulary_that_no_token_has_are_never_drawn(run, engine):
    """The same model with more rows than the tokenizer has tokens, each of them larger than those of any token."""
    tokens = run.tokenizer.vocab_size
    table = run.weights["embedding"]["table"]
    weights = run.weights | {"embedding": {"table": jnp.concatenate([table, 30 * table, -30 * table])}}
    spec = model_spec(dataclasses.replace(run.spec.config, vocab_size=3 * tokens))
    wide = Engine(run._replace(spec=spec, weights=weights))
    prompts = ["却说曹操", "the quick", "dog", "fox"]
    assert wide.generate(prompts, 10, GREEDY) == engine.generate(prompts, 10, GREEDY)
    settings = [Sampling(2.0), Sampling(1.5, top_k=2 * tokens), Sampling(3.0, top_p=0.99), Sampling(1.0, min_p=0.01)]
    drawn = wide.generate(prompts, 20, settings)
    assert max(token for completion in drawn for token in completion.tokens) < tokens


def test_a_batch_is_its_rows(engine):
    prompts = ["却说曹操", "the quick brown fox", "dog"]
    together = engine.generate(prompts, 10, GREEDY)
    assert [engine.generate([prompt], 10, GREEDY)[0] for prompt in prompts] == together


def test_a_stop_text_ends_the_row_and_is_not_shown(engine):
    (free,) = engine.generate(["the quick"], 20, GREEDY)
    stop = free.text[6:8]
    (stopped,) = engine.generate(["the quick"], 20, GREEDY, stop=["never said 7", stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert len(stopped.tokens) < len(free.tokens)


def test_an_end_of_text_token_ends_the_row(engine, monkeypatch):
    (free,) = engine.generate(["the quick"], 20, GREEDY)
    monkeypatch.setattr(engine.tokenizer, "eos_id", free.tokens[4])
    (stopped,) = engine.generate(["the quick"], 20, GREEDY)
    first = free.tokens.index(free.tokens[4])
    assert (stopped.finish_reason, stopped.tokens) == ("stop", free.tokens[: first + 1])


def test_any_end_token_ends_the_row(engine, monkeypatch):
    (free,) = engine.generate(["the quick"], 20, GREEDY)
    ends = frozenset({engine.tokenizer.eos_id, free.tokens[2], free.tokens[4]})
    monkeypatch.setattr(type(engine.tokenizer), "end_ids", ends)
    (stopped,) = engine.generate(["the quick"], 20, GREEDY)
    first = min(free.tokens.index(free.tokens[i]) for i in (2, 4))
    assert (stopped.finish_reason, stopped.tokens) == ("stop", free.tokens[: first + 1])
    assert stopped.text == engine.tokenizer.decode(free.tokens[:first])  # but none of its own


def test_a_template_brings_its_own_special_tokens(engine):
    tokenizer, prompt = engine.tokenizer, "<s>the quick</s>"
    templated = [tokenizer.bos_id, *tokenizer.encode("the quick"), tokenizer.eos_id]
    assert engine.encode(prompt, special=True) == templated
    assert engine.count_tokens(prompt, special=True) == len(templated)
    assert engine.encode(prompt)[0] == tokenizer.bos_id not in engine.encode(prompt)[1:]
    of_template, of_text = (engine.generate([prompt], 8, GREEDY, special=special)[0] for special in (True, False))
    assert of_template.tokens != of_text.tokens


def test_the_context_is_filled_to_its_last_token_and_no_further(engine):
    prompt = "the quick brown fox jumps"
    used = engine.count_tokens(prompt)
    long, short = engine.generate([prompt, "the"], 1000, Sampling(2.0), seed=1)
    for completion, tokens in ((long, used), (short, engine.count_tokens("the"))):
        if completion.finish_reason == "context":
            assert len(completion.tokens) == engine.max_length - tokens
        else:
            assert completion.tokens[-1] == engine.tokenizer.eos_id
    assert "context" in (long.finish_reason, short.finish_reason)


@pytest.mark.parametrize(
    ("prompts", "new", "says"),
    [
        ([], 5, "no prompt"),
        (["a"], 0, "max_new_tokens=0 must be 1 or more"),
        (["曹" * 200], 5, "but the model's context is 64"),
    ],
)
def test_what_cannot_be_generated(engine, prompts, new, says):
    with pytest.raises(UserError, match=says):
        engine.generate(prompts, new)


def test_an_empty_prompt_begins_a_document(engine, monkeypatch):
    assert engine.encode("") == [engine.tokenizer.bos_id]
    monkeypatch.setattr(engine.tokenizer, "bos_id", None)
    with pytest.raises(UserError, match="the prompt is empty"):
        engine.encode("")
