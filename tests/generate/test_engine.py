"""Prompts in, text out: stops, budgets, batches, streaming."""

import pytest

from jaxllm.errors import UserError
from jaxllm.generate.engine import Engine
from jaxllm.generate.sampling import Sampling

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
