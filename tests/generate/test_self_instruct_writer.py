"""The writer of Self-Instruct: batches of one size, the chat template, and room in the context."""

import pytest

from jaxllm.data.chat_template import named_template
from jaxllm.generate.engine import Engine
from jaxllm.generate.sampling import Sampling
from jaxllm.generate.self_instruct import Prompt
from jaxllm.generate.self_instruct_writer import EngineWriter


@pytest.fixture
def engine(run):
    return Engine(run)


def test_writes_what_the_engine_does_in_batches_of_one_size(engine):
    writer = EngineWriter(engine, Sampling(), 6, batch_size=2)
    prompts = [Prompt(text, "9.") for text in ("the quick", "却说", "the lazy dog")]
    sizes, generate = [], engine.generate
    engine.generate = lambda texts, *given, **how: sizes.append(len(texts)) or generate(texts, *given, **how)
    written = writer.write(prompts, "\n17.", None)
    assert sizes == [2, 2]
    expected = generate([f"{prompt.request}\n9." for prompt in prompts], 6, Sampling(temperature=0), stop=("\n17.",))
    assert [one.text for one in written] == [one.text for one in expected]
    assert [one.whole for one in written] == [one.finish_reason == "stop" for one in expected]


def test_draws_by_the_seed_and_each_prompt_for_itself(engine):
    writer = EngineWriter(engine, Sampling(), 8, batch_size=1)
    same = [Prompt("the")] * 2
    one, other = writer.write(same, "\n", 3)
    assert one.text != other.text
    assert writer.write(same, "\n", 3) == [one, other] != writer.write(same, "\n", 4)


def test_stops(engine):
    text = EngineWriter(engine, Sampling(), 8, batch_size=1).write([Prompt("the")], "\n", None)[0].text
    for how in ({"stop": (text[2:4],)}, {}):
        writer = EngineWriter(engine, Sampling(), 8, batch_size=1, **how)
        (stopped,) = writer.write([Prompt("the")], "\n" if how else text[2:4], None)
        assert stopped == (text[: text.index(text[2:4])], True)


def test_room(engine):
    """Of a context of 64 tokens an answer gets what it may have, but no more than the half."""
    prompt = Prompt("the quick brown fox")
    taken = engine.count_tokens("the quick brown fox\n")
    assert 2 < taken < 30
    assert all(EngineWriter(engine, Sampling(), n, batch_size=1).fits(prompt) for n in (1, 32, 1000))
    longer = Prompt("fox " * 20)
    taken = engine.count_tokens(f"{longer.request}\n")
    assert 32 < taken < 64
    assert EngineWriter(engine, Sampling(), 64 - taken, batch_size=1).fits(longer)
    assert not EngineWriter(engine, Sampling(), 65 - taken, batch_size=1).fits(longer)
    assert not EngineWriter(engine, Sampling(), 1000, batch_size=1).fits(longer)


def test_a_chat_template_asks(run):
    tokenizer = run.tokenizer.with_template(named_template("zephyr"))
    engine = Engine(run._replace(tokenizer=tokenizer))
    asked = []
    engine.generate = lambda texts, *_, special, **how: asked.append((texts, special)) or []
    EngineWriter(engine, Sampling(), 6, batch_size=1).write([Prompt("the list", "9.")], "\n", None)
    assert asked == [(["<s><|user|>\nthe list</s>\n<|assistant|>\n9."], True)]
