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
    ({"chosen": [ASK, SAID], "rejected": [ASK, {**SAID, "content": "no"}]}, [ASK],
     {"prompt", "chosen", "rejected"}),
    ({"prompt": "hi", "chosen": [ASK, SAID], "rejected": [ASK, {**SAID, "content": "no"}]}, [ASK],
     {"prompt", "chosen", "rejected"}),
    ({"prompt": "a ", "chosen": "b", "rejected": "c"}, "a ", {"prompt"}),
    ({"prompt": "a ", "completion": "b"}, "a ", {"prompt"}),
    ({"chosen": HH + " so", "rejected": HH + " no"}, [ASK], {"prompt", "chosen", "rejected"}),
    ({"prompt": HH}, [ASK], {"prompt"}),
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


def test_a_mixture_draws_prompts_by_weight(config, tmp_path):
    """In proportion at every position, and each prompt of a component as often as its others."""
    write(config, [{"prompt": f"{n}?", "answer": n} for n in range(12)])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"prompt": f"{n}!", "answer": -1}) + "\n" for n in range(2)))
    path = f"jsonl:{config.path}=3,jsonl:{tmp_path}/b.jsonl=1"
    prompts = prepare_prompts(dataclasses.replace(config, source="mixture", path=path), max_prompt_length=30)
    drawn = [prompts.at(position, seed=1) for position in range(32)]
    assert sum(prompt.columns["answer"] < 0 for prompt in drawn[:16]) == 4
    numbers = [prompt.columns["answer"] for prompt in drawn if prompt.columns["answer"] >= 0]
    assert sorted(numbers[:12]) == sorted(numbers[12:]) == list(range(12)) and numbers[:12] != numbers[12:]
    other = prepare_prompts(
        dataclasses.replace(config, source="mixture", path=path.replace("=3", "=2")), max_prompt_length=30
    )
    assert prompts.identity != other.identity


def test_tools_are_shown_to_the_template(config, tmp_path):
    (tmp_path / "a.jinja").write_text("{{ tools[0].name }}: {{ messages[0].content }}")
    write(config, [{"prompt": [ASK], "tools": [{"name": "fox"}]}])
    config = dataclasses.replace(config, chat_template=str(tmp_path / "a.jinja"))
    (prompt,) = prepare_prompts(config, max_prompt_length=40).train
    assert prompt.text == "fox: hi" and prompt.columns == {"tools": [{"name": "fox"}]}


def test_what_is_held_out(config, tmp_path):
    """A file that is not trained on."""
    write(config, [{"prompt": f"{n}?"} for n in range(4)])
    (tmp_path / "b.jsonl").write_text('{"prompt": "why?"}\n')
    prompts = prepare_prompts(dataclasses.replace(config, held_out=f"file:{tmp_path}/b.jsonl"), max_prompt_length=9)
    assert (len(prompts.train), [prompt.text for prompt in prompts.held_out]) == (4, ["why?"])
    with pytest.raises(UserError, match=r"a\.jsonl is also one of the files that are trained on"):
        prepare_prompts(dataclasses.replace(config, held_out=f"file:{config.path}"), max_prompt_length=9)


def test_conversations_end_where_the_assistant_begins(config):
    write(config, [{"prompt": [ASK]}])
    (prompt,) = prepare_prompts(dataclasses.replace(config, chat_template="zephyr"), max_prompt_length=40).train
    assert prompt.text == "<s><|user|>\nhi</s>\n<|assistant|>\n"
    with pytest.raises(UserError, match="a conversation needs a chat template"):
        prepare_prompts(config, max_prompt_length=40)


def test_prompts_too_long(config):
    write(config, [{"prompt": "hi"}, {"prompt": "the fox " * 40}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: this prompt has \d+ tokens, and a row has room for 16 before"):
        prepare_prompts(config, max_prompt_length=16)
    dropped = prepare_prompts(dataclasses.replace(config, truncation="drop"), max_prompt_length=16)
    assert [prompt.text for prompt in dropped.train] == ["hi"] and dropped.dropped == 1
    cut = prepare_prompts(dataclasses.replace(config, truncation="cut"), max_prompt_length=16)
    bos, text = cut.tokenizer.bos_id, "the fox " * 40
    assert cut.train[1].ids == [bos, *cut.tokenizer.encode(text)[-15:]]
    assert "1 lost their beginning" in cut.describe()[-1]
    write(config, [{"prompt": "the fox " * 40}])
    with pytest.raises(UserError, match="no prompt is short enough for the 16 tokens"):
        prepare_prompts(dataclasses.replace(config, truncation="drop"), max_prompt_length=16)
    with pytest.raises(UserError, match=r"config\.data\.truncation='cutt' is unknown. Did you mean 'cut'"):
        prepare_prompts(dataclasses.replace(config, truncation="cutt"), max_prompt_length=16)


def test_a_tokenizer_is_not_trained_on_prompts(config):
    write(config, [{"prompt": "hi"}])
    with pytest.raises(UserError, match=r"config\.data\.tokenizer=bpe:300 would be trained on prompts"):
        prepare_prompts(dataclasses.replace(config, tokenizer="bpe:300"), max_prompt_length=16)
