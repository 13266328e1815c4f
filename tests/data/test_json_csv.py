"""JSON lists, CSV and TSV: records with the line each begins on, and what is broken by line."""

import gzip
import json

import pytest

from jaxllm.data.sources import open_source
from jaxllm.errors import UserError


def records(path, content=None, kind=None):
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    source = open_source(kind or ("csv" if ".json" not in path.name else "json"), str(path))
    return [(record.value, record.origin.removeprefix(f"{path}:")) for record in source.records()]


RECORDS = [{"a": "却说\n"}, {"a": ["x", {"b": None}]}, {"a": "]"}]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (json.dumps(RECORDS), [1, 1, 1]),
        (json.dumps(RECORDS, indent=1, ensure_ascii=False), [2, 5, 13]),
        ("\n" + "\n".join(map(json.dumps, RECORDS)) + "\n", [2, 3, 4]),  # jsonl by another name
        ("\ufeff[\r\n" + ",\r\n\r\n".join(map(json.dumps, RECORDS)) + "\r\n]\r\n", [2, 4, 6]),
    ],
)
def test_json(tmp_path, content, lines):
    assert records(tmp_path / "a.json", content) == list(zip(RECORDS, map(str, lines), strict=True))
    packed = gzip.compress(content.encode())
    assert [value for value, _ in records(tmp_path / "a.json.gz", packed)] == RECORDS


def test_progress_reaches_the_end(tmp_path):
    for name, content in (("a.json", json.dumps(RECORDS)), ("b.csv", "a\n1\n2\n3\n")):
        (tmp_path / name).write_text(content)
        source = open_source(name.split(".")[1], str(tmp_path / name))
        progress = [record.progress for record in source.records()]
        assert progress == sorted(progress) and 0.9 < progress[-1] <= 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', r"a\.json:3: broken JSON: Expecting value, column 7"),
        ('[\n{"a": 1}\n{"a": 2}]', r"a\.json:3: broken JSON: ',' or '\]' is missing after an item"),
        ('[{"a": 1},\n]', r"a\.json:2: broken JSON: an item is missing after ','"),
        ('[{"a": 1},\n', r"a\.json:2: broken JSON: the list does not end"),
        ('[{"a": 1}', r"a\.json:1: broken JSON: ',' or '\]' is missing"),
        ('[{"a": 1}]\nx', r"a\.json:2: broken JSON: something follows the list"),
        ("[" + "1" * 5000 + "]", r"a\.json:1: broken JSON: Exceeds the limit"),
        ("[]", r"a\.json: the file is empty"),
        ("", r"a\.json: the file is empty"),
        (b"[\xff]", r"a\.json: not UTF-8"),
    ],
)
def test_broken_json(tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        records(tmp_path / "a.json", content)


def test_csv(tmp_path):
    content = 'question, answer\r\n"a\nb, ""c""",却说\r\n\r\n1,\r\n'
    wanted = [({"question": 'a\nb, "c"', "answer": "却说"}, "2"), ({"question": "1", "answer": ""}, "5")]
    assert records(tmp_path / "a.csv", "\ufeff" + content) == wanted
    assert records(tmp_path / "a.csv.gz", gzip.compress(content.encode())) == wanted
    assert records(tmp_path / "a.tsv", "q\ta, b\n1\t2\n") == [({"q": "1", "a, b": "2"}, "2")]
    long = "x" * 200_000
    assert records(tmp_path / "b.csv", f"a\n{long}\n") == [({"a": long}, "2")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('a,b\n"x\ny",2\n1,2,3\n', r"a\.csv:4: 3 fields, but the header has 2"),
        ("a,b\n1\n", r"a\.csv:2: 1 fields, but the header has 2"),
        ('a,b\n1,2\n"x,2\n3,4\n', r"a\.csv:3: broken CSV: unexpected end of data, in the row that begins here"),
        ('a,b\n"x"y,2\n', r"a\.csv:2: broken CSV: ',' expected after '\"'"),
        ("a,b, a\n1,2,3\n", r"a\.csv:1: the header has 'a' twice"),
        ("a,b\n", r"a\.csv: no rows under a header"),
        ("", r"a\.csv: the file is empty"),
        (b"a,b\n1,2\n\xff,2\n", r"a\.csv:3: not UTF-8: byte 0xff at byte 8"),
    ],
)
def test_broken_csv(tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        records(tmp_path / "a.csv", content)


def test_texts_of_their_fields(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "x"}]')
    (tmp_path / "a.csv").write_text("text\ny\n")
    texts = [d.text for k in ("json", "csv") for d in open_source(k, str(tmp_path)).documents()]
    assert texts == ["x", "y"]
