"""Token shards: documents tokenised once, kept on disk as ArrayRecord, read at random.

A stream is a folder:

    index.json                what is in it, and a checksum of itself; written last
    documents.npy             int64 [documents + 1]: where each document starts in the stream, and the stream's length
    supervised.npy            of examples: int64 [ranges, 2], the tokens that are learned, start to end, in order
    tokens-00000.arrayrecord  records of RECORD tokens each (the last shorter), little-endian uint16 or uint32

A document is bos, its text, eos (bos and eos where the tokenizer has them); one cut in two by the held-out split ends
without eos in its first part. An example is a document, too. Records cut documents anywhere; documents.npy knows where
they begin.
"""

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grain
import numpy as np
from array_record.python import array_record_module
from jaxtyping import Bool, Float, Int

from jaxllm.data.held_out import Piece
from jaxllm.data.supervision import EncodedExample
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import UserError
from jaxllm.remote.storage import refuse_remote

VERSION = 2
RECORD = 8192  # tokens: what one random read costs
SHARD = 1 << 28  # tokens a file
BATCH = 1 << 22  # characters tokenised at once, by all threads
INDEX, DOCUMENTS, SUPERVISED, MARGINS = "index.json", "documents.npy", "supervised.npy", "margins.npy"
MAPPED_FROM = 1 << 28  # bytes of an array
SEAL = "checksums.json"  # of a folder that has no index
SPLITS = ("train", "held_out")


class Sized(Protocol):
    """What is tokenised in batches of about a size."""

    @property
    def size(self) -> int: ...  # characters


SomeSized = TypeVar("SomeSized", bound=Sized)


@dataclass(frozen=True)
class StreamIndex:
    """What a stream holds. `characters` and `bytes` (UTF-8) are of the text, without bos and eos."""

    tokens: int
    documents: int
    characters: int
    bytes: int
    dtype: str
    digest: str  # sha256 of all tokens and document starts
    files: dict[str, int]  # sizes in bytes
    checksums: dict[str, int]  # CRC-32 of the arrays; ArrayRecord has its own for each record
    version: int = VERSION
    supervised: int | None = None  # tokens that are learned; None: all but the first of a document


class TokenStream:
    """The tokens of a split, documents end to end."""

    def __init__(self, folder: Path):
        """Opens the stream in `folder`. UserError where a file of it is missing or cut off."""
        self.index = _read_index(folder)
        self.document_starts: Int[np.ndarray, " documents+1"] = _loaded(folder / DOCUMENTS)
        # Ranges of tokens, in order; None where all are learned.
        self.supervised: Int[np.ndarray, "ranges 2"] | None = None
        if SUPERVISED in self.index.files:
            self.supervised = _loaded(folder / SUPERVISED)
        # Of each document, where any has one: by how much it is better than the next one.
        self.margins: Float[np.ndarray, " documents"] | None = None
        if MARGINS in self.index.files:
            self.margins = _loaded(folder / MARGINS)
        shards = [str(folder / name) for name in sorted(self.index.files) if not name.endswith(".npy")]
        self._records, self._folder = grain.sources.ArrayRecordDataSource(shards), folder

    def read(self, start: int, length: int) -> Int[np.ndarray, " length"]:
        """Tokens start to start + length, int32. Thread-safe.

        Raises:
          UserError: a record cannot be read or is not what was written.
        """
        if length <= 0:
            return np.zeros(0, np.int32)
        first, last = start // RECORD, (start + length - 1) // RECORD
        try:
            records = [np.frombuffer(self._records[i], self.index.dtype) for i in range(first, last + 1)]
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"{self._folder}: a record of the token cache cannot be read ({str(error)[:200]}). "
                f"{_remedy(self._folder.parent)}"
            ) from error
        tokens = np.concatenate(records) if len(records) > 1 else records[0]
        return tokens[start - first * RECORD :][:length].astype(np.int32)

    def is_supervised(self, start: int, length: int) -> Bool[np.ndarray, " length"]:
        """Which of the tokens start to start + length are learned. Thread-safe."""
        if self.supervised is None:
            return np.ones(length, bool)
        learned = np.zeros(length, bool)
        first = np.searchsorted(self.supervised[:, 1], start, side="right")
        last = np.searchsorted(self.supervised[:, 0], start + length)
        for begin, end in self.supervised[first:last] - start:
            learned[max(begin, 0) : end] = True
        return learned


def _loaded(file: Path) -> np.ndarray:
    """In memory, so that nothing that happens to the file later changes a run; a very large one is mapped."""
    mode = "r" if file.stat().st_size > MAPPED_FROM else None
    return np.load(file, mmap_mode=mode, allow_pickle=False)


def _read_index(folder: Path) -> StreamIndex:
    try:
        sealed = json.loads((folder / INDEX).read_text())
        index = StreamIndex(**sealed["index"])
        if _seal(sealed["index"]) != sealed["checksum"]:
            raise ValueError("its checksum is another")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: the token cache has no readable {INDEX}. {_remedy(folder.parent)}") from error
    for name, size in index.files.items():
        _check_file(folder / name, folder.parent, size, index.checksums.get(name))
    return index


def seal(folder: Path) -> None:
    """Writes down sizes and checksums of the files in a folder of the cache."""
    files = {file.name: (file.stat().st_size, _checksum(file)) for file in sorted(folder.iterdir())}
    (folder / SEAL).write_text(json.dumps(files))


def check_sealed(folder: Path) -> None:
    """Raises a UserError where a file of a sealed folder is gone or changed."""
    try:
        sealed = json.loads((folder / SEAL).read_text())
        files = [(name, int(size), int(checksum)) for name, (size, checksum) in sealed.items()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: the token cache has no readable {SEAL}. {_remedy(folder)}") from error
    for name, size, checksum in files:
        _check_file(folder / name, folder, size, checksum)


def _check_file(file: Path, cached: Path, size: int, checksum: int | None) -> None:
    """Refuses a file of the folder `cached` that is gone, or other than it was written."""
    found = file.stat().st_size if file.exists() else None
    if found is None:
        raise UserError(f"{file}: this part of the token cache is missing. {_remedy(cached)}")
    damage = f"{found} bytes instead of {size}" if found != size else ""
    if not damage and checksum is not None and _checksum(file) != checksum:
        damage = "its checksum is another"
    if damage:
        raise UserError(f"{file}: this part of the token cache is damaged: {damage}. {_remedy(cached)}")


def _remedy(cached: Path) -> str:
    return f"Delete the folder {cached} and it is made anew."


def _seal(index: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as content:
        while part := content.read(1 << 22):
            checksum = zlib.crc32(part, checksum)
    return checksum


class StreamWriter:
    """Writes a stream document by document. `folder` must not exist."""

    def __init__(self, folder: Path, dtype: str):
        folder.mkdir(parents=True)
        self._folder, self._dtype = folder, np.dtype(dtype)
        self._starts, self._supervised, self._hash = array("q", [0]), array("q"), hashlib.sha256()
        self._margins = array("f")
        self._buffer: list[np.ndarray] = []
        self._buffered = self._written = self._characters = self._bytes = 0
        self._writer: array_record_module.ArrayRecordWriter | None = None
        self._files: list[str] = []

    def add_example(self, example: EncodedExample) -> None:
        """Appends an example. A stream is of examples or of documents of which all is learned, not of both."""
        start = self._starts[-1]
        self._supervised.extend(start + place for places in example.supervised for place in places)
        self._margins.append(example.margin)
        self.add(example.tokens, example.text)

    def add(self, tokens: Sequence[int], text: str) -> None:
        """Appends a document."""
        self._buffer.append(np.asarray(tokens, self._dtype))
        self._buffered += len(tokens)
        self._starts.append(self._starts[-1] + len(tokens))
        self._characters += len(text)
        self._bytes += len(text.encode())
        if self._buffered >= RECORD * 16:
            self._flush(RECORD)

    def _flush(self, at_least: int) -> None:
        tokens = np.concatenate([*self._buffer, np.zeros(0, self._dtype)])
        done = 0
        while len(tokens) - done >= at_least and done < len(tokens):
            self._write(tokens[done : done + RECORD].tobytes())
            done += RECORD
        self._buffer, self._buffered = [tokens[done:]], max(len(tokens) - done, 0)

    def _write(self, record: bytes) -> None:
        if self._writer is None:
            self._files.append(f"tokens-{len(self._files):05d}.arrayrecord")
            path = str(self._folder / self._files[-1])
            self._writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
        with _as_os_error():
            self._writer.write(record)
        self._hash.update(record)
        self._written += len(record) // self._dtype.itemsize
        if self._written >= SHARD * len(self._files):
            self._close_file()

    def _close_file(self) -> None:
        if self._writer is not None:
            with _as_os_error():
                self._writer.close()
            self._writer = None
            written = len(grain.sources.ArrayRecordDataSource([str(self._folder / self._files[-1])]))
            expected = -(-self._written // RECORD) - (len(self._files) - 1) * (SHARD // RECORD)
            if written != expected:
                raise OSError(f"{written} of {expected} records of {self._files[-1]} were written")

    def close(self) -> StreamIndex:
        """Finishes the stream; its index is the last thing written."""
        self._flush(1)
        self._close_file()
        starts = np.frombuffer(self._starts, np.int64)
        np.save(self._folder / DOCUMENTS, starts)
        self._hash.update(starts.tobytes())
        arrays, supervised = [DOCUMENTS], np.frombuffer(self._supervised, np.int64).reshape(-1, 2)
        if len(supervised):
            arrays.append(SUPERVISED)
            np.save(self._folder / SUPERVISED, supervised)
            self._hash.update(supervised.tobytes())
        if any(self._margins):
            arrays.append(MARGINS)
            np.save(self._folder / MARGINS, np.frombuffer(self._margins, np.float32))
            self._hash.update(self._margins.tobytes())
        index = StreamIndex(
            tokens=int(starts[-1]),
            documents=len(starts) - 1,
            characters=self._characters,
            bytes=self._bytes,
            dtype=self._dtype.newbyteorder("<").str,
            digest=self._hash.hexdigest(),
            files={name: (self._folder / name).stat().st_size for name in [*arrays, *self._files]},
            checksums={name: _checksum(self._folder / name) for name in arrays},
            supervised=int(np.diff(supervised).sum()) if len(supervised) else None,
        )
        sealed = {"index": asdict(index), "checksum": _seal(asdict(index))}
        (self._folder / INDEX).write_text(json.dumps(sealed, indent=1))
        return index


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """ArrayRecord says by a RuntimeError that the disk is full."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


def write_streams(
    folder: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, *, num_threads: int, report: Callable[[float], None]
) -> None:
    """Tokenises `pieces` into the streams `folder`/train and `folder`/held_out; a split without text has no folder."""
    writers = SplitWriters(folder, tokenizer)
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    end = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    for batch in in_batches(pieces):
        ids = tokenizer.encode_batch([piece.text for piece in batch], num_threads=num_threads)
        for piece, tokens in zip(batch, ids, strict=True):
            writers[piece.held_out].add([*start, *tokens, *(end if piece.ends else [])], piece.text)
        report(batch[-1].progress)
    writers.close()


class SplitWriters:
    """The writers of both splits, each made when there is something for it."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self._folder, self._dtype = folder, "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        self._writers: dict[str, StreamWriter] = {}

    def __getitem__(self, held_out: bool) -> StreamWriter:
        split = SPLITS[held_out]
        if split not in self._writers:
            self._writers[split] = StreamWriter(self._folder / split, self._dtype)
        return self._writers[split]

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def in_batches(pieces: Iterable[SomeSized], characters: int = BATCH) -> Iterator[list[SomeSized]]:
    """`pieces` in lists of about so many characters."""
    batch: list[SomeSized] = []
    seen = 0
    for piece in pieces:
        batch.append(piece)
        seen += piece.size
        if seen >= characters:
            yield batch
            batch, seen = [], 0
    if batch:
        yield batch


def cache_folder(configured: str) -> Path:
    """`config.data.cache`, else $JAXLLM_CACHE, else ~/.cache/jaxllm.

    Raises:
      UserError: it is in a bucket: tokens are read at random.
    """
    folder = configured or os.environ.get("JAXLLM_CACHE") or "~/.cache/jaxllm"
    refuse_remote(folder, "the token cache (config.data.cache, $JAXLLM_CACHE)", "Give a folder on a disk.")
    return Path(folder).expanduser()


def cache_key(*parts: Any) -> str:
    """A name for what was made from `parts` (JSON-able)."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:20]


def cached(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `cache`/`name`; where it is not there, `make(folder)` fills a folder beside it, renamed when whole.

    So a run that is killed leaves nothing that a later one would believe, and two runs at once do no harm.

    Raises:
      UserError: the cache cannot be written.
    """
    final = cache / name
    if final.exists():
        return final
    host = os.uname().nodename
    partial = cache / f".partial-{name}-{host}-{os.getpid()}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache, f".partial-{name}-{host}-")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        make(partial)
        try:
            partial.rename(final)
        except OSError:
            if not final.exists():  # else another run was first; its work is as good
                raise
    except OSError as error:
        raise UserError(
            f"{cache}: the cache cannot be written: {error}. Set config.data.cache or $JAXLLM_CACHE to another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _remove_stale(cache: Path, prefix: str) -> None:
    """Removes what killed runs of this machine left of the same work."""
    for folder in cache.glob(f"{prefix}*"):
        try:
            os.kill(int(folder.name.removeprefix(prefix)), 0)
        except (ProcessLookupError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            continue
