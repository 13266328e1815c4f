"""Preferences from their records to rows of pairs."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.data.batch import MAX_PAIRS, PAIRS, PairBatch
from jaxllm.data.config import DataConfig
from jaxllm.data.dataset import prepare
from jaxllm.data.examples import Conversation, PlainText, parse_fields
from jaxllm.data.preferences import read_pair
from jaxllm.data.sources import Record
from jaxllm.errors import UserError

ONE = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data", None))
ASK, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "the fox"), ("assistant", "no")))
HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant:"


def read(value, fields="", dialogues=False):
    pair = read_pair(Record(value, "a.jsonl:7"), parse_fields(fields), dialogues=dialogues)
    return pair.chosen, pair.rejected, pair.margin


@pytest.fixture
def config(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    return DataConfig(
        source="jsonl",
        path=str(tmp_path / "a.jsonl"),
        tokenizer=str(tmp_path / "tokenizer"),
        packing="best_fit",
        held_out="",
        cache=str(tmp_path / "cache"),
    )


def write(config, records):
    with open(config.path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def many(count=60):
    """Prompts, and responses of very different lengths; margins on every third."""
    random = np.random.default_rng(0)
    for number in range(count):
        better, worse = ("the fox " * size for size in random.integers(1, 7, 2))
        margin = {"margin": number / 10} if number % 3 == 0 else {}
        yield {"prompt": f"{number}? ", "chosen": f"yes {better}", "rejected": f"no {worse}", **margin}


@pytest.mark.parametrize("value, fields, expected", [
    ({"prompt": "a ", "chosen": "b", "rejected": "c"}, "", (PlainText("a ", "b"), PlainText("a ", "c"), 0)),
    ({"q": "a ", "y": "b", "n": "c", "by": 2}, "prompt=q,chosen=y,rejected=n,margin=by",
     (PlainText("a ", "b"), PlainText("a ", "c"), 2)),
    ({"chosen": "a long b", "rejected": "a long c"}, "", (PlainText("a long ", "b"), PlainText("a long ", "c"), 0)),
    ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "margin": 0.5}, "",
     (Conversation([ASK, GOOD], 1), Conversation([ASK, BAD], 1), 0.5)),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "",
     (Conversation([ASK, GOOD], 1), Conversation([ASK, BAD], 1), 0)),
    ({"prompt": "hi", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "",
     (Conversation([ASK, GOOD], 1), Conversation([ASK, BAD], 1), 0)),
    ({"chosen": HH + " so", "rejected": HH + " no"}, "", (PlainText(HH, " so"), PlainText(HH, " no"), 0)),
])  # fmt: skip
def test_formats(value, fields, expected):
    """Those of TRL: an explicit prompt and an implicit one, texts and conversations; and HH as it stands."""
    assert read(value, fields) == expected


def test_dialogues_become_conversations():
    chosen, rejected, _ = read({"chosen": HH + " so", "rejected": HH + " no\n\nHuman: x"}, dialogues=True)
    shared = [("user", "hi"), ("assistant", "yes?"), ("user", "why")]
    of = lambda talk: [(message["role"], message["content"]) for message in talk.messages]  # noqa: E731
    assert of(chosen) == [*shared, ("assistant", "so")] and chosen.num_context == 3
    assert of(rejected) == [*shared, ("assistant", "no"), ("user", "x")] and rejected.num_context == 3


@pytest.mark.parametrize("value, says", [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' equals 'rejected': there is nothing to prefer"),
    ({"prompt": "a", "chosen": "b"}, "no field 'rejected'.*its fields are prompt, chosen"),
    ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "'chosen' is a str and 'rejected' a list"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "says nothing after the prompt 'a'"),
    ({"chosen": "abc", "rejected": "xyz"}, "begin with nothing that they share"),
    ({"chosen": [ASK, GOOD], "rejected": [GOOD]}, "share 0 messages of 2 and 1"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK]}, "share 1 messages of 2 and 1"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "'margin' is 'much'"),
    ("b", "a str, but each record must be an object"),
])  # fmt: skip
def test_bad_records_are_named(value, says):
    with pytest.raises(UserError, match=f"a.jsonl:7: .*{says}"):
        read(value)


def pairs_of(row):
    """(number, prompt, chosen, rejected, margin) of each pair in a row; asserts what a row promises."""
    found = []
    last = int(row.segment_ids.max())
    assert last % 2 == 0 and last <= 2 * MAX_PAIRS
    for segment in range(1, last, 2):
        both = [row.segment_ids == s for s in (segment, segment + 1)]
        texts = [row.tokens[where][~row.loss_mask[where]].tolist() for where in both]
        said = [row.tokens[where][row.loss_mask[where]].tolist() for where in both]
        assert texts[0] == texts[1] and all(said)
        for where in both:
            assert row.positions[where].tolist() == list(range(where.sum()))
            assert not row.loss_mask[where][0] and len(set(row.pair_ids[where])) == 1
        assert row.pair_ids[both[0]][0] == row.pair_ids[both[1]][0] > 0
        assert not row.margins[both[0]][1:].any() and not row.margins[both[1]].any()
        found.append((row.pair_ids[both[0]][0], *map(tuple, (texts[0], *said)), row.margins[both[0]][0]))
    assert not row.pair_ids[row.segment_ids == 0].any()
    return found


def all_pairs(batches):
    rows = [PairBatch(*row) for batch in batches for row in zip(*map(np.asarray, batch), strict=True)]
    return [pair for row in rows for pair in pairs_of(row)]


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_rows_hold_whole_pairs(config, packing):
    """Two segments each with one prompt, the chosen first; each pair once an epoch, with its number and margin."""
    write(config, records := list(many()))
    config = dataclasses.replace(config, packing=packing)
    data = prepare(config, length=96, kind=PAIRS, progress=False)
    rows = data.rows_an_epoch()
    assert (rows == 60) == (packing == "none")
    found = all_pairs([next(data.train_loader(ONE, batch_size=rows, seed=0))])
    assert sorted(number for number, *_ in found) == list(range(1, 61)) and data.num_pairs == 60
    for number, prompt, chosen, rejected, margin in found:
        texts = [data.tokenizer.decode(ids).strip() for ids in (prompt, chosen, rejected)]
        record = records[number - 1]
        assert texts == [record[name].strip() for name in ("prompt", "chosen", "rejected")]
        assert margin == np.float32(record.get("margin", 0))
    assert data.describe()[1].startswith("train: 60 pairs, ")
    assert sorted(all_pairs(data.every_pair(ONE, batch_size=2))) == sorted(found)


def test_a_row_has_a_most_of_pairs(config):
    write(config, [{"prompt": "a ", "chosen": "b", "rejected": "c"}] * (2 * MAX_PAIRS))
    data = prepare(config, length=2048, kind=PAIRS, progress=False)
    assert data.rows_an_epoch() == 2
    assert len(all_pairs([next(data.train_loader(ONE, batch_size=2, seed=0))])) == 2 * MAX_PAIRS


def test_the_held_out_split_and_resuming(config):
    """By pair; numbers go on from those that are trained on; a loader goes on where another stopped."""
    write(config, many())
    data = prepare(dataclasses.replace(config, held_out="0.1"), length=96, kind=PAIRS, progress=False)
    held_out = all_pairs(data.eval_batches(ONE, batch_size=2))
    assert sorted(number for number, *_ in held_out) == list(range(55, 61))
    first, second = (data.train_loader(ONE, batch_size=2, seed=3) for _ in range(2))
    for _ in range(3):
        next(first)
    second.restore(first.state())
    for one, other in zip(next(first), next(second), strict=True):
        np.testing.assert_array_equal(one, other)


def test_pairs_too_long_for_a_row(config):
    long = {"prompt": "why? ", "chosen": "the fox " * 40, "rejected": "no"}
    write(config, [next(many()), long])
    with pytest.raises(UserError, match=r"a\.jsonl:2: this pair, its prompt with each response, has \d+ tokens, and a"):
        prepare(config, length=96, kind=PAIRS, progress=False)
    dropped = prepare(dataclasses.replace(config, truncation="drop"), length=96, kind=PAIRS, progress=False)
    assert len(all_pairs(dropped.every_pair(ONE, batch_size=1))) == 1
    cut = prepare(dataclasses.replace(config, truncation="cut"), length=96, kind=PAIRS, progress=False)
    found = all_pairs(cut.every_pair(ONE, batch_size=1))
    assert [len(prompt) + len(chosen) for number, prompt, chosen, *_ in found if number == 2] == [48]


def test_the_hh_file(shared_file, config):
    """All 2,312 pairs, raw; some are equal and are named."""
    path = shared_file("hh_rlhf_harmless_test.jsonl.gz")
    fields = parse_fields("")
    read, refused = 0, []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                pair = read_pair(Record(json.loads(line), f"hh:{number}"), fields, dialogues=True)
            except UserError as error:
                refused.append(str(error))
                continue
            read += 1
            context = pair.chosen.messages[: pair.chosen.num_context]
            assert context == pair.rejected.messages[: pair.rejected.num_context] and context[-1]["role"] == "user"
            assert all(talk.messages[talk.num_context]["role"] == "assistant" for talk in pair[:2])
    assert read + len(refused) == 2312 and len(refused) < 30, refused[:5]
    assert all("equals" in message or "says nothing" in message for message in refused)
    print(read, refused[:3])
