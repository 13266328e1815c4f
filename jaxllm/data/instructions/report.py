"""What was done for a set of instructions, as JSON and as lines for a person; and the files of the set."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.data.instructions.build import EXACT, NEAR, Built, Counts, Removed
from jaxllm.data.instructions.filters import Rule
from jaxllm.data.instructions.shapes import Talk

TRAIN, HELD_OUT, REPORT = "train.jsonl", "held_out.jsonl", "report.json"
WIDTH = 100  # characters of a conversation that is shown


def write_set(folder: Path, built: Built, report: Mapping[str, Any]) -> None:
    """Writes train.jsonl, held_out.jsonl (where something is held out) and report.json."""
    _write_talks(folder / TRAIN, built.train)
    if built.held_out:
        _write_talks(folder / HELD_OUT, built.held_out)
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_talks(path: Path, talks: Iterable[Talk]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for talk in talks:
            tools = {"tools": talk.tools} if talk.tools else {}
            file.write(json.dumps({"messages": talk.messages} | tools, ensure_ascii=False, default=str) + "\n")


def report(built: Built, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, counts by input and in all, and a few conversations of each kind that was left out; JSON-able."""
    return {
        "settings": dict(settings),
        "inputs": [_counts(counts) for counts in built.counts],
        "total": {name: value for name, value in _counts(built.total).items() if name not in ("path", "weight")},
        "removed": {rule: [_removed(one) for one in removed] for rule, removed in built.removed.items()},
    }


def _removed(removed: Removed) -> dict[str, Any]:
    talk, other, similarity = removed
    near = {"duplicate_of": other.origin, "similarity": round(similarity, 4)} if other else {}
    return {"origin": talk.origin, "text": shorten(talk.text), **near}


def _counts(counts: Counts) -> dict[str, Any]:
    return vars(counts) | {"removed": dict(counts.removed)}


def table(built: Built, rules: Sequence[Rule]) -> list[str]:
    """A line a step and a column an input, and one for all where there are several."""
    columns = [*built.counts, *([built.total] if len(built.counts) > 1 else [])]
    rows = [["", *_headings(columns)]]
    rows += [[name, *(f"{getattr(counts, name):,}" for counts in columns)] for name in ("records", "conversations")]
    for rule, what in [*((rule.name, rule.what) for rule in rules), (EXACT, ""), (NEAR, "")]:
        if any(counts.removed[rule] for counts in columns):
            rows.append([f"- {rule}{what and f': {what}'}", *(f"{-counts.removed[rule]:,}" for counts in columns)])
    names = {"kept": "kept", "held_out": "held out", "train": "train", "repeated": "  of them copies"}
    names |= {"dropped": "dropped for the mixture"}
    for name, title in names.items():
        if name in ("kept", "held_out", "train") or any(getattr(counts, name) for counts in columns):
            rows.append([title, *(f"{getattr(counts, name):,}" for counts in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _headings(columns: Sequence[Counts]) -> list[str]:
    """The inputs as they were given, without a folder that they all are in."""
    same = len({os.path.dirname(counts.path) for counts in columns[:-1]}) == 1
    paths = [os.path.basename(counts.path) if same else counts.path for counts in columns]
    return [
        path if counts.weight is None else f"{path}:{counts.weight:g}"
        for path, counts in zip(paths, columns, strict=True)
    ]


def examples(built: Built, number: int = 3) -> list[str]:
    """A few conversations that were left out by each rule, and a few that are in the set."""
    lines = []
    for rule, removed in built.removed.items():
        for talk, other, similarity in removed:
            near = f" (similarity {similarity:.2f} with {other.origin})" if other else ""
            lines.append(f"- {rule}: {talk.origin}{near}: {shorten(talk.text)}")
    return lines + [f"+ {talk.origin}: {shorten(talk.text)}" for talk in built.train[:number]]


def shorten(text: str) -> str:
    """On one line, of at most WIDTH characters."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
