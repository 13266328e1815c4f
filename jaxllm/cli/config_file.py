"""Reads an experiment's config file and lays the command line's overrides over it."""

import inspect
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from jaxllm.config import defaults
from jaxllm.errors import UserError, did_you_mean, file_line
from jaxllm.remote.copy import local_copy
from jaxllm.train.config import GROUPS, Config, base_config, read_config

_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def refuse_unnamed(path: str | None, what: str = "which model") -> None:
    """Raises: UserError: no config was named."""
    if not path:
        raise UserError(f"say {what}: --config FILE.py (those that come with jaxllm are in configs/).")


def load_config(path: str, overrides: Mapping[str, str]) -> Config:
    """The config of `get_config()` in the Python file `path`, or of `get_config("x")` for `path:x`, with overrides.

    Raises:
      UserError: no such file, an error in it (file:line), an unknown field (nearest name) or a value of another type.
    """
    return read_config(override(call_config_file(path), overrides))


def call_config_file(path: str) -> ConfigDict:
    """What `get_config()` of the file returns, put over every default."""
    file, _, argument = path.partition(".py:")
    source = Path(file + ".py") if argument else Path(path)
    if not os.path.isfile(source):
        raise UserError(f"--config {source}: no such file.{_configs_beside(source)}")
    module = ModuleType("jaxllm_config")
    module.__file__ = str(source)
    try:
        exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), module.__dict__)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config {source}: the file has no function get_config().")
        config = module.get_config(*([argument] if argument else []))
    except UserError:
        raise
    except Exception as error:
        raise UserError(_where(source, error)) from error
    if not isinstance(config, Mapping | ConfigDict):
        raise UserError(
            f"--config {source}: get_config() returned {config!r}. It must return a ConfigDict: "
            "start from jaxllm.train.config.base_config()."
        )
    return merge(config)


def config_beside(file: str, name: str, argument: str = "") -> ConfigDict:
    """The config of the file `name` in the folder of `file`, for a config that is a small difference from another."""
    path = str(Path(file).with_name(name))
    return call_config_file(f"{path}:{argument}" if argument else path)


def merge(values: Mapping[str, Any]) -> ConfigDict:
    """`values`, which may leave fields out, over the defaults. Raises a UserError on a field that is unknown."""
    config = base_config()
    for name, value in values.items():
        _check_name(config, name)
        if not isinstance(config[name], ConfigDict):
            _assign(config, name, value)
            continue
        if not isinstance(value, Mapping | ConfigDict):
            raise UserError(f"config.{name}={value!r}: config.{name} is a group. Set a field: {_fields(config[name])}.")
        for field, item in value.items():
            _check_name(config, f"{name}.{field}")
            _assign(config[name], field, item, f"config.{name}.{field}")
    return config


def override(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """Sets the fields {"group.field": "text"} of `config`; {"model": "llama3_8b"} lays a preset first.

    In place of a preset it may name a WORKDIR, for the model of that run; {"adapter": "WORKDIR"} goes on with the
    adapter of a run.
    """
    groups = {"model": _preset, "adapter": _adapter_of_run}
    for name, text in sorted(overrides.items(), key=lambda item: item[0] not in groups):
        if name in groups:
            config[name].update(groups[name](text))
            continue
        _check_name(config, name)
        group, _, field = name.rpartition(".")
        holder = config[group] if group else config
        if isinstance(holder[field], ConfigDict):
            raise UserError(f"--config.{name}={text}: config.{name} is a group. Set a field: {_fields(holder[field])}.")
        holder[field] = _parse(f"--config.{name}={text}", text, holder[field])
    return config


def _preset(name: str) -> Mapping[str, Any]:
    from jaxllm.model import presets

    if os.path.isfile(local_copy(name) / "config.json"):
        return model_of_run(name)
    known = dict(inspect.getmembers(presets, inspect.isfunction))
    if name not in known:
        if "/" in name or name.startswith("hf:"):
            raise UserError(
                f"--config.model={name}: there is no config.json of a run. A WORKDIR takes its model; one of Hugging "
                "Face becomes a WORKDIR by jaxllm convert --from hf:DIR --to WORKDIR."
            )
        raise UserError(f"--config.model={name} is no preset. {did_you_mean(name, known)}")
    return known[name]()


def _adapter_of_run(name: str) -> Mapping[str, Any]:
    """The group `config.adapter` of the run in the folder `name`, to go on with its adapter."""
    return _group_of_run(name, "adapter") | {"init_from": name}


def model_of_run(name: str) -> Mapping[str, Any]:
    """The group `config.model` of the run in the folder `name`.

    Raises:
      UserError: no run there.
    """
    return _group_of_run(name, "model")


def _group_of_run(name: str, group: str) -> dict[str, Any]:
    file = local_copy(name) / "config.json"
    if not os.path.isfile(file):  # unlike Path's, false of a name that no file may have
        raise UserError(
            f"--config.{group}={name}: no run is there: no config.json in it. It is what jaxllm train --workdir wrote."
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))[group]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--config.{group}={name}: {file} is not that of a run. Import a Hugging Face directory first: "
            f"jaxllm convert --from hf:{name} --to WORKDIR."
        ) from None


def _check_name(config: ConfigDict, name: str) -> None:
    holder, done = config, "config"
    for part in name.split("."):
        if not isinstance(holder, ConfigDict):
            raise UserError(f"{done}={holder!r} is no group, so there is no config.{name}.")
        if part not in holder:
            raise UserError(f"config.{name} is not a field. {_nearest(config, holder, part, done, name)}")
        holder, done = holder[part], f"{done}.{part}"


def _nearest(config: ConfigDict, holder: ConfigDict, part: str, done: str, name: str) -> str:
    """A field of that very name in another group beats a similar one in this group."""
    elsewhere = [f"config.{group}.{part}" for group, v in config.items() if isinstance(v, ConfigDict) and part in v]
    if elsewhere:
        return f"Did you mean {' or '.join(repr(path) for path in elsewhere)}?"
    rest = name.removeprefix(f"{done}.{part}".removeprefix("config.")) if done == "config" else ""
    return did_you_mean(f"{done}.{part}{rest}", [f"{done}.{field}{rest}" for field in holder])


def _fields(group: ConfigDict) -> str:
    return ", ".join(group)


def _parse(written: str, text: str, now: Any) -> Any:
    """`text` as a value of the type of `now`."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        if isinstance(now, bool):
            return words[text.lower()]
        return type(now)(text)
    except (KeyError, ValueError):
        raise UserError(f"{written} must be {_TYPE_NAMES[type(now)]}; it is {now} now.") from None


def _assign(holder: ConfigDict, field: str, value: Any, name: str = "") -> None:
    try:
        holder[field] = value
    except TypeError:
        raise UserError(f"{name or f'config.{field}'}={value!r} must be {_TYPE_NAMES[type(holder[field])]}.") from None


def _where(source: Path, error: Exception) -> str:
    """What went wrong in a config file, and at which line."""
    place = f"--config {file_line(source, error)}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    unknown = re.match(r'Key "(\w+)" does not exist and cannot be added', text)  # the words of a locked ConfigDict
    if unknown:
        fields = {field for group in GROUPS.values() for field in defaults(group)} | set(base_config())
        return f"{place}: '{unknown[1]}' is not a field. {did_you_mean(unknown[1], fields)}"
    cast = re.match(r"Could not override field '(\w+)' .* to type <class '(\w+)'>", text, re.DOTALL)
    wanted = {kind.__name__: name for kind, name in _TYPE_NAMES.items()} | {"ConfigDict": "a group of fields"}
    if cast and cast[2] in wanted:
        return f"{place}: '{cast[1]}' is set to what it cannot be: it must be {wanted[cast[2]]}."
    return f"{place}: {type(error).__name__}: {' '.join(text.split())}"


def _configs_beside(source: Path) -> str:
    beside = sorted(file.name for file in source.parent.glob("*.py")) if source.parent.is_dir() else []
    return f" {did_you_mean(source.name, beside)}" if beside else " The configs that come with jaxllm are in configs/."
