"""Multiple-choice questions as test sets spell them, and what is none."""

import json

import pytest

from jaxllm.data.choices import read_questions
from jaxllm.errors import UserError


def read(tmp_path, *records):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_questions(str(file))


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"prompt": "x", "choices": ["a", "b"], "answer": 1}, 1),
        ({"prompt": "x", "choices": ["a", "b"], "answer": "b"}, 1),
        ({"query": "x", "options": ["a", "b"], "gold": 0}, 0),
        ({"ctx": "x", "endings": ["a", "b"], "label": "1"}, 1),  # HellaSwag
        ({"question": "x", "choices": ["a", "b", "c"], "answer": "C"}, 2),
        ({"question": "x", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "1"}, 0),  # ARC
        ({"prompt": "x", "choices": ["B", "A"], "answer": "A"}, 1),  # a text before a letter
        ({"prompt": "x", "choices": ["1", "0"], "answer": "0"}, 1),  # and before an index
    ],
)
def test_spellings(tmp_path, record, answer):
    (question,) = read(tmp_path, record)
    assert (question.prompt, question.answer) == ("x", answer)
    assert question.origin == f"{question.file}:1"


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (["x"], ":2: a list, but each line must be an object"),
        ({"choices": ["a", "b"], "answer": 0}, ":2: no field 'prompt' (nor question, query, context, ctx)"),
        ({"prompt": "x", "answer": 0}, ":2: no field 'choices'"),
        ({"prompt": "x", "choices": ["a", "b"]}, ":2: no field 'answer'"),
        ({"prompt": 1, "choices": ["a", "b"], "answer": 0}, ":2: field 'prompt' is a int"),
        ({"prompt": "x", "choices": "ab", "answer": 0}, ":2: the choices are a str"),
        ({"prompt": "x", "choices": ["a", 2], "answer": 0}, ":2: field 'choice' is a int"),
        ({"prompt": "x", "choices": ["a", ""], "answer": 0}, ":2: choice 1 is empty"),
        ({"prompt": "x", "choices": ["a"], "answer": 0}, ":2: there must be two choices or more; here are 1"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, ":2: the answer 2 is out of range: there are 2 choices"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": -1}, ":2: the answer -1 is out of range"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": "C"}, ":2: the answer 'C' is out of range"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": "maybe"}, ":2: the answer 'maybe' is neither a choice nor"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": True}, ":2: the answer True is neither"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": [0]}, ":2: the answer [0] is neither"),
    ],
)
def test_what_is_no_question_names_file_and_line(tmp_path, record, says):
    fine = {"prompt": "x", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(UserError) as error:
        read(tmp_path, fine, record)
    assert f"questions.jsonl{says}" in str(error.value)


def test_files_without_a_question(tmp_path):
    with pytest.raises(UserError, match=r"questions\.jsonl: the file is empty"):
        read(tmp_path)
    with pytest.raises(UserError, match="no question"):
        read_questions(str(tmp_path / "*.jsonl"))
    with pytest.raises(UserError, match="no such file"):
        read_questions(str(tmp_path / "no.jsonl"))
