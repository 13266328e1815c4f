"""config.json of a Hugging Face directory <-> ModelConfig."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.errors import UserError
from jaxllm.interop.hf.families import FAMILIES
from jaxllm.interop.hf.family import Family, Fields
from jaxllm.model.config import ModelConfig, differing


class ReadConfig(NamedTuple):
    """A config.json, understood."""

    family: Family
    model: ModelConfig  # resolved
    keys: dict[str, Any]  # all of the file


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: it cannot be read, or is broken or no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON: {error.msg}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: a JSON object is expected, not a {type(value).__name__}.")
    return value


def read_model(file: Path) -> ReadConfig:
    """The family and the model of the config.json `file`.

    Raises:
      UserError: a broken file, an unknown architecture, or something that is not computed here.
    """
    keys = read_json(file)
    family = _family(file, keys)
    if keys.get("quantization_config"):
        method = keys["quantization_config"].get("quant_method", "?")
        raise UserError(
            f"{file}: quantization_config: the weights are quantized ({method}). Convert the model that they came from."
        )
    try:
        return ReadConfig(family, family.read(keys), keys)
    except UserError as error:
        raise UserError(f"{file}: {family.architecture}: {error}") from None


def _family(file: Path, keys: Mapping[str, Any]) -> Family:
    """By the architecture, or by the model type where the file names none."""
    known = {name: family for family in FAMILIES for name in (family.architecture, *family.also)}
    types = {family.model_type: family for family in FAMILIES}
    names = keys.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    if name is None and keys.get("model_type") in types:
        return types[keys["model_type"]]
    if name is None:
        raise UserError(f"{file}: names no architecture: 'architectures' or a known 'model_type' must be there.")
    if name not in known:
        raise UserError(f"{file}: the architecture {name} is unknown here. Known are {', '.join(sorted(known))}.")
    return known[name]


def write_model(model: ModelConfig, original: Mapping[str, Any] | None) -> tuple[Family, Fields]:
    """The family of a resolved model, and the keys of its config.json.

    Args:
      original: the config.json that the model came with. What it says of other things is kept, and of the model too
        where that is still the same.

    Raises:
      UserError: no family says all of the model.
    """
    family = _family(Path("config.json"), original) if original else _find(model)
    keys = family.write(model)
    if missing := differing(family.read(keys), model):
        raise _not_a(family, missing)
    if not original:
        return family, keys
    came = family.read(original)
    if differing(came, model) or came.max_length != model.max_length:
        rest = {key: value for key, value in original.items() if key not in family.known_keys}
        return family, rest | keys
    forms = ("rope_parameters", "rope_theta", "rope_scaling")  # both, whichever the original has
    return family, dict(original) | {key: keys[key] for key in forms if key in keys}


def _find(model: ModelConfig) -> Family:
    """The first family that says all of a model."""
    missing = [(family, differing(family.read(family.write(model)), model)) for family in FAMILIES]
    nearest, fields = min(missing, key=lambda pair: len(pair[1]))
    if fields:
        raise _not_a(nearest, fields)
    return nearest


def _not_a(family: Family, missing: Mapping[str, tuple[Any, Any]]) -> UserError:
    said = ", ".join(
        f"config.model.{name}={ours!r} ({family.architecture} has {theirs!r})"
        for name, (theirs, ours) in missing.items()
    )
    return UserError(f"no architecture of transformers known here says all of this model; the nearest: {said}.")
