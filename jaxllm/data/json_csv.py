"""Records of JSON lists and of CSV and TSV files, each with the line it begins on."""

import csv
import json
from collections.abc import Iterator
from typing import Any

from jaxllm.data import files
from jaxllm.errors import UserError

LONGEST_FIELD = 1 << 30  # characters; csv's own limit is 131,072
WHITE = " \t\r\n"

Records = Iterator[tuple[Any, str, int]]  # record, origin ("a.json:17"), bytes of the file read so far


def read_json_list(file: files.InputFile) -> Records:
    """The items of a JSON list; or JSON values one after the other, as jsonl files of this suffix hold them.

    Raises:
      UserError: broken JSON, by line, or an empty file that was named.
    """
    with files.Reader(file.path) as reader:
        text = files.decode_text(reader.read(), str(file.path))
    size, records = file.size, 0
    for value, line, end in _values(text, file):
        records += 1
        yield value, f"{file.path}:{line}", size * end // len(text)
    if file.named and not records:
        raise UserError(f"{file.path}: the file is empty.")


def _values(text: str, file: files.InputFile) -> Iterator[tuple[Any, int, int]]:
    """Each value with the line it begins on, and where it ends in `text`."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip(text, 0)
    listed = text.startswith("[", at)
    at = _skip(text, at + listed)
    while at < len(text) and not (listed and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken(text, file, error.pos, error.msg) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
            raise _broken(text, file, at, str(error)) from error
        yield value, line, end
        at = _skip(text, end)
        if listed and not text.startswith(("]", ","), at):
            raise _broken(text, file, at, "',' or ']' is missing after an item of the list")
        if listed and text[at] == ",":
            at = _skip(text, at + 1)
            if text.startswith("]", at):
                raise _broken(text, file, at, "an item is missing after ','")
    if listed and at == len(text):
        raise _broken(text, file, at, "the list does not end")
    if listed and (rest := _skip(text, at + 1)) < len(text):
        raise _broken(text, file, rest, "something follows the list")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in WHITE:
        at += 1
    return at


def _broken(text: str, file: files.InputFile, at: int, why: str) -> UserError:
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return UserError(f"{file.path}:{line}: broken JSON: {why}, column {column}. A json file holds a list of objects.")


def read_csv(file: files.InputFile) -> Records:
    """The rows under the header, each an object of texts; of a .tsv file with tabs between them.

    Raises:
      UserError: quotes that do not match, a row with more or fewer fields than the header, a name that the header
        has twice, or a file without rows that was named.
    """
    csv.field_size_limit(LONGEST_FIELD)
    name = file.path.name.removesuffix(".gz").removesuffix(".zst")
    with files.Reader(file.path) as reader:
        rows = csv.reader(_lines(reader, file), strict=True, delimiter="\t" if name.endswith(".tsv") else ",")
        header, line, records = None, 1, 0
        for row, line in _with_lines(rows, file):
            if not row:
                continue
            if header is None:
                header = _header(row, f"{file.path}:{line}")
                continue
            if len(row) != len(header):
                raise UserError(f"{file.path}:{line}: {len(row)} fields, but the header has {len(header)}.")
            records += 1
            yield dict(zip(header, row, strict=True)), f"{file.path}:{line}", reader.position
    if file.named and not records:
        raise UserError(f"{file.path}: no rows under a header." if header else f"{file.path}: the file is empty.")


def _with_lines(rows: Any, file: files.InputFile) -> Iterator[tuple[list[str], int]]:
    """Each row with the line it begins on; csv itself tells the line it ends on."""
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{file.path}:{line}: broken CSV: {error}, in the row that begins here.") from error
        yield row, line


def _header(row: list[str], where: str) -> list[str]:
    names = [name.strip() for name in row]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{where}: the header has '{twice}' twice.")
    return names


def _lines(reader: files.Reader, file: files.InputFile) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(reader.lines(), start=1):
        yield files.decode_text(line, f"{file.path}:{number}", offset)
        offset += len(line)
