"""Files the user names: paths, globs and folders; plain or compressed; UTF-8, or a message that says where not.

They may be in a bucket, gs:// or s3://, and are read from there.
"""

import difflib
import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from jaxllm.errors import UserError
from jaxllm.remote.storage import RemoteFile, filesystem, is_remote, reaching

COMPRESSED = (".gz", ".zst")


class InputFile(NamedTuple):
    """A file to read. One that a glob or a folder turned up may be empty; one that was named may not."""

    path: Path | RemoteFile
    named: bool

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.size if isinstance(self.path, RemoteFile) else self.path.stat().st_size

    @property
    def real_path(self) -> str:
        """One for each file, by whatever links it was found."""
        return str(self.path) if isinstance(self.path, RemoteFile) else str(self.path.resolve())

    @property
    def identity(self) -> list[str | int]:
        """What its content is taken to hang on: absolute path, size, time of change (nanoseconds) or version."""
        if isinstance(self.path, RemoteFile):
            return [self.path.url, self.path.size, self.path.version]
        stat = self.path.stat()
        return [os.path.abspath(self.path), stat.st_size, stat.st_mtime_ns]


def find_files(paths: str, suffixes: Sequence[str], what: str) -> list[InputFile]:
    """The files of `paths`: files, globs and folders (searched for `suffixes`, also .gz and .zst), joined by commas.

    In the order given; those of one glob or folder sorted. A file that turns up twice counts once.

    Raises:
      UserError: no path at all, or one where there is nothing.
    """
    if not paths.strip():
        raise UserError(f"No path is given for {what}. Name files, globs or folders, joined by commas.")
    found: dict[str, InputFile] = {}
    for item in filter(None, (part.strip() for part in paths.split(","))):
        expanded = _expand_remote if is_remote(item) else _expand
        for file in expanded(os.path.expanduser(item), suffixes, what):
            found.setdefault(file.identity[0], file)
    return list(found.values())


def _expand(item: str, suffixes: Sequence[str], what: str) -> list[InputFile]:
    path = Path(item)
    if path.is_file():
        return [InputFile(path, named=True)]
    if path.is_dir():
        endings = tuple(suffix + end for suffix in suffixes for end in ("", *COMPRESSED))
        inside = sorted(p for p in path.rglob("*") if p.name.endswith(endings) and p.is_file())
        if not inside:
            raise UserError(f"{item}: the folder holds no {what} ({', '.join(suffixes)}). For other names use a glob.")
        return [InputFile(p, named=False) for p in inside]
    if glob.has_magic(item):
        inside = sorted(p for p in map(Path, glob.glob(item, recursive=True)) if p.is_file())
        if not inside:
            raise UserError(f"{item}: no file matches this glob.")
        return [InputFile(p, named=False) for p in inside]
    raise UserError(f"{item}: no such file or folder.{_nearest(path)}")


def _expand_remote(item: str, suffixes: Sequence[str], what: str) -> list[InputFile]:
    """As `_expand`, of an address in a bucket."""
    store, scheme = filesystem(item), item.partition("://")[0]

    def listed(entries: Mapping[str, dict[str, Any]], named: bool) -> list[InputFile]:
        there = [entry for _, entry in sorted(entries.items()) if entry["type"] == "file"]
        return [InputFile(RemoteFile.listed(scheme, entry), named) for entry in there]

    try:
        with reaching(item):
            if glob.has_magic(item):
                if not (inside := listed(store.glob(item, detail=True), named=False)):
                    raise UserError(f"{item}: no file matches this glob.")
                return inside
            entry = store.info(item)
            if entry["type"] == "file":
                return listed({item: entry}, named=True)
            inside = listed(store.find(item, detail=True), named=False)
    except FileNotFoundError:
        raise UserError(f"{item}: no such file or folder.") from None
    endings = tuple(suffix + end for suffix in suffixes for end in ("", *COMPRESSED))
    if not (inside := [file for file in inside if file.path.name.endswith(endings)]):
        raise UserError(f"{item}: the folder holds no {what} ({', '.join(suffixes)}). For other names use a glob.")
    return inside


def _nearest(path: Path) -> str:
    """A hint: the nearest parent that exists, or a file of a similar name."""
    if os.path.lexists(path):
        return " What is there is a link that leads nowhere, or no file that can be read to its end."
    parent = next((p for p in path.parents if p.exists()), Path("."))
    if parent != path.parent:
        return f" Not even the folder {path.parent} is there."
    close = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=1)
    return f" Did you mean {parent / close[0]}?" if close else ""


def identity(files: Sequence[InputFile]) -> list[list[str | int]]:
    """What the content of `files` is taken to hang on."""
    return [file.identity for file in files]


def total_bytes(files: Sequence[InputFile]) -> int:
    """Bytes on disk."""
    return sum(file.size for file in files)


class _Zstandard(io.RawIOBase):
    """Frames of a .zst file. zstandard's own stream reader takes a file that was cut off for one that ended."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._frame, self._rest = raw, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._rest:
            packed = self._raw.read(1 << 17)
            if not packed:
                if self._frame is not None:
                    raise zstandard.ZstdError("the last frame is not whole")
                return 0
            self._rest = self._unpack(packed)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def _unpack(self, packed: bytes) -> bytes:
        blocks = []
        while packed:
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            blocks.append(self._frame.decompress(packed))
            packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        return b"".join(blocks)


class Reader:
    """A file opened for reading, unpacked on the fly; `position` counts bytes on disk, for progress."""

    def __init__(self, path: Path | RemoteFile):
        self.path = path
        try:
            self._raw = path.open("rb")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
        self._stream = self._unpacked()

    def _unpacked(self) -> BinaryIO:
        if self.path.suffix == ".gz":
            return gzip.open(self._raw)
        if self.path.suffix == ".zst":
            return io.BufferedReader(_Zstandard(self._raw), 1 << 20)
        return self._raw

    @property
    def position(self) -> int:
        return self._raw.tell()

    def read(self) -> bytes:
        """Everything. UserError where the compressed stream is broken or cut off."""
        return b"".join(self.lines())

    def lines(self) -> Iterator[bytes]:
        """The lines, each with its end."""
        try:
            yield from self._stream
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{self.path}: the compressed file is broken or cut off ({error}).") from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error}.") from error

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._raw.close()


def decode_text(data: bytes, where: str, offset: int = 0) -> str:
    """The text of UTF-8 `data`, a byte order mark at its start left out.

    Args:
      data: bytes.
      where: file, or file and line, for the message.
      offset: where in the file `data` starts.

    Raises:
      UserError: a NUL byte (then it is no text) or bytes that are not UTF-8, with the offset in the file.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{where}: this is UTF-16, not UTF-8 (byte {offset}). Convert it: iconv -f UTF-16 -t UTF-8.")
    if (nul := data.find(b"\0")) >= 0:
        raise UserError(f"{where}: a binary file, not text: NUL at byte {offset + nul}.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.start
        raise UserError(
            f"{where}: not UTF-8: byte 0x{data[bad]:02x} at byte {offset + bad}. "
            "Convert the file, for example: iconv -f GB18030 -t UTF-8."
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text
