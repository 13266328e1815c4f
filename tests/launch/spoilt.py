"""Documents with one thing wrong, each in another place: what a schema has to notice."""

import copy
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[str | int, ...]


def with_a_misspelling(document: Any, names_are_free: Callable[[Path], bool]) -> Iterator[tuple[Path, Any]]:
    """Each field once under another name, but those of objects that may have any: (its path, the document)."""
    for path in _places(document):
        spoilt = copy.deepcopy(document)
        holder = _at(spoilt, path[:-1])
        if isinstance(holder, dict) and not names_are_free(path[:-1]):
            holder[f"{path[-1]}s"] = holder.pop(path[-1])
            yield path, spoilt


def with_another_type(document: Any) -> Iterator[tuple[Path, Any]]:
    """Each value once replaced: a scalar by an object, lists and objects by a number."""
    for path in _places(document):
        spoilt = copy.deepcopy(document)
        holder = _at(spoilt, path[:-1])
        holder[path[-1]] = 3 if isinstance(holder[path[-1]], (dict, list)) else {"x": [{}]}
        yield path, spoilt


def _places(value: Any, path: Path = ()) -> Iterator[Path]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _places(value[key], (*path, key))


def _at(document: Any, path: Path) -> Any:
    return functools.reduce(operator.getitem, path, document)
