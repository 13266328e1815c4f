import itertools
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxllm.data import shards
from jaxllm.data.held_out import Piece
from jaxllm.errors import UserError

TEXTS = ["the lazy dog\n", "", "却说曹操引兵", "quick brown fox\n" * 3000]


@pytest.fixture
def folder(tokenizer, tmp_path):
    pieces = [Piece(text, False, True, 1.0) for text in TEXTS if text]
    pieces += [Piece("cut ", False, False, 1.0), Piece("in two 曹", True, True, 1.0)]
    shards.write_streams(tmp_path / "tokens", pieces, tokenizer, num_threads=1, report=lambda done: None)
    return tmp_path / "tokens"


def test_documents_come_back(tokenizer, folder):
    stream = shards.TokenStream(folder / "train")
    assert (stream.index.documents, stream.index.characters) == (4, sum(map(len, TEXTS)) + 4)
    assert stream.index.tokens > shards.RECORD  # more than one record
    starts = stream.document_starts.tolist()
    documents = [stream.read(a, b - a).tolist() for a, b in itertools.pairwise(starts)]
    assert documents[0] == [tokenizer.bos_id, *tokenizer.encode(TEXTS[0]), tokenizer.eos_id]
    assert documents[1] == [tokenizer.bos_id, *tokenizer.encode(TEXTS[2]), tokenizer.eos_id]
    assert tokenizer.decode(documents[2]) == TEXTS[3]
    assert documents[3] == [tokenizer.bos_id, *tokenizer.encode("cut ")]  # goes on elsewhere: no eos
    held_out = shards.TokenStream(folder / "held_out")
    assert (held_out.index.documents, held_out.index.characters, held_out.index.bytes) == (1, 8, 10)


def test_reads_across_records(folder):
    stream = shards.TokenStream(folder / "train")
    whole = stream.read(0, stream.index.tokens)
    assert whole.dtype == np.int32
    for start, length in [(0, 0), (5, 7), (shards.RECORD - 3, 6), (shards.RECORD, 1), (stream.index.tokens - 1, 1)]:
        np.testing.assert_array_equal(stream.read(start, length), whole[start : start + length])


def test_digest_is_of_the_content(tokenizer, tmp_path):
    def digest(name, *texts):
        pieces = [Piece(text, False, True, 1.0) for text in texts]
        shards.write_streams(tmp_path / name, pieces, tokenizer, num_threads=1, report=lambda done: None)
        return shards.TokenStream(tmp_path / name / "train").index.digest

    assert digest("a", "dog", "fox") == digest("b", "dog", "fox")
    assert digest("c", "fox", "dog") != digest("a2", "dog", "fox")


def test_several_files(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RECORD", 16)
    monkeypatch.setattr(shards, "SHARD", 64)
    pieces = [Piece(f"dog {i} 曹操\n", False, True, 1.0) for i in range(40)]
    shards.write_streams(tmp_path / "tokens", pieces, tokenizer, num_threads=1, report=lambda done: None)
    stream = shards.TokenStream(tmp_path / "tokens" / "train")
    assert len(stream.index.files) > 3
    assert tokenizer.decode(stream.read(0, stream.index.tokens)) == "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("name", ["tokens-00000.arrayrecord", shards.DOCUMENTS, shards.INDEX])
def test_damaged_cache(folder, name):
    path = folder / "train" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(UserError, match=r"(damaged: \d+ bytes instead of \d+|no readable index).*Delete the folder"):
        shards.TokenStream(folder / "train")
    path.unlink()
    with pytest.raises(UserError, match=r"(is missing|no readable index).*Delete the folder"):
        shards.TokenStream(folder / "train")


def test_what_is_open_does_not_change_with_its_files(folder):
    stream = shards.TokenStream(folder / "train")
    starts = stream.document_starts.copy()
    os.truncate(folder / "train" / shards.DOCUMENTS, 10)
    assert np.array_equal(stream.document_starts, starts)


@pytest.mark.parametrize("name", ["tokens-00000.arrayrecord", shards.DOCUMENTS, shards.INDEX])
def test_no_bit_changes_without_a_word(folder, name):
    """Some bits of a file mean nothing (padding, spaces): then what is read is what was written."""
    path, whole = folder / "train" / name, shards.TokenStream(folder / "train")
    content, tokens = path.read_bytes(), whole.read(0, whole.index.tokens)
    refused = 0
    for place in np.random.default_rng(0).integers(len(content), size=60):
        changed = bytearray(content)
        changed[place] ^= 4
        path.write_bytes(changed)
        try:
            stream = shards.TokenStream(folder / "train")
            read = stream.read(0, stream.index.tokens)
        except UserError as error:
            assert "token cache" in str(error) and "Delete the folder" in str(error)
            refused += 1
        else:
            assert stream.index == whole.index and np.array_equal(read, tokens)
            assert np.array_equal(stream.document_starts, whole.document_starts)
    assert refused >= (1 if name.endswith("record") else 30)


def test_a_sealed_folder_is_whole_or_refused(tmp_path):
    (tmp_path / "a").write_text("whole")
    (tmp_path / "b").write_text("more")
    shards.seal(tmp_path)
    shards.check_sealed(tmp_path)
    for name, content in (("a", "whale"), ("b", ""), (shards.SEAL, "{"), (shards.SEAL, "[1]")):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=r"token cache.*Delete"):
            shards.check_sealed(tmp_path)
        (tmp_path / name).write_text(before)
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match=r"token cache.*Delete"):
        shards.check_sealed(tmp_path)


def test_cached_is_made_once(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "a").write_text("whole")

    first, second = (shards.cached(tmp_path, "thing", make) for _ in range(2))
    assert first == second == tmp_path / "thing" and len(made) == 1
    assert (first / "a").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_a_failure_leaves_nothing(tmp_path):
    def make(folder):
        (folder / "a").write_text("half")
        raise UserError("bad text")

    with pytest.raises(UserError, match="bad text"):
        shards.cached(tmp_path, "thing", make)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_nothing_that_counts(tmp_path):
    program = """
        import os, pathlib, signal, sys
        from jaxllm.data import shards
        def make(folder):
            (folder / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        shards.cached(pathlib.Path(sys.argv[1]), "thing", make)
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    run = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    killed = subprocess.run(run, env=os.environ | {"PYTHONPATH": root}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name.startswith(".partial-thing-") for p in tmp_path.iterdir()] == [True]
    done = shards.cached(tmp_path, "thing", lambda folder: (folder / "a").write_text("whole") and None)
    assert (done / "a").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]  # and the leavings are gone


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"the cache cannot be written.*JAXLLM_CACHE"):
        shards.cached(tmp_path / "file" / "cache", "thing", lambda folder: None)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "environment"))
    assert shards.cache_folder("given").name == "given"
    assert shards.cache_folder("").name == "environment"
    monkeypatch.delenv("JAXLLM_CACHE")
    assert shards.cache_folder("").parts[-2:] == (".cache", "jaxllm")


def test_disk_full_is_an_os_error(tmp_path, monkeypatch):
    class Full:
        def write(self, record):
            raise RuntimeError("write() failed: No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(shards.array_record_module, "ArrayRecordWriter", lambda *_: Full())

    def make(folder):
        writer = shards.StreamWriter(folder / "train", "<u2")
        writer.add([1, 2, 3], "abc")
        writer.close()

    with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
        shards.cached(tmp_path, "tokens", make)
