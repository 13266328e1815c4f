"""jaxllm instructions --input: the folder it writes, what it says, and mistakes."""

import json

import pytest

from jaxllm.cli.main import main
from jaxllm.data.examples import parse_fields, read_example
from jaxllm.data.sources import open_source
from tests.mistakes import mistake

SYSTEM = [{"from": "system", "value": "be kind"}]


@pytest.fixture
def files(tmp_path):
    """20 ShareGPT conversations and one with an empty answer; 20 rows of CSV, one of them twice."""

    def talk(question: str, answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    talks = [{"conversations": SYSTEM + talk(f"第{i}个问题是什么", f"答案{i}")} for i in range(20)]
    talks.append({"conversations": talk("and now?", "")})
    text = "".join(json.dumps(talk, ensure_ascii=False) + "\n" for talk in talks)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    rows = [f"what is {i}?,{'it is ' * i}{i}" for i in [*range(20), 7]]
    (tmp_path / "b.csv").write_text("title,body\n" + "\n".join(rows), encoding="utf-8")
    return tmp_path


def command(files, *flags):
    inputs = f"--input={files / 'a.jsonl'},{files / 'b.csv'}"
    names = "--config.data.fields=prompt=title,completion=body"
    return ["instructions", inputs, names, f"--out={files / 'set'}", *flags]


def test_a_set_to_train_on(files, capsys):
    assert main(command(files, "--held_out=0.1", "--seed=3", "--json")) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said == json.loads((files / "set" / "report.json").read_text(encoding="utf-8"))
    assert said["settings"]["seed"] == 3
    assert [given["removed"] for given in said["inputs"]] == [{"empty_answer": 1}, {"exact_duplicate": 1}]
    assert (said["total"]["kept"], said["total"]["held_out"], said["total"]["train"]) == (40, 4, 36)
    read = {}
    for name in ("train", "held_out"):
        records = open_source("jsonl", str(files / "set" / f"{name}.jsonl")).records()
        read[name] = [read_example(record, parse_fields("")) for record in records]
    assert (len(read["train"]), len(read["held_out"])) == (36, 4)
    talks = [example.messages for example in read["train"] + read["held_out"]]
    assert sum(talk[0] == {"role": "system", "content": "be kind"} for talk in talks) == 20
    assert [{"role": "user", "content": "what is 2?"}, {"role": "assistant", "content": "it is it is 2"}] in talks
    assert f"- empty_answer: {files / 'a.jsonl'}:21: and now?" in err
    assert f"- exact_duplicate: {files / 'b.csv'}:22 (similarity 1.00 with {files / 'b.csv'}:9)" in err
    assert "a.jsonl  b.csv  all inputs" in err
    assert err.splitlines()[-1].split() == ["train", "18", "18", "36"]


def test_twice_the_same(files):
    assert main(command(files)) == 0
    (files / "set").rename(files / "before")
    assert main(command(files)) == 0
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (files / "set" / name).read_bytes() == (files / "before" / name).read_bytes()


def test_without_a_held_out_part(files):
    assert main(command(files, "--held_out=0")) == 0
    assert sorted(file.name for file in (files / "set").iterdir()) == ["report.json", "train.jsonl"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--near=0"], "--near=0.0 must be above 0 and at most 1"),
        (["--held_out=1"], "--held_out=1.0 must be from 0 to under 1"),
        (["--min_length=9", "--max_length=8"], "--min_length=9 is over --max_length=8"),
        (["--max_examples=-1"], "--max_examples=-1 must be 1 or more, or 0"),
        (["--languages=klingon"], "--languages: 'klingon' is no language"),
        (["--allow=all"], "--allow: 'all' is no rule"),
        (["--rouge=0.7"], "--rouge is not a flag of jaxllm instructions --input"),
        (["--config.data.length=3"], "--config.data.length: of the config --config.data.fields alone"),
        (["--config.data.fields=prompt=title"], "b.csv:2: no known shape: its fields are title, body. Known are"),
        (
            ["--min_length=99999"],
            "nothing is left of 42 conversations: 41 too_short, 1 empty_answer.",
        ),
        (["--out="], "say where to write the set: --out DIR."),
    ],
)
def test_mistakes_leave_nothing_behind(files, capsys, flags, says):
    before = sorted(files.iterdir())
    assert says in mistake(command(files, *flags), capsys)
    assert sorted(files.iterdir()) == before


def test_a_folder_that_exists(files, capsys):
    (files / "set").mkdir()
    assert "set exists. Give a new folder, or remove it first." in mistake(command(files), capsys)


def test_a_broken_line_is_named(files, capsys):
    with (files / "a.jsonl").open("a") as file:
        file.write("{")
    assert "a.jsonl:22: broken JSON" in mistake(command(files), capsys)
    assert not (files / "set").exists()
