"""adapter_model.safetensors of a LoRA: the names and shapes that adapter_config.json asks for, and no others."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.errors import UserError
from jaxllm.interop.hf.family import Family
from jaxllm.interop.hf.files import DTYPES, Stored, tensors_of
from jaxllm.interop.peft.beside import Beside
from jaxllm.interop.peft.config import CONFIG_FILE, weights_file
from jaxllm.interop.peft.lora import Factors
from jaxllm.interop.peft.lora_config import check_lora, rank_of, scale_of
from jaxllm.interop.peft.places import PREFIX, Place, Site, places_of, sites_of, stems
from jaxllm.interop.peft.targets import ends_with, is_target

A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
# Names of tensors that belong to something else: what that is.
OTHERS = {
    r".*\.lora_embedding_[AB]": "LoRA of an embedding",
    r".*\.lora_[AB]\.bias": "a bias of an adapter",
    r".*\.base_layer\.weight": "a whole weight of the base",
    r"(?!.*\.lora_).*\.bias": "a bias that was trained",
    r"(?!.*\.lora_).*\.weight": "a module that was trained whole",
}


class LoRAFile(NamedTuple):
    """A LoRA of PEFT whose names, shapes and dtypes were found right."""

    keys: Mapping[str, Any]  # of its config
    sites: dict[str, Site]  # by what the names of the tensors begin with
    tensors: dict[str, Stored]  # by the name that PEFT writes

    def factors(self, stem: str) -> Factors:
        """What stands at a site."""
        experts = self.sites[stem].place.experts
        a, b = self._read(stem + A), self._read(stem + B)
        if experts:
            a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts)
        return Factors(a, b, self._read(stem + MAGNITUDE) if self.keys["use_dora"] else None)

    def scale(self, stem: str) -> float:
        """What the product of the two matrices is multiplied by."""
        return scale_of(self.sites[stem].name, self.keys)

    def _read(self, name: str) -> np.ndarray:
        stored = self.tensors[name]
        return stored.read((slice(None),) * len(stored.shape)).astype(np.float32)


def open_lora(folder: Path, keys: Mapping[str, Any], base: Beside) -> LoRAFile:
    """Reads the header of the weights, and holds it against the config and the model.

    Args:
      keys: of the config, with defaults.

    Raises:
      UserError: what is missing, unexpected, misshapen or of another dtype, by name.
    """
    check_lora(folder / CONFIG_FILE, keys)
    file = weights_file(folder)
    stored = tensors_of([file])
    every = sites_of(_places(base, stored))
    tensors = {_name_today(name, stems(every), base.family): tensor for name, tensor in stored.items()}
    sites = stems(_wanted(every, keys, tensors))
    shapes = {name: shape for stem, site in sites.items() for name, shape in _shapes(stem, site, keys).items()}
    if unexpected := [name for name in tensors if name not in shapes]:
        raise _unexpected(file, unexpected[0], every, keys, base)
    if missing := [name for name in shapes if name not in tensors]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{file}: for the model of {base.workdir} {CONFIG_FILE} asks for {missing[0]}{more}, but there is no such "
            "tensor: the file is not whole, or for another model."
        )
    if not sites:
        raise UserError(f"{folder / CONFIG_FILE}: names no linear layer of the model of {base.workdir}.")
    for name, shape in shapes.items():
        _check(tensors[name], shape, base)
    return LoRAFile(keys, sites, tensors)


def _places(base: Beside, names: Iterable[str]) -> list[Place]:
    """As transformers 5 holds the model, or as 4 did, where each expert's matrices were modules of their own."""
    before = places_of(base.family, base.spec, held=False)
    apart = tuple(f"{PREFIX}{name}.lora_" for place in before if "{expert}" in place.name for name in place.names())
    return before if any(name.startswith(apart) for name in names) else places_of(base.family, base.spec)


def _name_today(name: str, every: Mapping[str, Site], family: Family) -> str:
    """The name as PEFT writes it today, for the model with its head."""
    stem, lora, end = name.partition(".lora_")
    with_head = PREFIX + family.prefix + stem.removeprefix(PREFIX)
    stem = with_head if stem not in every and with_head in every else stem
    return f"{stem}{lora}{end}".replace(f"{MAGNITUDE}.weight", MAGNITUDE)


def _wanted(every: Iterable[Site], keys: Mapping[str, Any], tensors: Iterable[str]) -> list[Site]:
    """The sites that the config asks for; where it says nothing, those that the file has."""
    modules, parameters = keys["target_modules"], keys["target_parameters"]
    if modules is None and not parameters:
        there = {name.partition(".lora_")[0] for name in tensors}
        return [site for stem, site in stems(every).items() if stem in there]
    return [
        site
        for site in every
        if (ends_with(site.name, parameters or ()) if site.place.is_parameter else is_target(site.name, keys))
    ]


def _shapes(stem: str, site: Site, keys: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor at a site."""
    part, rank = site.place.parts[0], rank_of(site.name, keys) * max(site.place.experts, 1)
    inputs, outputs = part.a(1).file_shape[-1], part.b(1).file_shape[0]
    shapes: dict[str, tuple[int, ...]] = {stem + A: (rank, inputs), stem + B: (outputs, rank)}
    return shapes | ({stem + MAGNITUDE: (outputs,)} if keys["use_dora"] else {})


def _unexpected(file: Path, name: str, every: list[Site], keys: Mapping[str, Any], base: Beside) -> UserError:
    """What a tensor is that has no place."""
    stem, lora, _ = name.partition(".lora_")
    module = stem.removeprefix(PREFIX)
    if what := next((what for pattern, what in OTHERS.items() if re.fullmatch(pattern, name)), None):
        return UserError(f"{file}: {name} is {what}, which is not read here: only LoRA of linear layers is.")
    if lora and stem in stems(every):
        said = {key: keys[key] for key in ("target_modules", "target_parameters", "layers_to_transform", "use_dora")}
        return UserError(f"{file}: {name} is not what {CONFIG_FILE} asks for: {json.dumps(said)}.")
    weights = [*(row.name for row in (*base.family.rows, *base.family.held)), base.family.head]
    others = {weight.rpartition(".")[0] for weight in weights} - {site.place.name for site in every}
    if lora and {module, re.sub(r"\.\d+\.", ".{layer}.", module)} & others:
        return UserError(
            f"{file}: {name}: an adapter of {module} is not read here, only those of the linear layers of blocks."
        )
    return UserError(
        f"{file}: the model of {base.workdir} is a {base.family.architecture} of {base.spec.config.num_layers} layers "
        f"and has no place for {name}. Give the adapter's own base: --base WORKDIR."
    )


def _check(stored: Stored, shape: tuple[int, ...], base: Beside) -> None:
    if stored.shape != shape:
        raise UserError(
            f"{stored.file}: {stored.name} is {list(stored.shape)}, but {CONFIG_FILE} and the model of {base.workdir} "
            f"make it {list(shape)}. Give the adapter's own base: --base WORKDIR."
        )
    if stored.dtype not in DTYPES:
        raise UserError(
            f"{stored.file}: {stored.name} is of type {stored.dtype}; {', '.join(DTYPES)} are read. "
            "Save the adapter in one of those."
        )
