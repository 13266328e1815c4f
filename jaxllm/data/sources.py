"""Sources of documents: text, jsonl, JSON, parquet, CSV, ArrayRecord, tfds. `SOURCES` is the registry.

A new kind is one entry there. A source yields its documents in a fixed order, each time it is asked, and raises
`UserError` (with file and line or record) for anything that is not a document. It yields whole records, too, for
examples (jaxllm/data/examples.py).
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from jaxllm.data import files
from jaxllm.data.config import DataConfig
from jaxllm.data.json_csv import read_csv, read_json_list
from jaxllm.errors import UserError, did_you_mean
from jaxllm.remote.storage import RemoteFile

PATH = "config.data.path"


class Document(NamedTuple):
    """A text and where it is from."""

    text: str
    origin: str  # for messages: "books.jsonl:17"
    progress: float = 1.0  # part of the source that is read with this document, 0 to 1
    file: str = ""  # the file it is in, as it was found


class Record(NamedTuple):
    """A JSON-like value and where it is from."""

    value: Any
    origin: str
    progress: float = 1.0
    file: str = ""


class Source(Protocol):
    """Documents that can be read again and again."""

    field: str  # of a record that holds the text

    def documents(self) -> Iterator[Document]: ...

    def records(self) -> Iterator[Record]: ...

    def identity(self) -> list[Any]:
        """JSON-able; changes when the documents may have changed."""
        ...


class FileSource:
    """Files read one after the other."""

    def __init__(self, kind: str, path: str, field: str):
        self.kind, self.field, self._read = kind, field, SOURCES[kind]
        self.files = files.find_files(path, self._read.suffixes, f"{kind} files")
        self.path = path

    def documents(self) -> Iterator[Document]:
        empty = True
        for text, origin, progress, file in self._through(lambda file: self._read.texts(file, self.field)):
            empty = empty and not text.strip()
            if text:
                yield Document(text, origin, progress, file)
        if empty:
            raise UserError(f"{self.path}: no document: there is no text in it.")

    def records(self) -> Iterator[Record]:
        if self._read.records is None:
            kinds = ", ".join(kind for kind, read in SOURCES.items() if read.records)
            raise UserError(
                f"{self.path}: a file of kind {self.kind} holds no examples. Set config.data.source to {kinds} or tfds."
            )
        empty = True
        for record in itertools.starmap(Record, self._through(self._read.records)):
            empty = False
            yield record
        if empty:
            raise UserError(f"{self.path}: no example: there is nothing in it.")

    def _through(self, read: Callable[[files.InputFile], Iterator]) -> Iterator[tuple[Any, str, float, str]]:
        """What `read` yields of each file, with the part of all files that is read with it, and the file."""
        total, before = max(files.total_bytes(self.files), 1), 0
        for file in self.files:
            for value, origin, position in read(file):
                yield value, origin, min((before + position) / total, 1.0), str(file.path)
            before += file.size

    def identity(self) -> list[Any]:
        return [self.kind, self.field, files.identity(self.files)]


Read = Iterator[tuple[str, str, int]]  # text, origin, bytes of the file read so far
ReadRecords = Iterator[tuple[Any, str, int]]  # record, origin, bytes of the file read so far


def read_text(file: files.InputFile, field: str) -> Read:
    """The whole file is one document."""
    with files.Reader(file.path) as reader:
        data = reader.read()
        text = files.decode_text(data, str(file.path))
        if file.named and not text.strip():
            raise UserError(f"{file.path}: the file is empty.")
        yield text, str(file.path), reader.position


def texts_of(read: Callable[[files.InputFile], ReadRecords]) -> Callable[[files.InputFile, str], Read]:
    """Reads the texts that a field of the records holds, where `read` reads the records."""

    def texts(file: files.InputFile, field: str) -> Read:
        for record, where, position in read(file):
            yield text_field(record, field, where), where, position

    return texts


def read_records(file: files.InputFile) -> ReadRecords:
    """The JSON value of each line that is not blank, its origin ("a.jsonl:17"), and the bytes of the file read so far.

    Raises:
      UserError: broken JSON, or an empty file that was named.
    """
    offset, records = 0, 0
    with files.Reader(file.path) as reader:
        for number, line in enumerate(reader.lines(), start=1):
            where = f"{file.path}:{number}"
            text = files.decode_text(line, where, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:  # ValueError alone: a number of thousands of digits
                what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                raise UserError(f"{where}: broken JSON: {what}. A jsonl file holds one JSON object a line.") from error
            records += 1
            yield record, where, reader.position
    if file.named and not records:
        raise UserError(f"{file.path}: the file is empty.")


def text_field(record: Any, field: str, where: str) -> str:
    """The text in `record[field]`; UserError where there is none, naming the fields there are."""
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: a {type(record).__name__}, but each record must be an object with the field '{field}'."
        )
    if field not in record:
        raise UserError(
            f"{where}: no field '{field}'. There are: {', '.join(map(str, record))}. Set config.data.field."
        )
    value = record[field]
    if isinstance(value, bytes):
        return files.decode_text(value, f"{where}: field '{field}'")
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{field}' is a {type(value).__name__}, but must be text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field '{field}' holds half a surrogate pair at character {error.start}.") from error
    return value


def read_parquet(file: files.InputFile, field: str) -> Read:
    """One row a document, from the column `field`."""
    for record, where, position in _parquet_rows(file, field):
        yield text_field(record, field, where), where, position


def read_parquet_records(file: files.InputFile) -> ReadRecords:
    """One row a record, of all columns."""
    return _parquet_rows(file, None)


def _parquet_rows(file: files.InputFile, column: str | None) -> ReadRecords:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file.path.open("rb") if isinstance(file.path, RemoteFile) else file.path)
        names = table.schema_arrow.names
        if column is not None and column not in names:
            raise UserError(f"{file.path}: no column '{column}'. There are: {', '.join(names)}. Set config.data.field.")
        size = file.size
        for batch in table.iter_batches(batch_size=1024, columns=None if column is None else [column]):
            for record in batch.to_pylist():
                yield record, f"{file.path}: row {row}", size * (row + 1) // table.metadata.num_rows
                row += 1
    except UnicodeDecodeError as error:
        within = "" if column is None else f" in column '{column}'"
        raise UserError(f"{file.path}: not UTF-8{within}, among the 1024 rows from {row} on.") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.path}: not a parquet file, or a broken one ({_first_line(error)}).") from error


def read_arrayrecord(file: files.InputFile, field: str) -> Read:
    """One record a document: a JSON object with the field `field`, or the text itself where `field` is empty."""
    hint = " For records that are plain text set --config.data.field=''."
    for text, where, position in _arrayrecord_texts(file):
        yield text_field(_json_object(text, where, hint), field, where) if field else text, where, position


def read_arrayrecord_records(file: files.InputFile) -> ReadRecords:
    """One JSON object a record."""
    for text, where, position in _arrayrecord_texts(file):
        yield _json_object(text, where), where, position


def _json_object(text: str, where: str, hint: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: no JSON object.{hint}") from error


def _arrayrecord_texts(file: files.InputFile) -> Read:
    import grain

    if isinstance(file.path, RemoteFile):
        raise UserError(f"{file.path}: ArrayRecord files are read from a disk alone. Copy them to a local folder.")
    size = file.size
    try:
        records = grain.sources.ArrayRecordDataSource([str(file.path)])
        for i in range(len(records)):
            where = f"{file.path}: record {i}"
            yield files.decode_text(records[i], where), where, size * (i + 1) // len(records)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{file.path}: not an ArrayRecord file, or a broken one ({_first_line(error)}).") from error


class TfdsSource:
    """A TensorFlow dataset, read without TensorFlow; prepared as ArrayRecord where it is not there yet."""

    def __init__(self, spec: str, path: str, field: str):
        name, _, split = spec.partition(":")
        self.spec, self.split, self.field = spec, split or "train", field
        if not re.fullmatch(r"\w+(/[\w.\-]+)*", name):
            raise UserError(f"config.data.source='tfds:{spec}': write tfds:name:split or tfds:name/config:split.")
        import tensorflow_datasets as tfds

        try:
            self._builder = tfds.builder(name, data_dir=path or None)
        except Exception as error:  # tfds raises many kinds; a dataset's own module any
            raise UserError(f"config.data.source='tfds:{spec}': {_first_line(error)}") from error

    def _all(self) -> Sequence[dict[str, Any]]:
        builder, where = self._builder, f"config.data.source='tfds:{self.spec}'"
        try:
            if not builder.is_prepared():
                builder.download_and_prepare(file_format="array_record")
        except Exception as error:
            raise UserError(
                f"{where} is not in {builder.data_dir} and cannot be prepared: {_first_line(error)} "
                "Set config.data.path to the data_dir where it is."
            ) from error
        try:
            return builder.as_data_source(self.split)
        except Exception as error:
            raise UserError(f"{where} in {builder.data_dir}: {_first_line(error)}") from error

    def documents(self) -> Iterator[Document]:
        for record in self.records():
            if text := text_field(record.value, self.field, record.origin):
                yield Document(text, record.origin, record.progress)

    def records(self) -> Iterator[Record]:
        records = self._all()
        if not len(records):
            raise UserError(f"config.data.source='tfds:{self.spec}': no document: the split is empty.")
        for i in range(len(records)):
            yield Record(dict(records[i]), f"tfds:{self.spec} record {i}", (i + 1) / len(records))

    def identity(self) -> list[Any]:
        self._all()
        info = self._builder.info
        size = int(info.dataset_size or 0)
        return ["tfds", info.full_name, self.split, self.field, str(self._builder.data_dir), size]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


class Kind(NamedTuple):
    """How files of a kind are called and read."""

    suffixes: tuple[str, ...]
    texts: Callable[[files.InputFile, str], Read]
    records: Callable[[files.InputFile], ReadRecords] | None = None  # None: there is nothing but text


SOURCES: dict[str, Kind] = {
    "text": Kind((".txt", ".text"), read_text),
    "jsonl": Kind((".jsonl", ".ndjson"), texts_of(read_records), read_records),
    "json": Kind((".json",), texts_of(read_json_list), read_json_list),
    "parquet": Kind((".parquet",), read_parquet, read_parquet_records),
    "csv": Kind((".csv", ".tsv"), texts_of(read_csv), read_csv),
    "arrayrecord": Kind((".array_record", ".arrayrecord"), read_arrayrecord, read_arrayrecord_records),
}


def open_source(kind: str, path: str, field: str = "text", named: str = "") -> Source:
    """The documents of one source.

    Args:
      kind: one of `SOURCES`, or "tfds:name/config:split" (then `path` is its data_dir).
      path: files, globs or folders, joined by commas.
      field: the field of a record that holds the text.
      named: the field of the config that names the path, for messages.

    Raises:
      UserError: an unknown kind, or a path where there is nothing.
    """
    if kind.startswith("tfds:"):
        return TfdsSource(kind.removeprefix("tfds:"), path, field)
    if kind not in SOURCES:
        way_out = did_you_mean(kind, [*SOURCES, "tfds:name:split", "mixture"])
        raise UserError(f"'{kind}' is no source of data. {way_out} See config.data.source.")
    try:
        return FileSource(kind, path, field)
    except UserError as error:
        raise UserError(f"{named}: {error}" if named else str(error)) from error


def kind_of(path: str) -> str:
    """The kind of the files `path` by their name: that of the suffix, else "text"."""
    name = path.removesuffix(".gz").removesuffix(".zst")
    return next((kind for kind, known in SOURCES.items() if name.endswith(known.suffixes)), "text")


class Component(NamedTuple):
    """A source and its weight: its part of the rows that are trained on."""

    source: Source
    weight: float


def open_components(config: DataConfig) -> list[Component]:
    """The sources of `config`: one, or those of a mixture.

    Raises:
      UserError: as `open_source`; a mixture that cannot be read, or weights that are not positive numbers.
    """
    if config.source != "mixture":
        return [Component(open_source(config.source, config.path, config.field, PATH), 1.0)]
    example = "text:a.txt=0.7,jsonl:b.jsonl.gz=0.3"
    parts = re.findall(r"\s*(.+?)=([^=,]*)(?:,|$)", config.path)
    if not parts or ",".join(f"{spec}={weight}" for spec, weight in parts) != config.path.replace(", ", ","):
        raise UserError(f"config.data.path={config.path!r} is no mixture. Write kind:path=weight, as in {example}")
    return [Component(_mixture_source(spec, config.field), _weight(weight, spec)) for spec, weight in parts]


def _mixture_source(spec: str, field: str) -> Source:
    if spec.startswith("tfds:"):
        return open_source(spec, "", field, PATH)
    kind, colon, path = spec.partition(":")
    if not colon:
        raise UserError(f"config.data.path: {spec!r} in the mixture has no kind. Write for example text:{spec}=1")
    return open_source(kind, path, field, PATH)


def _weight(text: str, spec: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise UserError(f"config.data.path: the weight {text!r} of {spec} must be a number above 0.")
    return weight
