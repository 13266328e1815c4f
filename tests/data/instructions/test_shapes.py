"""Records of every common shape as conversations, and those of no shape, by line."""

import json

import pytest

from jaxllm.data.examples import parse_fields
from jaxllm.data.instructions.shapes import read_talks
from jaxllm.data.sources import Record
from jaxllm.errors import UserError

ASKED, SAID = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be kind"}
HUMAN, GPT = {"from": "human", "value": "你好"}, {"from": "gpt", "value": " hello\n"}


def read(value, fields=""):
    return read_talks(Record(value, "a.jsonl:7"), parse_fields(fields))


def asked(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [SYSTEM, ASKED, SAID]}, [SYSTEM, ASKED, SAID]),
        ({"messages": json.dumps([ASKED, SAID])}, [ASKED, SAID]),
        ({"messages": [ASKED | {"name": None}, SAID]}, [ASKED, SAID]),
        ({"messages": [asked([{"type": "text", "text": "你好"}]), SAID]}, [ASKED, SAID]),
        ({"conversations": [HUMAN, GPT], "id": "x"}, [ASKED, SAID]),
        ({"conversations": [{"from": "system", "value": "be kind"}, HUMAN, GPT]}, [SYSTEM, ASKED, SAID]),
        ({"conversations": [HUMAN, GPT], "system": "be kind"}, [SYSTEM, ASKED, SAID]),
        ({"conversations": [HUMAN, {"from": "gpt", "value": None}]}, [ASKED, SAID | {"content": ""}]),
        ({"instruction": "Say", "input": "你好", "output": "hello"}, [asked("Say\n你好"), SAID]),
        ({"instruction": "你好", "input": "", "output": "hello"}, [ASKED, SAID]),
        ({"instruction": "你好", "output": None}, [ASKED, SAID | {"content": ""}]),
        ({"instruction": "Say", "context": "你好", "response": "hello"}, [asked("Say\n你好"), SAID]),
        ({"prompt": "你好", "completion": "hello"}, [ASKED, SAID]),
        ({"prompt": [SYSTEM, ASKED], "completion": [SAID]}, [SYSTEM, ASKED, SAID]),
        ({"question": "你好 ", "answer": "hello"}, [ASKED, SAID]),
        ({"prompt": "你好", "chosen": [ASKED, SAID], "rejected": []}, [ASKED, SAID]),
        ({"chosen": "\n\nHuman: 你好\n\nAssistant: hello", "rejected": ""}, [ASKED, SAID]),
        ({"system_prompt": "be kind", "question": "你好", "response": "hello"}, [SYSTEM, ASKED, SAID]),
    ],
)
def test_shapes(record, messages):
    (found,) = read(record)
    assert found.messages == messages
    assert found.origin == "a.jsonl:7"


def test_an_example_an_instance():
    instances = [{"input": "1", "output": "one"}, {"input": "", "output": "none"}]
    one, two = read({"instruction": "Say", "instances": instances})
    assert [one.messages[0], two.messages[0]] == [asked("Say\n1"), asked("Say")]
    assert [one.origin, two.origin] == ["a.jsonl:7 instance 1", "a.jsonl:7 instance 2"]


def test_fields_of_other_names():
    (found,) = read({"title": "你好", "body": {"text": "hello"}}, "prompt=title,completion=body.text")
    assert found.messages == [ASKED, SAID]


def test_tools_are_kept():
    (found,) = read({"messages": [ASKED, SAID], "tools": '[{"name": "f"}]'})
    assert found.tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (["x"], "a list, but each example must be an object"),
        ({"title": "x", "body": "y"}, "no known shape: its fields are title, body"),
        ({"prompt": "x"}, "no known shape"),
        ({"text": "x"}, "a plain text, of which nobody knows what is asked"),
        ({"messages": "x"}, "'messages' is neither a list of messages nor its JSON"),
        ({"messages": []}, "'messages' is empty"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "the role 'narrator' is unknown"),
        ({"question": 3, "answer": "x"}, "field 'question' is a int"),
        ({"instruction": "x", "instances": [1]}, "'instances' must be a list of objects"),
    ],
)
def test_mistakes_name_the_line(record, says):
    with pytest.raises(UserError) as error:
        read(record)
    assert str(error.value).startswith("a.jsonl:7")
    assert says in str(error.value)
