"""Config groups. Each room declares its own group as a frozen dataclass; this file reads one from a mapping.

The dataclass is the one place where a field's name, default and meaning are written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxllm.errors import UserError, did_you_mean

Group = TypeVar("Group")


def defaults(group: type) -> dict[str, Any]:
    """The fields of a config dataclass with their default values, ready for an `ml_collections.ConfigDict`.

    A group within the group is a dictionary of its own.
    """
    return dataclasses.asdict(group())


def read_group(group: type[Group], values: Mapping[str, Any], name: str) -> Group:
    """Builds the dataclass `group` from `values`, the part `config.<name>` of a config.

    Raises:
      UserError: an unknown field, or a value whose type is not that of the default.
    """
    if not hasattr(values, "items"):
        raise UserError(f"config.{name}={values!r} must be a group of fields.")
    known, read = defaults(group), {}
    for field, value in values.items():
        if field not in known:
            raise UserError(f"config.{name}.{field} is not a field. {did_you_mean(field, known)}")
        within = getattr(group(), field)
        if dataclasses.is_dataclass(within) and hasattr(value, "items"):  # of a ConfigDict too
            read[field] = read_group(type(within), value, f"{name}.{field}")
            continue
        check_type(value, known[field], f"{name}.{field}")
        read[field] = _like(value, known[field])
    return group(**read)


def check_type(value: Any, default: Any, name: str) -> None:
    """Raises a UserError where `value`, of the field `config.<name>`, is not of the type of its default."""
    if not _fits(value, default):
        expected = type(default).__name__
        raise UserError(f"config.{name}={value!r} is a {type(value).__name__}, but must be a {expected}.")


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, Mapping):
        return isinstance(value, Mapping)
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list))
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, type(default))


def _like(value: Any, default: Any) -> Any:
    if isinstance(default, float):
        return float(value)
    return tuple(value) if isinstance(default, tuple) else value


def one_of(name: str, value: str, choices: Mapping[str, Any] | tuple[str, ...]) -> str:
    """Returns `value` where it is one of `choices`; else raises a UserError that offers the nearest one."""
    if value not in choices:
        raise UserError(f"{name}={value!r} is unknown. {did_you_mean(value, choices)}")
    return value
