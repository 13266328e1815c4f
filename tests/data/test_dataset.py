import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.data import dataset as dataset_module
from jaxllm.data import files, open_tokenizer
from jaxllm.data.config import DataConfig
from jaxllm.data.dataset import prepare
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError

ONE = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data", None))


@pytest.fixture
def book(tmp_path):
    """A text whose last part, from <LAST> on, uses words of its own."""
    path = tmp_path / "book.txt"
    path.write_text("the lazy dog 却说曹操\n" * 300 + "<LAST>\n" + "QUAGGA QUAGGA\n" * 20, encoding="utf-8")
    return path


def config(tmp_path, **fields):
    return DataConfig(**{"cache": str(tmp_path / "cache"), "tokenizer": "bpe:290"} | fields)


def open_dataset(tmp_path, length=32, **fields):
    return prepare(config(tmp_path, **fields), length=length, progress=False)


def text_of(dataset, streams):
    return [dataset.tokenizer.decode(stream.read(0, stream.index.tokens)) for stream in streams]


def test_from_text_to_batches(tmp_path, book):
    dataset = open_dataset(tmp_path, path=str(book), held_out="<LAST>")
    train, held_out = text_of(dataset, dataset.train)[0], text_of(dataset, dataset.held_out)[0]
    assert train + held_out == book.read_text(encoding="utf-8")
    assert held_out.startswith("<LAST>") and "Q" not in train
    assert (dataset.held_out_characters, dataset.held_out_bytes) == (len(held_out), len(held_out.encode()))
    batch = next(dataset.train_loader(ONE, batch_size=4, seed=0))
    assert batch.tokens.shape == (4, 32)
    assert np.asarray(batch.tokens).max() < dataset.tokenizer.vocab_size


def test_the_tokenizer_learns_from_the_training_part_alone(tmp_path, book):
    dataset = open_dataset(tmp_path, path=str(book), held_out="<LAST>")
    assert not any(b"Q" in dataset.tokenizer.token_bytes(i) for i in range(5 + 256, 290))
    with_all = open_dataset(tmp_path, path=str(book), held_out="")
    assert with_all.tokenizer.fingerprint != dataset.tokenizer.fingerprint


def test_work_is_done_once(tmp_path, book, monkeypatch):
    first = open_dataset(tmp_path, path=str(book), held_out="<LAST>")

    def fail(*_, **__):
        raise AssertionError("done again")

    monkeypatch.setattr(open_tokenizer, "train_tokenizer", fail)
    monkeypatch.setattr(dataset_module.shards, "write_streams", fail)
    again = open_dataset(tmp_path, path=str(book), held_out="<LAST>", length=16)
    assert [s.index for s in again.train] == [s.index for s in first.train]
    book.write_text(book.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="done again"):
        open_dataset(tmp_path, path=str(book), held_out="<LAST>")


def test_damaged_shard_is_told(tmp_path, book):
    open_dataset(tmp_path, path=str(book), held_out="<LAST>")
    (shard,) = (tmp_path / "cache").glob("tokens-*/train/*.arrayrecord")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"damaged: \d+ bytes instead of \d+. Delete the folder"):
        open_dataset(tmp_path, path=str(book), held_out="<LAST>")


def test_without_a_held_out_split(tmp_path, book):
    dataset = open_dataset(tmp_path, path=str(book), held_out="")
    assert dataset.held_out == () and dataset.held_out_tokens == 0
    assert list(dataset.eval_batches(ONE, batch_size=4)) == [] and dataset.num_eval_batches(4) == 0
    assert next(dataset.train_loader(ONE, batch_size=4, seed=0)).tokens.shape == (4, 32)


def test_held_out_file(tmp_path, book):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "the dog"}\n{"text": "zebra"}\n')
    dataset = open_dataset(tmp_path, path=str(book), held_out=f"file:{other}")
    assert text_of(dataset, dataset.train) == [book.read_text(encoding="utf-8")]
    assert text_of(dataset, dataset.held_out) == ["the dogzebra"] and dataset.held_out_documents == 2
    with pytest.raises(UserError, match="no such file"):
        open_dataset(tmp_path, path=str(book), held_out="file:nowhere.txt")


def test_a_held_out_file_is_not_trained_on(tmp_path, book):
    other = tmp_path / "corpus" / "test.txt"
    other.parent.mkdir()
    other.write_text("zebra " * 99)
    (other.parent / "train.txt").symlink_to(book)
    for fields in (
        {"path": str(other.parent)},
        {"path": f"{book},{other.parent}/t*.txt"},
        {"source": "mixture", "path": f"text:{book}=1,text:{other}=1"},
    ):
        with pytest.raises(UserError, match=r"test\.txt is also one of the files that are trained on"):
            open_dataset(tmp_path, held_out=f"file:{other}", **fields)
    with pytest.raises(UserError, match=r"book\.txt|train\.txt"):
        open_dataset(tmp_path, path=str(other.parent / "train.txt"), held_out=f"file:{book}")


def test_existing_tokenizer(tmp_path, book, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    dataset = open_dataset(tmp_path, path=str(book), tokenizer=str(tmp_path / "tokenizer"))
    assert dataset.tokenizer.fingerprint == tokenizer.fingerprint
    dataset.tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint


def test_mixture_draws_rows_by_weight(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("aaaa bbbb\n" * 400)
    (tmp_path / "c.jsonl").write_text('{"text": "cccc dddd"}\n' * 60)
    path = f"text:{tmp_path}/a.txt=0.75,jsonl:{tmp_path}/c.jsonl=0.25"
    dataset = open_dataset(
        tmp_path, source="mixture", path=path, held_out="0.1", tokenizer=str(tmp_path / "tokenizer"), length=16
    )
    loader = dataset.train_loader(ONE, batch_size=8, seed=0)
    texts = [dataset.tokenizer.decode(row.tolist()) for _ in range(50) for row in next(loader).tokens]
    assert sum("c" in text or "d" in text for text in texts) == len(texts) // 4
    assert len(dataset.held_out) == 2 and sum(s.index.documents for s in dataset.held_out) == 1 + 6
    assert sum(1 for _ in dataset.eval_batches(ONE, batch_size=8)) == dataset.num_eval_batches(8)
    with pytest.raises(UserError, match="of a mixture is a fraction or file:PATH"):
        open_dataset(tmp_path, source="mixture", path=path, held_out="aaaa")


def test_evaluation_covers_the_held_out_text(tmp_path, book):
    dataset = open_dataset(tmp_path, path=str(book), held_out="<LAST>", length=16)
    tokens = []
    for batch in dataset.eval_batches(ONE, batch_size=4):
        tokens += np.asarray(batch.tokens)[np.asarray(batch.loss_mask)].tolist()
    held_out = text_of(dataset, dataset.held_out)[0]
    assert sorted(tokens) == sorted([*dataset.tokenizer.encode(held_out), dataset.tokenizer.eos_id])
    # A uniform model: log2(vocabulary) bits a token.
    bits = dataset.bits_per_character(np.log(dataset.tokenizer.vocab_size))
    assert bits == pytest.approx(len(tokens) * np.log2(dataset.tokenizer.vocab_size) / len(held_out))


def test_describe(tmp_path, book):
    lines = "\n".join(open_dataset(tmp_path, path=str(book), held_out="<LAST>").describe())
    assert "290 pieces" in lines and "held out: 1 documents" in lines and "warning" not in lines
    most = "\n".join(open_dataset(tmp_path, path=str(book), held_out="0.7").describe())
    assert "warning" in most and "more than half" in most
    assert "held out: nothing" in open_dataset(tmp_path, path=str(book), held_out="").describe()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": "concatt"}, r"config\.data\.packing='concatt' is unknown. Did you mean 'concat'"),
        ({"source": "jsonl"}, "broken JSON"),
        ({"path": ""}, "No path is given"),
        ({"path": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"held_out": "2"}, "must be between 0 and 1"),
        ({"held_out": "第一回"}, "'第一回' is nowhere in the text"),
        ({"held_out": "the lazy"}, "leaves no text to train"),
        ({"tokenizer": "bpe:50000"}, r"at most \d+\. Use bpe:\d+ or less"),
        ({"tokenizer": "bpe:20"}, r"too small.*Use bpe:\d+ or more"),
        ({"tokenizer": "bpe"}, "bpe: no such tokenizer"),
        ({"tokenizer": "wordpiece:100"}, "kind"),
        ({"eval_overlap": 32}, r"eval_overlap=32 must be less than the 32 tokens"),
    ],
)
def test_mistakes(tmp_path, book, fields, message):
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path, **{"path": str(book), "held_out": "<LAST>"} | fields)
    assert not list((tmp_path / "cache").glob(".partial*"))


def test_length_of_one(tmp_path, book):
    with pytest.raises(UserError, match=r"config\.data\.length=1 must be 2 or more"):
        open_dataset(tmp_path, path=str(book), length=1)


def test_no_cache_of_text_that_cannot_be_read(tmp_path, book, monkeypatch):
    def fail(self):
        raise OSError("input/output error")
        yield

    monkeypatch.setattr(files.Reader, "_stream", property(lambda self: fail(self), lambda self, _: None), raising=False)
    with pytest.raises(UserError, match=r"book\.txt: cannot be read: input/output error"):
        open_dataset(tmp_path, path=str(book))


def test_sanguo(tmp_path, shared_file):
    path = shared_file("sanguoyanyi.txt")
    dataset = open_dataset(tmp_path, path=str(path), held_out="第一百十五回", tokenizer="bpe:6000", length=128)
    train, held_out = text_of(dataset, dataset.train)[0], text_of(dataset, dataset.held_out)[0]
    assert train + held_out == path.read_text(encoding="utf-8")
    assert held_out.startswith("第一百十五回") and "第一百十五回" not in train
    assert (dataset.held_out_characters, dataset.held_out_bytes) == (28_103, 84_058)
    predicted = sum(int(np.asarray(b.loss_mask).sum()) for b in dataset.eval_batches(ONE, batch_size=32))
    assert predicted == dataset.held_out_tokens
