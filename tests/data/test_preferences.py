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
    ({"chosen": HH + " ", "rejected": HH + " no"}, "", (PlainText(HH, " "), PlainText(HH, " no"), 0)),
    ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "tools": "[{}]"}, "",
     (Conversation([ASK, GOOD], 1, [{}]), Conversation([ASK, BAD], 1, [{}]), 0)),
])  # fmt: skip
def test_formats(value, fields, expected):
    """Those of TRL: an explicit prompt and an implicit one, texts and conversations; and HH as it stands."""
    assert read(value, fields) == expected


@pytest.mark.parametrize("value", [
    {"chosen": HH + " so", "rejected": HH + " no\n\nHuman: x"},
    {"prompt": HH, "chosen": " so", "rejected": " no\n\nHuman: x"},
])  # fmt: skip
def test_dialogues_become_conversations(value):
    chosen, rejected, _ = read(value, dialogues=True)
    shared = [("user", "hi"), ("assistant", "yes?"), ("user", "why")]
    of = lambda talk: [(message["role"], message["content"]) for message in talk.messages]  # noqa: E731
    assert of(chosen) == [*shared, ("assistant", "so")] and chosen.num_context == 3
    assert of(rejected) == [*shared, ("assistant", "no"), ("user", "x")] and rejected.num_context == 3


@pytest.mark.parametrize("value, says", [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' equals 'rejected': there is nothing to prefer"),
    ({"prompt": "a", "chosen": "b"}, "no field 'rejected'.*its fields are prompt, chosen"),
    ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "'chosen' is a str and 'rejected' a list"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "says nothing after the prompt 'a'"),
    ({"chosen": HH + " ", "rejected": HH}, "says nothing after the prompt"),
    ({"chosen": "abc", "rejected": "xyz"}, "begin with nothing that they share"),
    ({"chosen": "\n\nHuman: hi you\n\nAssistant: a", "rejected": "\n\nHuman: hi all\n\nAssistant: b"},
     "begin with nothing that they share and that could be"),
    ({"chosen": [ASK, GOOD], "rejected": [GOOD]}, "share 0 messages of 2 and 1"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK]}, "share 1 messages of 2 and 1"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "'margin' is 'much'"),
    ("b", "a str, but each record must be an object"),
])  # fmt: skip
def test_bad_records_are_named(value, says):
    with pytest.raises(UserError, match=rf"a\.jsonl:7: .*{says}"):
        read(value)


def test_dialogues_equal_but_for_white_space():
    value = {"chosen": HH + " so", "rejected": HH + "  so\n"}
    assert read(value)[:2] == (PlainText(HH, " so"), PlainText(HH, "  so\n"))
    with pytest.raises(UserError, match=r"a\.jsonl:7: 'chosen' equals 'rejected'"):
        read(value, dialogues=True)


def pairs_of(row, places=0):
    """(number, prompt, chosen, rejected, margin) of each pair in a row; asserts what a row promises."""
    found = []
    last = int(row.segment_ids.max())
    assert last % 2 == 0 and last <= 2 * MAX_PAIRS
    for segment in range(1, last, 2):
        both = [row.segment_ids == s for s in (segment, segment + 1)]
        texts = [row.tokens[where][~row.loss_mask[where]][places:].tolist() for where in both]
        said = [row.tokens[where][row.loss_mask[where]].tolist() for where in both]
        assert texts[0] == texts[1] and all(said)
        for where in both:
            assert row.positions[where].tolist() == list(range(where.sum()))
            assert not row.loss_mask[where][: places + 1].any() and len(set(row.pair_ids[where])) == 1
        assert row.pair_ids[both[0]][0] == row.pair_ids[both[1]][0] > 0
        assert not row.margins[both[0]][1:].any() and not row.margins[both[1]].any()
        found.append((row.pair_ids[both[0]][0], *map(tuple, (texts[0], *said)), row.margins[both[0]][0]))
    assert not row.pair_ids[row.segment_ids == 0].any()
    return found


def all_pairs(batches, places=0):
    rows = [PairBatch(*row) for batch in batches for row in zip(*map(np.asarray, batch), strict=True)]
    return [pair for row in rows for pair in pairs_of(row, places)]


@pytest.mark.parametrize("packing, places", [("best_fit", 0), ("best_fit", 3), ("none", 0)])
def test_rows_hold_whole_pairs(config, packing, places):
    """Two segments each with one prompt, the chosen first; each pair once an epoch, with its number and margin."""
    write(config, records := list(many()))
    config = dataclasses.replace(config, packing=packing)
    data = prepare(config, length=96, kind=PAIRS, places=places, progress=False)
    rows = data.rows_an_epoch()
    assert (rows == 60) == (packing == "none")
    found = all_pairs([next(data.train_loader(ONE, batch_size=rows, seed=0))], places)
    assert sorted(number for number, *_ in found) == list(range(1, 61)) and data.num_pairs == 60
    for number, prompt, chosen, rejected, margin in found:
        texts = [data.tokenizer.decode(ids).strip() for ids in (prompt, chosen, rejected)]
        record = records[number - 1]
        assert texts == [record[name].strip() for name in ("prompt", "chosen", "rejected")]
        assert margin == np.float32(record.get("margin", 0))
    told = data.describe()
    assert told[1].startswith("train: 60 pairs, ")
    means = [np.mean([len(pair[i]) for pair in found]) for i in (2, 3)]
    assert told[2] == f"train: {means[0]:.1f} tokens in a chosen response, {means[1]:.1f} in a rejected"
    assert sorted(all_pairs(data.every_pair(ONE, batch_size=2), places)) == sorted(found)


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
    found = {
        number: (prompt + chosen, prompt + no)
        for number, prompt, chosen, no, _ in all_pairs(cut.every_pair(ONE, batch_size=1))
    }
    encode = cut.tokenizer.encode
    whole = [[cut.tokenizer.bos_id, *encode("why? "), *encode(long[name])] for name in ("chosen", "rejected")]
    assert list(found[2][1]) == [*whole[1], cut.tokenizer.eos_id]
    assert list(found[2][0]) == whole[0][: 96 - len(found[2][1])]
    assert "train: longer than a row: 1 cut, 0 left out (config.data.truncation=cut)" in cut.describe()


def test_a_mixture_draws_pairs_by_weight(config, tmp_path):
    """Each with a number of its own over all streams, whatever is held out of each."""
    write(config, many(30))
    with open(tmp_path / "b.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": f"{n}! ", "chosen": "dog", "rejected": "fox"}) + "\n" for n in range(10))
    path = f"jsonl:{config.path}=3,jsonl:{tmp_path}/b.jsonl=1"
    mixed = dataclasses.replace(config, source="mixture", path=path, packing="none", held_out="0.1")
    data = prepare(mixed, length=96, kind=PAIRS, progress=False)
    numbers = [number for number, *_ in all_pairs([next(data.train_loader(ONE, batch_size=36, seed=0))])]
    assert len(set(numbers)) == 36 and sum(number <= 27 for number in numbers) == 27 and max(numbers) == 36
    assert sorted(number for number, *_ in all_pairs(data.every_pair(ONE, batch_size=4))) == list(range(1, 41))


def test_pairs_are_not_supervised_whole(config):
    write(config, many())
    with pytest.raises(UserError, match=r"config\.data\.supervise=all: of pairs the responses are compared"):
        prepare(dataclasses.replace(config, supervise="all"), length=96, kind=PAIRS, progress=False)


@pytest.mark.parametrize("template", ["", "zephyr"])
def test_the_hh_file(shared_file, config, template):
    """All 2,312 pairs, raw, as texts or as conversations; in four of them an answer is empty, and only ends."""
    path = str(shared_file("hh_rlhf_harmless_test.jsonl.gz"))
    config = dataclasses.replace(config, path=path, chat_template=template)
    data = prepare(config, length=1 << 14, kind=PAIRS, progress=False)
    assert data.num_pairs == 2312 and data.describe()[1].startswith("train: 2,312 pairs, ")
    (stream,), silent = data.train, 0
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)[name] for line in file for name in ("chosen", "rejected")]
    prompts = []
    for text, start, end in zip(texts, stream.document_starts[:-1], stream.document_starts[1:], strict=True):
        tokens, learned = stream.read(start, end - start), stream.is_supervised(start, end - start)
        first = int(np.argmax(learned))
        shown = data.tokenizer.decode(tokens.tolist())
        prompts.append(tokens[:first].tolist())
        silent += not data.tokenizer.decode(tokens[first:][learned[first:]].tolist()).strip()
        if template:
            assert shown.count("\n<|assistant|>\n") == text.count("\n\nAssistant:")
            assert data.tokenizer.decode(prompts[-1]).endswith("\n<|assistant|>\n")
        else:
            assert shown.strip() == text.strip() and learned[first:].all()
            assert data.tokenizer.decode(prompts[-1]).endswith("\n\nAssistant:")
    assert prompts[::2] == prompts[1::2] and silent == 4
