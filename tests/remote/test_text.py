"""Text in a bucket is read as that on a disk is."""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from jaxllm.data.config import DataConfig
from jaxllm.data.dataset import prepare
from jaxllm.data.files import find_files, identity
from jaxllm.data.sources import open_source
from jaxllm.errors import UserError
from jaxllm.remote.storage import filesystem

LINES = "\n".join(json.dumps({"text": text}) for text in ("却说曹操", "the fox"))


def parquet() -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["却说曹操", "the fox"]}), written)
    return written.getvalue()


CONTENTS = {
    "text": ("a.txt", "却说曹操".encode()),
    "jsonl": ("a.jsonl", LINES.encode()),
    "json": ("a.json.gz", gzip.compress(f"[{','.join(LINES.splitlines())}]".encode())),
    "csv": ("a.csv", "text,n\n却说曹操,1\nthe fox,2\n".encode()),
    "parquet": ("a.parquet", parquet()),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_every_kind_is_read(bucket, kind):
    name, data = CONTENTS[kind]
    filesystem(bucket).pipe_file(f"{bucket}/{name}", data)
    texts = [document.text for document in open_source(kind, f"{bucket}/{name}").documents()]
    assert texts == ["却说曹操"] if kind == "text" else ["却说曹操", "the fox"]


def test_folders_and_globs_in_order(bucket):
    store = filesystem(bucket)
    for name in ("b.txt", "a.txt", "deep/c.txt.gz", "d.jsonl", "a/checkpoints.txt"):
        store.pipe_file(f"{bucket}/{name}", b"x")
    found = [str(file.path).removeprefix(f"{bucket}/") for file in find_files(bucket, (".txt",), "text")]
    assert found == ["a.txt", "a/checkpoints.txt", "b.txt", "deep/c.txt.gz"]
    found = find_files(f"{bucket}/*.txt,{bucket}/b.txt,{bucket}/deep/**", (".txt",), "text")
    assert [file.path.name for file in found] == ["a.txt", "b.txt", "c.txt.gz"]


def test_identity_changes_with_the_content(bucket):
    def now():
        return identity(find_files(f"{bucket}/a.txt", (".txt",), "text"))

    filesystem(bucket).pipe_file(f"{bucket}/a.txt", b"abc")
    first = now()
    assert now() == first
    filesystem(bucket).pipe_file(f"{bucket}/a.txt", b"abd")
    assert now() != first


def test_tokens_are_those_of_the_same_text_on_a_disk(bucket, tmp_path):
    text = "the quick brown fox jumps over the lazy dog\n" * 50
    filesystem(bucket).pipe_file(f"{bucket}/a.txt", text.encode())
    (tmp_path / "a.txt").write_text(text)

    def digests(path):
        config = DataConfig(path=str(path), tokenizer="bpe:300", held_out="0.1", cache=str(tmp_path / "cache"))
        data = prepare(config, length=16)
        return [stream.index.digest for stream in (*data.train, *data.held_out)]

    assert digests(f"{bucket}/a.txt") == digests(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("bucket/none.txt", "no such file or folder"),
        ("bucket/none/*.txt", "no file matches this glob"),
        ("no-such-bucket/a.txt", "there is no bucket"),
    ],
)
def test_what_is_not_there(store, path, said):
    with pytest.raises(UserError, match=f"{path.partition('*')[0]}.*{said}"):
        open_source("text", f"{store[0]}://{path}")


def test_array_records_stay_on_a_disk(bucket):
    filesystem(bucket).pipe_file(f"{bucket}/a.arrayrecord", b"x")
    with pytest.raises(UserError, match="Copy them to a local folder"):
        list(open_source("arrayrecord", f"{bucket}/a.arrayrecord").documents())
