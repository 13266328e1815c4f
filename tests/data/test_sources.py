import gzip
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from array_record.python import array_record_module

from jaxllm.data.config import DataConfig
from jaxllm.data.sources import kind_of, open_components, open_source
from jaxllm.errors import UserError

TEXTS = ["the first\n", "第二 document", "  third\t\r\n"]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def read(kind, path, field="text"):
    return [document.text for document in open_source(kind, str(path), field).documents()]


def write_records(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_text_files_globs_folders(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    (tmp_path / "notes.md").write_text("not a .txt")
    (tmp_path / "empty.txt").write_text("")  # found, not named: no mistake
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.txt.gz").write_bytes(gzip.compress(b"deep"))
    assert read("text", tmp_path) == [*TEXTS, "deep"]
    assert read("text", tmp_path / "[01].txt") == TEXTS[:2]
    assert read("text", f"{tmp_path}/2.txt, {tmp_path}/0.txt,{tmp_path}/?.txt") == [TEXTS[2], TEXTS[0], TEXTS[1]]
    assert read("text", tmp_path / "**" / "deep*") == ["deep"]


def test_byte_order_mark_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa\ufeffb".encode())
    assert read("text", tmp_path / "a.txt") == ["a\ufeffb"]


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_jsonl(tmp_path, end):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[end]
    path = tmp_path / f"a.jsonl{end}"
    path.write_bytes(pack(LINES[:50]) + pack(LINES[50:] + b"\n\n"))  # two gzip members, two zstandard frames
    documents = list(open_source("jsonl", str(path)).documents())
    assert [d.text for d in documents] == TEXTS
    assert documents[1].origin == f"{path}:2"
    assert 0 < documents[0].progress <= documents[-1].progress <= 1


@pytest.mark.parametrize(("end", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_compressed_file_cut_off(tmp_path, end, pack):
    path = tmp_path / f"a.jsonl{end}"
    packed = pack(b"".join(b'{"text": "%d"}\n' % (i * 7919 % 9973) for i in range(5000)))
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl.*(broken or cut off|broken JSON)"):
        read("jsonl", path)
    path.write_bytes(packed[:-3])
    with pytest.raises(UserError, match="broken or cut off"):
        read("jsonl", path)
    path.write_bytes(b"this is not compressed\n")
    with pytest.raises(UserError, match="broken or cut off"):
        read("jsonl", path)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"id": [1, 2, 3], "text": TEXTS}), path)
    assert read("parquet", tmp_path) == TEXTS
    with pytest.raises(UserError, match=r"a\.parquet: no column 'body'\. There are: id, text"):
        read("parquet", path, "body")
    with pytest.raises(UserError, match="row 0: field 'id' is a int, but must be text"):
        read("parquet", path, "id")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet: not a parquet file, or a broken one"):
        read("parquet", path)


def test_arrayrecord(tmp_path):
    path = tmp_path / "a.array_record"
    write_records(path, LINES.splitlines())
    assert read("arrayrecord", tmp_path) == TEXTS
    write_records(path, [text.encode() for text in TEXTS])
    assert read("arrayrecord", path, "") == TEXTS
    with pytest.raises(UserError, match=r"record 0: no JSON object.*config\.data\.field=''"):
        read("arrayrecord", path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="not an ArrayRecord file, or a broken one"):
        read("arrayrecord", path, "")


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A prepared dataset "tiny" as tfds leaves it, in ArrayRecord."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int32)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(20):
                yield i, {"text": f"document {i} 曹操", "n": i}

    folder = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_tfds(tfds_folder):
    texts = read("tfds:tiny:train", tfds_folder)
    assert sorted(texts) == sorted(f"document {i} 曹操" for i in range(20))
    assert read("tfds:tiny", tfds_folder) == texts
    assert len(read("tfds:tiny:train[:50%]", tfds_folder)) == 10
    json.dumps(open_source("tfds:tiny", str(tfds_folder)).identity())
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("source", "field", "message"),
    [
        ("tfds:tiny:valid", "text", "Unknown split 'valid'"),
        ("tfds:no_such_set", "text", "no_such_set not found"),
        ("tfds:tiny", "body", "no field 'body'. There are: n, text"),
        ("tfds:a b", "text", "write tfds:name:split or tfds:name/config:split"),
    ],
)
def test_tfds_mistakes(tfds_folder, source, field, message):
    with pytest.raises(UserError, match=message):
        read(source, tfds_folder, field)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt: the file is empty"),
        (b" \n\n", "a.txt: the file is empty"),
        (b"abc\0def", "a.txt: a binary file, not text: NUL at byte 3"),
        (b"abc\n\xb2\xdc\xb2\xd9", "a.txt: not UTF-8: byte 0xb2 at byte 4"),
        ("曹".encode()[:2], "a.txt: not UTF-8: byte 0xe6 at byte 0"),
        ("abc".encode("utf-16"), "a.txt: this is UTF-16"),
    ],
)
def test_bad_text(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read("text", tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.jsonl: the file is empty"),
        (b'{"text": "a"}\n{"text": ', r"a\.jsonl:2: broken JSON"),
        (b'{"text": "a"}\n\n["a"]\n', r"a\.jsonl:3: a list, but each record must be an object"),
        (b'{"body": "a", "id": 1}\n', r"a\.jsonl:1: no field 'text'\. There are: body, id"),
        (b'{"text": 7}\n', r"a\.jsonl:1: field 'text' is a int, but must be text"),
        (b'{"text": null}\n', r"a\.jsonl:1: field 'text' is a NoneType"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8: byte 0xff at byte 24"),
        (b'{"text": "\\ud800"}\n', r"a\.jsonl:1: field 'text' holds half a surrogate pair"),
        (b'{"text": ""}\n{"text": " "}\n', "no document"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read("jsonl", tmp_path / "a.jsonl")


def test_missing_files(tmp_path):
    (tmp_path / "story.txt").write_text("a")
    with pytest.raises(UserError, match=r"stroy\.txt: no such file or folder\. Did you mean .*story\.txt"):
        open_source("text", str(tmp_path / "stroy.txt"))
    with pytest.raises(UserError, match="Not even the folder"):
        open_source("text", str(tmp_path / "nowhere" / "a.txt"))
    with pytest.raises(UserError, match="no file matches"):
        open_source("text", str(tmp_path / "*.text"))
    with pytest.raises(UserError, match="the folder holds no jsonl files"):
        open_source("jsonl", str(tmp_path))
    with pytest.raises(UserError, match="No path is given"):
        open_source("text", "")
    with pytest.raises(UserError, match=r"'txet' is no source of data\. Did you mean 'text'"):
        open_source("txet", str(tmp_path))


def test_nothing_but_empty_files(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="no document"):
        read("text", tmp_path)


def test_identity_follows_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    before = open_source("text", str(path)).identity()
    assert before == open_source("text", f"{tmp_path}/*.txt").identity()
    path.write_text("abcd")
    assert before != open_source("text", str(path)).identity()


def test_mixture(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.jsonl").write_text('{"text": "c"}')
    path = f"text:{tmp_path}/a.txt,{tmp_path}/b.txt=0.75, jsonl:{tmp_path}/c.jsonl=1"
    first, second = open_components(DataConfig(source="mixture", path=path))
    assert [d.text for d in first.source.documents()] == ["a", "b"]
    assert [d.text for d in second.source.documents()] == ["c"]
    assert (first.weight, second.weight) == (0.75, 1.0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is no mixture"),
        ("text:{a}", "is no mixture"),
        ("text:{a}=1,jsonl:b", "is no mixture"),
        ("{a}=1", "has no kind"),
        ("text:{a}=0", "weight '0' of text:.* must be a number above 0"),
        ("text:{a}=-1", "weight '-1'"),
        ("text:{a}=nan", "weight 'nan'"),
        ("text:{a}=much", "weight 'much'"),
        ("texd:{a}=1", "Did you mean 'text'"),
    ],
)
def test_mixture_mistakes(tmp_path, path, message):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=message):
        open_components(DataConfig(source="mixture", path=path.replace("{a}", str(tmp_path / "a.txt"))))


def test_kind_of():
    names = ["a.txt", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.array_record", "f.json.gz", "g.tsv", "noname"]
    assert [kind_of(name) for name in names] == [
        "text",
        "jsonl",
        "jsonl",
        "parquet",
        "arrayrecord",
        "json",
        "csv",
        "text",
    ]


def test_a_number_that_json_does_not_take(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ' + "1" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: broken JSON: Exceeds the limit"):
        list(open_source("jsonl", str(tmp_path / "a.jsonl")).documents())


def test_parquet_text_that_is_not_utf8(tmp_path):
    offsets = pa.py_buffer(np.array([0, 2], np.int32).tobytes())
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: not UTF-8 in column 'text'"):
        list(open_source("parquet", str(tmp_path / "a.parquet")).documents())
