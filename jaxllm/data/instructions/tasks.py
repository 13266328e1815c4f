"""Tasks for Self-Instruct: an instruction with an input, which may be empty, and an output."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.data.sources import Record, kind_of, open_source, text_field
from jaxllm.errors import UserError


class Task(NamedTuple):
    """What is asked, of what, and the answer."""

    instruction: str
    input: str
    output: str
    is_classification: bool = False


def read_tasks(path: str) -> list[Task]:
    """The tasks of a file with records {"instruction", "instances": [{"input", "output"}, …]} or {"instruction",
    "input", "output"}, of several instances the first.

    Raises:
      UserError: no such file, or a record without an instruction or an output; with its line.
    """
    return [_task(record) for record in open_source(kind_of(path), path).records()]


def _task(record: Record) -> Task:
    value, where = record.value, record.origin
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: a {type(value).__name__}, but each task must be an object.")
    instances = value.get("instances", [value])
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], Mapping):
        raise UserError(f"{where}: 'instances' must be a list of objects with input and output.")
    one = {"input": ""} | {field: text for field, text in instances[0].items() if text is not None}
    given = {"instruction": value.get("instruction"), "input": one["input"], "output": one.get("output")}
    for field in ("instruction", "output"):
        if not given[field]:
            raise UserError(
                f"{where}: no {field}. A task has an instruction, an input, if it needs one, and an output."
            )
    texts = [text_field(given, field, where).strip() for field in given]
    return Task(*texts, is_classification=bool(value.get("is_classification")))


def recover_tasks(path: Path) -> list[Task]:
    """The tasks that `append_task` wrote to a file; none where there is no file yet.

    A last line that was cut off, as a run leaves it that was killed, is removed from the file.

    Raises:
      UserError: as `read_tasks`, or a file that cannot be written.
    """
    if not path.exists():
        return []
    try:
        with path.open("r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
    except OSError as error:
        raise UserError(f"{path}: cannot be read and written: {error.strerror}.") from error
    return read_tasks(str(path)) if whole else []


def append_task(path: Path, task: Task, **more: Any) -> None:
    """Writes a line {"instruction", "input", "output"} and what is given beside it, on the disk when this returns.

    Raises:
      UserError: the file cannot be written.
    """
    record = {"instruction": task.instruction, "input": task.input, "output": task.output} | more
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}.") from error
