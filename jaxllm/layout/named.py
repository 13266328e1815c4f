"""Something of the user's own, named in the config as FILE.py:NAME: a schedule, a table of rules."""

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from jaxllm.errors import UserError, did_you_mean, file_line

Value = TypeVar("Value")


def is_named(value: str) -> bool:
    """Whether a config value is FILE.py:NAME and not one of the names that jaxllm knows."""
    return ".py:" in value


def call_named(field: str, reference: str, *arguments: Any, **named: Any) -> Any:
    """What the function FILE.py:NAME returns for `arguments`.

    Args:
      field: the config field that names it, for messages.

    Raises:
      UserError: no such file or function, or an error in the file (file:line).
    """
    function = load_named(field, reference)
    try:
        return function(*arguments, **named)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(_told(field, _split(reference)[0], error)) from error


@functools.lru_cache
def named_value(field: str, reference: str, kind: type[Value]) -> Value:
    """The value of class `kind` that FILE.py:NAME is, or that it returns where it is a function.

    Raises:
      UserError: as `call_named`, or a value of another class.
    """
    value = load_named(field, reference, kind)
    if isinstance(value, kind):
        return value
    value = call_named(field, reference)
    if not isinstance(value, kind):
        wanted = f"{kind.__name__} ({kind.__module__})"
        raise UserError(f"{field}={reference} returned {value!r}. It must return a {wanted}.")
    return value


@functools.lru_cache
def load_named(field: str, reference: str, kind: type | None = None) -> Any:
    """The function NAME, or the value of class `kind`, of the Python file FILE.py. A file is run once for each name.

    Raises:
      UserError: as `call_named`.
    """
    source, name = _split(reference)
    if not source.is_file():
        beside = [file.name for file in source.parent.glob("*.py")]
        way_out = did_you_mean(source.name, beside) if beside else f"There is no Python file in {source.parent}."
        raise UserError(f"{field}={reference}: no such file. {way_out}")
    module = ModuleType(str(source))
    module.__file__ = str(source)
    sys.modules[module.__name__] = module  # where a dataclass of the file looks up its own annotations
    try:
        exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), module.__dict__)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(_told(field, source, error)) from error
    value = getattr(module, name, None)
    is_value = lambda value: kind is not None and isinstance(value, kind)  # noqa: E731
    if not is_value(value) and not callable(value):
        own = [key for key, v in vars(module).items() if is_value(v) or getattr(v, "__module__", "") == module.__name__]
        way_out = did_you_mean(name, own) if own else "It defines none at all."
        wanted = f"{kind.__name__} or function" if kind else "function"
        raise UserError(f"{field}={reference}: {source} has no {wanted} '{name}'. {way_out}")
    return value


def _split(reference: str) -> tuple[Path, str]:
    file, _, name = reference.rpartition(".py:")
    return Path(file + ".py"), name


def _told(field: str, source: Path, error: BaseException) -> str:
    return f"{field}: {file_line(source, error)}: {type(error).__name__}: {' '.join(str(error).split())}"
