"""Tasks in files: both shapes, mistakes by line, and files of runs that were killed."""

import json

import pytest

from jaxllm.data.instructions.tasks import Task, append_task, read_tasks, recover_tasks
from jaxllm.errors import UserError

ONE, TWO = Task("说什么？", "1", "一"), Task("Say two", "", "two")


def test_both_shapes(tmp_path):
    seed = {"instruction": " Say ", "instances": [{"input": "1\n", "output": "one"}, {"input": "2", "output": "two"}]}
    records = [seed | {"is_classification": True}, {"instruction": "Say", "input": None, "output": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_tasks(str(tmp_path / "a.jsonl")) == [Task("Say", "1", "one", True), Task("Say", "", "x")]


def test_the_seed_tasks(shared_file):
    tasks = read_tasks(str(shared_file("self_instruct_seed_tasks.jsonl")))
    assert len(tasks) == 175
    assert sum(task.is_classification for task in tasks) == 26


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ([], "a list, but each task must be an object"),
        ({"instruction": "x", "instances": []}, "'instances' must be a list of objects"),
        ({"input": "x", "output": "y"}, "no instruction"),
        ({"instruction": "x", "instances": [{"input": "x"}]}, "no output"),
        ({"instruction": "x", "input": 3, "output": "y"}, "field 'input' is a int"),
    ],
)
def test_mistakes(tmp_path, record, says):
    (tmp_path / "a.jsonl").write_text(f"\n{json.dumps(record)}\n")
    with pytest.raises(UserError) as error:
        read_tasks(str(tmp_path / "a.jsonl"))
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}:2: {says}")


def test_a_file_goes_on(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    assert recover_tasks(path) == []
    append_task(path, ONE, rouge_l=0.5)
    append_task(path, TWO)
    whole = path.read_bytes()
    assert json.loads(whole.splitlines()[0]) == {
        "instruction": "说什么？",
        "input": "1",
        "output": "一",
        "rouge_l": 0.5,
    }
    assert recover_tasks(path) == [ONE, TWO]
    for cut in (whole[:-1], whole[:-5] + "说".encode()[:1]):
        path.write_bytes(cut)
        assert recover_tasks(path) == [ONE]
        append_task(path, TWO)
        assert path.read_bytes() == whole
    path.write_bytes(b'{"instr')
    assert recover_tasks(path) == [] and path.read_bytes() == b""
