"""What `jaxllm instructions --input` names: files with weights."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from jaxllm.data.files import InputFile, find_files
from jaxllm.data.sources import SOURCES, Record, kind_of
from jaxllm.errors import UserError

SUFFIXES = tuple(suffix for kind in SOURCES.values() if kind.records for suffix in kind.suffixes)


class Input(NamedTuple):
    """Files that are counted together."""

    path: str  # as it was given
    weight: float | None  # its part of the set, relative to the others'; None: all of it
    files: list[InputFile]


def parse_inputs(value: str) -> list[Input]:
    """The inputs of "a.jsonl:2,more/*.parquet:1": files, globs or folders, each with a weight or none with one.

    Raises:
      UserError: no path, one where there is nothing or no records, a weight that is no number above 0, weights for
        some inputs alone, or a file in two inputs.
    """
    inputs = [_input(part) for part in map(str.strip, value.split(",")) if part]
    if not inputs:
        raise UserError("--input names no file. Write for example --input a.jsonl,b.parquet.")
    bare = [given.path for given in inputs if given.weight is None]
    if bare and len(bare) < len(inputs):
        raise UserError(f"--input: {bare[0]} has no weight, and others have. Give one to each or to none: {bare[0]}:1.")
    seen: dict[str, str] = {}
    for given in inputs:
        for file in given.files:
            if (path := os.path.abspath(file.path)) in seen:
                raise UserError(f"--input: {file.path} is in {seen[path]} and in {given.path}. Name it once.")
            seen[path] = given.path
    return inputs


def read_input(given: Input) -> Iterator[Record]:
    """The records of all its files.

    Raises:
      UserError: files that are broken, with the line; or none with a record.
    """
    empty = True
    for file in given.files:
        for value, origin, _ in SOURCES[kind_of(str(file.path))].records(file):
            empty = False
            yield Record(value, origin)
    if empty:
        raise UserError(f"{given.path}: no example: there is nothing in it.")


def _input(part: str) -> Input:
    path, weight = part, None
    if not os.path.exists(part) and ":" in part.partition("://")[2 if "://" in part else 0]:
        path, _, number = part.rpartition(":")
        weight = _weight(number, path)
    found = find_files(path, SUFFIXES, "files of examples")
    for file in found:
        if SOURCES[kind_of(str(file.path))].records is None:
            raise UserError(
                f"{file.path}: by its name this is no file of examples. Their names end in {', '.join(SUFFIXES)}, "
                "and .gz or .zst after it."
            )
    return Input(path, weight, found)


def _weight(number: str, path: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise UserError(f"--input: the weight {number!r} of {path} must be a number above 0.")
    return weight
