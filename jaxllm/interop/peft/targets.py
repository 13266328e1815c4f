"""How an adapter_config.json names modules: by the ends of their names, or by regular expressions."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

ALL_LINEAR = "all-linear"


def ends_with(name: str, entries: Iterable[str]) -> bool:
    """Whether the name of a module is one of these, or ends with one."""
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def is_target(name: str, keys: Mapping[str, Any]) -> bool:
    """Whether `target_modules` and what narrows it ask for the module `name`, which is a linear one."""
    wanted, excluded = keys.get("target_modules") or [], keys.get("exclude_modules") or []
    if re.fullmatch(excluded, name) if isinstance(excluded, str) else ends_with(name, excluded):
        return False
    if isinstance(wanted, str):
        return wanted.lower() == ALL_LINEAR or bool(re.fullmatch(wanted, name))
    return ends_with(name, wanted) and _is_in_layers(name, keys)


def _is_in_layers(name: str, keys: Mapping[str, Any]) -> bool:
    """Whether `layers_to_transform` has the first number in the name, or the one after a `layers_pattern`."""
    layers = keys.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = keys.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    matches = [match for pattern in patterns if (match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name))]
    return bool(matches) and int(matches[0][1]) in (layers if isinstance(layers, Sequence) else [layers])


def of_pattern(name: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """The value of the first of `patterns` that fits the end of a name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def shortest_ends(names: Collection[str], others: Collection[str]) -> list[str]:
    """The shortest end that all of `names` have and none of `others` has; the names themselves where there is none."""
    parts = next(iter(names)).split(".")
    for number in range(1, len(parts)):
        end = ".".join(parts[-number:])
        if all(ends_with(name, [end]) for name in names) and not any(ends_with(name, [end]) for name in others):
            return [end]
    return list(names)
