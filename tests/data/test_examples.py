"""Examples from their records to rows: formats, bad input by file and line, packing, truncation, the held-out split."""

import dataclasses
import json

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.data.batch import EXAMPLES, Batch
from jaxllm.data.chat_template import named_template
from jaxllm.data.config import DataConfig
from jaxllm.data.dataset import prepare
from jaxllm.data.examples import Conversation, PlainText, parse_fields, plain, read_example
from jaxllm.data.packing import best_fit_decreasing, fill_bins
from jaxllm.data.sources import Record
from jaxllm.errors import UserError

ONE = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data", None))
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "the fox"}
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "the fox"}]
SYSTEM, SAID_BY_SYSTEM = {"role": "system", "content": "be kind"}, {"from": "system", "value": "be kind"}


def read(value, fields=""):
    return read_example(Record(value, "a.jsonl:7"), parse_fields(fields))


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    return DataConfig(
        source="jsonl",
        tokenizer=str(tmp_path / "tokenizer"),
        chat_template="zephyr",
        packing="best_fit",
        held_out="",
        cache=str(tmp_path / "cache"),
    )


def open_dataset(config, length=64, **fields):
    return prepare(dataclasses.replace(config, **fields), length=length, kind=EXAMPLES, progress=False)


@pytest.mark.parametrize(
    ("record", "fields", "example"),
    [
        ({"messages": [USER, ANSWER], "text": "x"}, "", Conversation([USER, ANSWER])),
        (
            {"messages": [USER, ANSWER], "tools": '[{"name": "f"}]'},
            "",
            Conversation([USER, ANSWER], 0, [{"name": "f"}]),
        ),
        ({"talk": [USER, ANSWER]}, "messages=talk", Conversation([USER, ANSWER])),
        ({"messages": {"role": ["user", "assistant"], "content": ["hi", "the fox"]}}, "", Conversation([USER, ANSWER])),
        ({"prompt": "a ", "completion": "b"}, "", PlainText("a ", "b")),
        ({"q": "a ", "r": {"best": ["b"]}}, "prompt=q, completion=r.best.0", PlainText("a ", "b")),
        ({"prompt": [USER], "completion": [ANSWER]}, "", Conversation([USER, ANSWER], 1)),
        ({"instruction": "hi", "input": "", "output": "the fox"}, "", Conversation([USER, ANSWER])),
        ({"instruction": "hi", "input": None, "output": "the fox"}, "", Conversation([USER, ANSWER])),
        (
            {"instruction": "do", "input": "x", "output": "the fox"},
            "",
            Conversation([{"role": "user", "content": "do\nx"}, ANSWER]),
        ),
        ({"text": "a text"}, "", PlainText("", "a text")),
        ({"conversations": SHAREGPT}, "", Conversation([USER, ANSWER])),
        ({"talk": SHAREGPT}, "messages=talk", Conversation([USER, ANSWER])),
        ({"conversations": [USER, ANSWER]}, "", Conversation([USER, ANSWER])),
        ({"conversations": SHAREGPT, "system": "be kind"}, "", Conversation([SYSTEM, USER, ANSWER])),
        ({"conversations": [SAID_BY_SYSTEM, *SHAREGPT], "system": "x"}, "", Conversation([SYSTEM, USER, ANSWER])),
        (
            {"conversations": [*SHAREGPT, {"from": "observation", "value": "4"}, SHAREGPT[1]]},
            "",
            Conversation([USER, ANSWER, {"role": "tool", "content": "4"}, ANSWER]),
        ),
        ({"a.b": "a text"}, "text=a.b", PlainText("", "a text")),
    ],
)
def test_formats(record, fields, example):
    assert read(record, fields) == example


def test_what_tfds_makes_of_a_record():
    messages = {"role": np.array([b"user", b"assistant"]), "content": np.array([b"hi", b"the fox"], object)}
    assert read({"messages": messages}) == Conversation([USER, ANSWER])
    assert plain({"a": (b"x", np.array([1]))}) == {"a": ["x", [1]]}


def message(role="user", **fields):
    return {"messages": [{"role": role, **fields}, ANSWER]}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ([], "a list, but each example must be an object"),
        (
            {"question": "x"},
            "no example: its fields are question. Wanted: messages; or conversations; or prompt",
        ),
        ({"prompt": "x"}, "no field 'completion' beside 'prompt'"),
        ({"completion": "x", "prompt": None}, "no field 'prompt' beside 'completion'"),
        ({"instruction": "x"}, "no field 'output' beside 'instruction'"),
        ({"prompt": "x", "completion": " \n"}, "'completion' is empty, so there is nothing to learn"),
        ({"instruction": "x", "output": ""}, "'output' is empty"),
        ({"text": ""}, "'text' is empty"),
        ({"prompt": "x", "completion": 3}, "'completion' is a int, but must be text"),
        ({"prompt": "x", "completion": [ANSWER]}, "'prompt' is a str and 'completion' a list: both must be"),
        ({"messages": []}, "'messages' is empty, but must be a list of messages"),
        ({"messages": "hi"}, "'messages' is a str, but must be a list of messages"),
        ({"messages": ["hi"]}, "message 1 of 'messages' is a str, but must be an object with role and content"),
        ({"conversations": [{"from": "humam", "value": "x"}]}, "of 'conversations': the role 'humam' is unknown"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, r"the role \['gpt'\] is unknown"),
        ({"conversations": [{"from": "gpt"}]}, r"message 1 of 'conversations' \(assistant\) has no content"),
        (message("human", content="x"), "message 1 of 'messages': the role 'human' is unknown. Write 'user'."),
        (message("asistant", content="x"), "the role 'asistant' is unknown. Did you mean 'assistant'?"),
        ({"messages": [{"content": "x"}]}, "message 1 of 'messages': no role"),
        (message(), r"message 1 of 'messages' \(user\) has no content"),
        (message(content=None), r"\(user\) has no content"),
        (message(content="\ud83d"), "half a surrogate pair"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "'tools' is no JSON"),
        ({"messages": [USER, ANSWER], "tools": 1}, "'tools' is a int, but must be a list"),
    ],
)
def test_bad_records_by_line(record, says):
    with pytest.raises(UserError, match=f"^a.jsonl:7: .*{says}"):
        read(record)


@pytest.mark.parametrize(
    ("fields", "says"),
    [("promt=x", "'promt' is a field of no format. Did you mean 'prompt'"), ("prompt", "write for example prompt=")],
)
def test_bad_names_of_fields(fields, says):
    with pytest.raises(UserError, match=says):
        parse_fields(fields)


GOOD = {"messages": [USER, ANSWER]}


@pytest.mark.parametrize(
    ("record", "changes", "says"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, {}, "the role 'robot' is unknown"),
        ({"prompt": "x", "completion": ""}, {}, "'completion' is empty"),
        ({"messages": [USER]}, {}, "no message of the assistant"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, {}, "the template zephyr knows .* is tool"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, {}, "and no tool_calls"),
        ({"prompt": "the fox " * 40, "completion": "x"}, {}, r"has 124 tokens, and a row 64; 1 of 2 are too long"),
        (GOOD, {"chat_template": "", "length": 64}, "a conversation needs a chat template"),
    ],
)
def test_bad_examples_by_line(config, tmp_path, record, changes, says):
    path = write(tmp_path / "a.jsonl", [{"text": "the fox"} if changes else GOOD, record])
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{says}"):
        open_dataset(config, path=path, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"packing": "concat"}, "config.data.packing='concat': examples stay whole. Use best_fit"),
        ({"supervise": "answers"}, "config.data.supervise='answers' is unknown"),
        ({"truncation": "cutt"}, "config.data.truncation='cutt' is unknown. Did you mean 'cut'"),
        ({"chat_template": "chatlm"}, "config.data.chat_template='chatlm': Did you mean 'chatml'"),
        ({"chat_template": "no.jinja"}, "config.data.chat_template='no.jinja': no such file"),
        ({"chat_template": "chatml"}, r"chatml writes <\|im_start\|>, <\|im_end\|>, special tokens that the tokenizer"),
        ({"held_out": "some words"}, "held_out of examples is a fraction or file:PATH"),
        (
            {"source": "text"},
            "a file of kind text holds no examples. Set config.data.source to jsonl, json, par",
        ),
    ],
)
def test_bad_settings(config, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        open_dataset(config, path=write(tmp_path / "a.jsonl", [GOOD]), **changes)


def rows(dataset, seed=0):
    """An epoch of rows, as the loader packs them."""
    (stream,) = dataset.train
    packed = dataset._rows(stream, seed)
    return [packed[i] for i in range(len(packed))]


def segments(batch: Batch):
    """The examples of a row: tokens and loss mask of each."""
    for segment in range(1, batch.segment_ids.max() + 1):
        inside = batch.segment_ids == segment
        assert batch.positions[inside].tolist() == list(range(inside.sum()))
        yield tuple(batch.tokens[inside].tolist()), tuple(batch.loss_mask[inside].tolist())


def many(number=150):
    random = np.random.default_rng(0)
    for i in range(number):
        words = " ".join(random.choice(["the", "quick", "brown", "fox", "曹操"], random.integers(1, 20)))
        yield {"messages": [{"role": "user", "content": f"{i} {words}"}, ANSWER]} if i % 3 else {"text": words}


def test_packed_rows_hold_the_examples_of_unpacked_ones(config, tmp_path):
    path = write(tmp_path / "a.jsonl", many())
    packed, single = (open_dataset(config, path=path, packing=packing) for packing in ("best_fit", "none"))
    together, alone = ([found for row in rows(d) for found in segments(row)] for d in (packed, single))
    assert sorted(together) == sorted(alone) and len(alone) == 150 == single.rows_an_epoch()
    assert packed.rows_an_epoch() < 100
    assert sum(sum(mask) for _, mask in alone) == single.train[0].index.supervised
    for _, mask in alone:
        assert not mask[0] and mask[-2 if len(mask) > 2 else -1]
    for row in rows(packed):
        padding = row.segment_ids == 0
        assert not row.loss_mask[padding].any() and not np.diff(padding.astype(int)).min() < 0


def test_padding_is_known_by_length(config, tmp_path):
    """The tokenizer's pad and eos tokens inside an example are tokens like any other."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<pad>{{ m.content }}<pad></s>{% endfor %}")
    path = write(tmp_path / "a.jsonl", [GOOD])
    (row,) = rows(open_dataset(config, path=path, chat_template=str(tmp_path / "t.jinja")))
    assert (row.tokens[row.segment_ids == 1] == 0).sum() == 4
    assert (row.tokens[row.loss_mask] == 0).sum() == 2 and (row.tokens[row.loss_mask] == 3).sum() == 1


def test_the_held_out_split_is_by_example(config, tmp_path):
    path = write(tmp_path / "a.jsonl", many())
    whole = {found for row in rows(open_dataset(config, path=path)) for found in segments(row)}
    dataset = open_dataset(config, path=path, held_out="0.1")
    batches = list(dataset.eval_batches(ONE, batch_size=2))
    assert len(batches) == dataset.num_eval_batches(2)
    held_out = [found for batch in batches for row in zip(*map(np.asarray, batch), strict=True) for found in
                segments(Batch(*row))]  # fmt: skip
    train = [found for row in rows(dataset) for found in segments(row)]
    assert len(held_out) == 15 == dataset.held_out_documents and len(train) == 135
    assert set(held_out) | set(train) == whole and not set(held_out) & set(train)
    few = open_dataset(config, path=write(tmp_path / "few.jsonl", list(many())[:7]), held_out="0.01")
    assert (few.held_out_documents, few.train_documents) == (1, 6)
    from_file = open_dataset(config, path=path, held_out=f"file:{tmp_path / 'few.jsonl'}")
    assert (from_file.held_out_documents, from_file.train_documents) == (7, 150)


def test_truncation(config, tmp_path):
    """One that fits, one whose answer is cut, one of which nothing to learn is left."""
    long = {"messages": [USER, {"role": "assistant", "content": "the fox " * 50}]}
    lost = {"messages": [{"role": "user", "content": "the fox " * 50}, ANSWER]}
    path = write(tmp_path / "a.jsonl", [GOOD, lost, long])
    with pytest.raises(UserError, match=r"a\.jsonl:2: .* 2 of 3 are too long \(the longest 1\d\d\)"):
        open_dataset(config, path=path)
    cut, dropped = (open_dataset(config, path=path, truncation=t, packing="none") for t in ("cut", "drop"))
    assert (cut.rows_an_epoch(), dropped.rows_an_epoch()) == (2, 1)
    assert "train: longer than a row: 1 cut, 1 left out (config.data.truncation=cut)" in cut.describe()
    assert "train: longer than a row: 0 cut, 2 left out (config.data.truncation=drop)" in dropped.describe()
    assert not any("longer" in line for line in open_dataset(config, 512, path=path).describe())
    full = max(rows(cut), key=lambda row: row.segment_ids.sum())
    assert full.segment_ids.all() and full.loss_mask[-1]
    nothing = write(tmp_path / "b.jsonl", [lost])
    with pytest.raises(UserError, match=r"b\.jsonl:1: .*none is short enough"):
        open_dataset(config, path=nothing, truncation="cut")


def test_sources_and_mixtures(config, tmp_path):
    """Parquet, and two sources by weight."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 3), tmp_path / "a.parquet")
    texts = write(tmp_path / "b.jsonl", [{"text": f"{i} the lazy dog"} for i in range(9)])
    mixed = f"parquet:{tmp_path}/a.parquet=3,jsonl:{texts}=1"
    dataset = open_dataset(config, source="mixture", path=mixed, packing="none")
    batch = next(dataset.train_loader(ONE, batch_size=40, seed=0))
    texts = [dataset.tokenizer.decode(row) for row in np.asarray(batch.tokens)]
    assert sum(text.endswith("the lazy dog") for text in texts) == 10
    assert sum(text.startswith("\nhi\n<|assistant|>\nthe fox") for text in texts) == 30


def test_the_tokenizer_learns_from_examples_and_knows_the_template(config, tmp_path):
    path = write(tmp_path / "a.jsonl", many())
    dataset = open_dataset(config, path=path, tokenizer="bpe:325", chat_template="chatml", truncation="cut")
    assert {"<|im_start|>", "<|im_end|>"} <= set(dataset.tokenizer.specials)
    assert any(dataset.tokenizer.token_bytes(i) == b" brown" for i in range(325))
    dataset.tokenizer.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == named_template("chatml")


@pytest.mark.parametrize("capacity", [8, 64, 500])
def test_bins_hold_each_item_once(capacity):
    for seed in range(20):
        sizes = np.random.default_rng(seed).integers(1, capacity + 1, 3 * seed)
        packed, ends = fill_bins(sizes, capacity)
        assert sorted(packed.tolist()) == list(range(len(sizes)))
        bins = np.split(packed, ends[:-1])
        assert all(0 < sizes[items].sum() <= capacity for items in bins) or not len(sizes)
        again = fill_bins(sizes, capacity)
        assert (packed == again[0]).all() and (ends == again[1]).all()


def test_bins_are_filled_better_than_by_best_fit():
    sizes = np.clip(np.random.default_rng(0).lognormal(5.39, 0.34, 5000), 90, 800).astype(int)
    filled, usual = (sizes.sum() / 1024 / len(pack(sizes, 1024)[1]) for pack in (fill_bins, best_fit_decreasing))
    assert filled > 0.99 and usual < 0.985


@pytest.mark.parametrize(
    ("name", "fields", "length"),
    [
        ("gsm8k_train.jsonl", "instruction=question,output=answer", 1024),
        ("self_instruct_seed_tasks.jsonl", "input=instances.0.input,output=instances.0.output", 1024),
    ],
)
def test_real_sets_fill_98_percent(shared_file, tmp_path_factory, config, name, fields, length):
    """Slots of the training rows that hold a token; a set of few rows has no more of them than it needs."""
    settings = {"fields": fields, "tokenizer": "bpe:2000", "truncation": "drop", "held_out": "0.01"}
    cache = str(tmp_path_factory.getbasetemp() / "real")
    dataset = open_dataset(config, length, path=str(shared_file(name)), cache=cache, **settings)
    (stream,) = dataset.train
    packing = dataset._packings[stream]
    counted = sum(span.length for row in range(packing.num_rows) for span in packing.spans(row, 0))
    assert packing.filled > 0.98 or packing.num_rows == -(-counted // length)
    assert counted == pytest.approx(packing.filled * packing.num_rows * length)
