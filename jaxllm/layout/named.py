"""A function of the user's own, named in the config as FILE.py:NAME: a schedule, a table of rules."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxllm.errors import UserError, did_you_mean, file_line


def is_named(value: str) -> bool:
    """Whether a config value is FILE.py:NAME and not one of the names that jaxllm knows."""
    return ".py:" in value


def call_named(field: str, reference: str, *arguments: Any) -> Any:
    """What the function FILE.py:NAME returns for `arguments`.

    Args:
      field: the config field that names it, for messages.

    Raises:
      UserError: no such file or function, or an error in the file (file:line).
    """
    function = load_named(field, reference)
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_told(field, _split(reference)[0], error)) from error


@functools.lru_cache
def load_named(field: str, reference: str) -> Callable[..., Any]:
    """The function NAME of the Python file FILE.py. A file is run once for each name. Raises as `call_named` does."""
    source, name = _split(reference)
    if not source.is_file():
        beside = [file.name for file in source.parent.glob("*.py")]
        way_out = did_you_mean(source.name, beside) if beside else f"There is no Python file in {source.parent}."
        raise UserError(f"{field}={reference}: no such file. {way_out}")
    module = ModuleType(source.stem)
    module.__file__ = str(source)
    try:
        exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), module.__dict__)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_told(field, source, error)) from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        way_out = did_you_mean(name, own) if own else "It defines none at all."
        raise UserError(f"{field}={reference}: {source} has no function '{name}'. {way_out}")
    return function


def _split(reference: str) -> tuple[Path, str]:
    file, _, name = reference.rpartition(".py:")
    return Path(file + ".py"), name


def _told(field: str, source: Path, error: Exception) -> str:
    return f"{field}: {file_line(source, error)}: {type(error).__name__}: {' '.join(str(error).split())}"
