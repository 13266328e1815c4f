"""From files to a set: what was planted is found, nothing near crosses the split, and the counts add up."""

import itertools
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jaxllm.data.examples import parse_fields
from jaxllm.data.instructions.build import build
from jaxllm.data.instructions.duplicates import TOGETHER, similarity
from jaxllm.data.instructions.filters import make_rules
from jaxllm.data.instructions.inputs import parse_inputs
from jaxllm.data.instructions.report import report, table
from jaxllm.errors import UserError

RULES = make_rules(0, 0, [], [])


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def inputs(tmp_path, sentence):
    """(a.jsonl, b.parquet): 60 and 30 good examples in English and Chinese, then what is planted."""
    good = [sentence(number, chinese=number % 2 == 1) for number in range(90)]
    first = [{"instruction": text, "output": f"yes {number}"} for number, text in enumerate(good[:60])]
    first += [{"instruction": good[0].upper() + " ", "output": "Yes  0"}, {"instruction": good[1], "output": "yes 1"}]
    first += [{"instruction": "x", "output": ""}]
    near = [{"question": f"{good[number]} {'末' if number % 2 else 'end'}", "answer": "yes"} for number in range(10)]
    second = [{"question": text, "answer": f"yes {number}"} for number, text in enumerate(good[60:], 60)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*second, *near]), tmp_path / "b.parquet")
    return write(tmp_path / "a.jsonl", first), str(tmp_path / "b.parquet")


def built(inputs, **settings):
    return build(parse_inputs(",".join(inputs)), RULES, parse_fields(""), **settings)


def test_what_is_planted_is_removed_and_counted(inputs):
    result = built(inputs)
    first, second = result.counts
    assert dict(first.removed) == {"exact_duplicate": 2, "empty_answer": 1}
    assert dict(second.removed) == {"near_duplicate": 10}
    assert (first.records, first.kept, second.records, second.kept) == (63, 60, 40, 30)
    assert (first.held_out, first.train, second.held_out, second.train) == (3, 57, 2, 28)
    origins = {one.talk.origin: one.duplicate_of.origin for one in result.removed["exact_duplicate"]}
    assert origins == {f"{inputs[0]}:61": f"{inputs[0]}:1", f"{inputs[0]}:62": f"{inputs[0]}:2"}
    near = [one.duplicate_of.origin for one in result.removed["near_duplicate"]]
    assert near == [f"{inputs[0]}:{line}" for line in (1, 2, 3)]


@pytest.mark.parametrize("near", [0.8, 0.999, 1])
def test_no_near_duplicate_crosses_the_split(inputs, near):
    """Kept or not: of those that stay, no two on different sides are near each other, by comparison of all pairs."""
    result = built(inputs, near=near, held_out=0.3)
    assert len(result.train) + len(result.held_out) == (90 if near == 0.8 else 100)
    assert len(result.held_out) >= 20
    pairs = itertools.product(result.train, result.held_out)
    assert max(similarity(a, b) for a, b in pairs) < TOGETHER


def test_the_seed_decides(inputs):
    assert built(inputs, held_out=0.2, seed=1) == built(inputs, held_out=0.2, seed=1)
    one, other = built(inputs, held_out=0.2, seed=1), built(inputs, held_out=0.2, seed=2)
    assert one.held_out != other.held_out and one.train != other.train


def test_weights(inputs):
    """As many as without, a third and two thirds; the held-out part knows no weight."""
    first, second = built([f"{inputs[0]}:1", f"{inputs[1]}:2"], held_out=0.1).counts
    assert (first.held_out, second.held_out) == (6, 3)
    assert (first.train, second.train) == (27, 54)
    assert (first.dropped, first.repeated, second.dropped, second.repeated) == (27, 0, 0, 27)


def test_the_largest_number_of_examples(inputs):
    result = built(inputs, held_out=0.1, max_examples=40)
    assert (len(result.held_out), len(result.train)) == (4, 36)
    assert len({talk.origin for talk in result.train + result.held_out}) == 40


@pytest.mark.parametrize("weights", [("", ""), (":1", ":5")])
def test_the_counts_add_up(inputs, weights):
    result = built([path + weight for path, weight in zip(inputs, weights, strict=True)], max_examples=70)
    for counts in [*result.counts, result.total]:
        assert counts.conversations == sum(counts.removed.values()) + counts.kept
        assert counts.kept == counts.held_out + counts.train - counts.repeated + counts.dropped
    assert result.total.train == len(result.train) and result.total.held_out == len(result.held_out)
    said = report(result, {"seed": 0})
    assert json.loads(json.dumps(said))["total"]["removed"]["near_duplicate"] == 10
    lines = table(result, RULES)
    assert [line.split()[-1] for line in lines if line.startswith("- near_duplicate")] == ["-10"]
    assert len({len(line) for line in lines}) == 1


def test_all_kinds_of_files(tmp_path, sentence):
    import gzip

    records = [{"question": sentence(number), "answer": "yes"} for number in range(5)]
    write(tmp_path / "a.jsonl", records[:1])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((json.dumps(records[1]) + "\n").encode()))
    (tmp_path / "c.json").write_text(json.dumps(records[2:3]))
    (tmp_path / "d.csv").write_text(f"question,answer\n{records[3]['question']},yes\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[4:]), tmp_path / "e.parquet")
    result = built([str(tmp_path)], held_out=0)
    assert {talk.messages[0]["content"] for talk in result.train} == {record["question"] for record in records}
    assert result.held_out == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "--input names no file"),
        ("{a}.gone", "no such file or folder"),
        ("{a}:0", "the weight '0' of"),
        ("{a}:x", "the weight 'x' of"),
        ("{a}:1,{b}", "b.parquet has no weight, and others have"),
        ("{a},{folder}", "is in"),
        ("{text}", "by its name this is no file of examples"),
    ],
)
def test_inputs_that_cannot_be(inputs, tmp_path, given, says):
    (tmp_path / "c.txt").write_text("x")
    names = {"a": inputs[0], "b": inputs[1], "folder": str(tmp_path), "text": str(tmp_path / "c.txt")}
    with pytest.raises(UserError) as error:
        parse_inputs(given.format(**names))
    assert says in str(error.value)


def test_nothing_left(tmp_path):
    empty = write(tmp_path / "a.jsonl", [{"question": "x", "answer": ""}] * 3)
    with pytest.raises(UserError, match=r"nothing is left of 3 conversations: 3 empty_answer"):
        built([empty])


def test_a_weight_for_nothing(inputs, tmp_path):
    copies = write(tmp_path / "c.jsonl", [json.loads(Path(inputs[0]).read_text().splitlines()[0])])
    with pytest.raises(UserError, match=r"c.jsonl has a weight, but of its 1 conversations none is left .* 1 exact"):
        built([f"{inputs[0]}:1", f"{copies}:1"])


def test_what_cannot_be_split(tmp_path):
    same = write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": answer} for answer in ("red", "green", "blue")])
    with pytest.raises(UserError, match="stay together, and 3 cannot be split so"):
        built([same])
    assert len(built([same], held_out=0).train) == 3


def test_one_example_is_not_enough_for_both_parts(inputs):
    with pytest.raises(UserError, match="and 1 cannot be split so"):
        built(inputs, max_examples=1)
    assert len(built(inputs, max_examples=1, held_out=0).train) == 1
