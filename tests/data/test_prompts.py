"""Sets of prompts: formats, columns, order, what is too long."""

import dataclasses
import json

import pytest

from jaxllm.data.config import DataConfig
from jaxllm.data.examples import parse_fields
from jaxllm.data.prompts import prepare_prompts, read_prompt
from jaxllm.data.sources import Record
from jaxllm.errors import UserError

ASK, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "the fox"}
HH = "\n\nHuman: hi\n\nAssistant:"


@pytest.fixture
def config(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    return DataConfig(
        source="jsonl", path=str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "tokenizer"), held_out=""
    )


def write(config, records):
    with open(config.path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("value, expected, used", [
    ({"prompt": "why?", "answer": 1}, "why?", {"prompt"}),
    ({"prompt": [ASK]}, [ASK], {"prompt"}),
    ({"messages": [ASK, SAID]}, [ASK], {"messages"}),
    ({"messages": [ASK, SAID, ASK]}, [ASK, SAID, ASK], {"messages"}),
    ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}]}, [ASK], {"conversations"}),
    ({"chosen": [ASK, SAID], "rejected": [ASK, {**SAID, "content": "no"}]}, [ASK], {"chosen", "rejected"}),
    ({"chosen": HH + " so", "rejected": HH + " no"}, [ASK], {"chosen", "rejected"}),
    ({"instruction": "hi", "output": "the fox"}, [ASK], {"instruction", "input"}),
])  # fmt: skip
def test_formats(value, expected, used):
    assert read_prompt(Record(value, "a.jsonl:1"), parse_fields(""), dialogues=True) == (expected, used)


@pytest.mark.parametrize("value, says", [
    ({"question": "why?"}, "no prompt: its fields are question.*config.data.fields=prompt=question"),
    ({"messages": [SAID]}, "nobody says anything before the assistant"),
    ([], "a list, but each record must be an object"),
])  # fmt: skip
def test_bad_records_are_named(value, says):
    with pytest.raises(UserError, match=f"a.jsonl:1: .*{says}"):
        read_prompt(Record(value, "a.jsonl:1"), parse_fields(""), dialogues=True)


def test_texts_columns_and_order(config):
    """bos and no eos; all other fields are columns; an epoch has every prompt once, in an order of its own."""
    write(config, [{"prompt": f"{n}?", "answer": n} for n in range(20)])
    prompts = prepare_prompts(dataclasses.replace(config, held_out="0.1"), max_prompt_length=30)
    assert (len(prompts.train), len(prompts.held_out)) == (18, 2)
    first = prompts.train[0]
    number = first.columns["answer"]
    assert first.columns == {"answer": number} and first.text == f"{number}?"
    assert first.ids == [prompts.tokenizer.bos_id, *prompts.tokenizer.encode(first.text)]
    order = [prompts.at(position, seed=1).columns["answer"] for position in range(36)]
    seen = sorted(prompt.columns["answer"] for prompt in prompts.train)
    assert sorted(order[:18]) == sorted(order[18:]) == seen and order[:18] != order[18:]
    assert order == [prompts.at(position, seed=1).columns["answer"] for position in range(36)]
    assert order != [prompts.at(position, seed=2).columns["answer"] for position in range(36)]
    as_given = prepare_prompts(dataclasses.replace(config, shuffle=False), max_prompt_length=30)
    assert [as_given.at(position, 1).columns["answer"] for position in range(21)] == [*range(20), 0]
    assert as_given.identity != prompts.identity


def test_conversations_end_where_the_assistant_begins(config):
    write(config, [{"prompt": [ASK]}])
    (prompt,) = prepare_prompts(dataclasses.replace(config, chat_template="zephyr"), max_prompt_length=40).train
    assert prompt.text.endswith("hi\n<|assistant|>\n") or prompt.text.endswith("<|assistant|>\n")
    with pytest.raises(UserError, match="a conversation needs a chat template"):
        prepare_prompts(config, max_prompt_length=40)


def test_prompts_too_long(config):
    write(config, [{"prompt": "hi"}, {"prompt": "the fox " * 40}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: this prompt has \d+ tokens, and a row has room for 16 before"):
        prepare_prompts(config, max_prompt_length=16)
    dropped = prepare_prompts(dataclasses.replace(config, truncation="drop"), max_prompt_length=16)
    assert [prompt.text for prompt in dropped.train] == ["hi"] and dropped.dropped == 1
    cut = prepare_prompts(dataclasses.replace(config, truncation="cut"), max_prompt_length=16)
    assert len(cut.train[1].ids) == 16 and "1 lost their beginning" in cut.describe()[-1]


def test_a_tokenizer_is_not_trained_on_prompts(config):
    write(config, [{"prompt": "hi"}])
    with pytest.raises(UserError, match=r"config\.data\.tokenizer=bpe:300 would be trained on prompts"):
        prepare_prompts(dataclasses.replace(config, tokenizer="bpe:300"), max_prompt_length=16)
