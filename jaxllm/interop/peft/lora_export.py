"""A LoRA of ours as PEFT has it: the keys of its adapter_config.json and its tensors."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.errors import UserError
from jaxllm.interop.hf.family import Family
from jaxllm.interop.hf.tensors import file_tensors, pieces_of
from jaxllm.interop.peft.beside import Arrays, Beside
from jaxllm.interop.peft.config import LORA_KEYS
from jaxllm.interop.peft.lengths import Lengths
from jaxllm.interop.peft.lora import Factors, fused, plain_matrices
from jaxllm.interop.peft.lora_files import MAGNITUDE, A, B, open_lora
from jaxllm.interop.peft.places import Place, places_of, sites_of, stems
from jaxllm.interop.peft.targets import shortest_ends
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.spec import ModelSpec
from jaxllm.train.state import Params


def lora_file(spec: ModelSpec, own: Params, base: Beside, lengths: Lengths) -> tuple[dict[str, Any], Arrays]:
    """The keys of adapter_config.json and the tensors of a LoRA of ours.

    Args:
      own: the adapter's parameters.

    Raises:
      UserError: DoRA of experts, which PEFT does not have.
    """
    ours = plain_matrices(spec, own)
    places = [p for p in places_of(base.family, base.spec) if any(part.path in ours for part in p.parts)]
    if spec.adapter.dora and (stacked := [place.name for place in places if place.experts]):
        raise UserError(
            f"config.adapter.dora=True: PEFT has no DoRA of experts ({stacked[0]}). "
            "Export the merged model: --to hf:DIR."
        )
    by_name: dict[str, Factors] = {}
    for place in places:
        by_name |= fused(place, ours, lengths)
    tensors: Arrays = {}
    for stem, site in stems(sites_of(places)).items():
        tensors |= _flat(stem, by_name[site.name])
    ranks = {place.name: by_name[next(iter(place.names()))].rank for place in places}
    return _keys(spec, base, places, ranks), tensors


def _keys(spec: ModelSpec, base: Beside, places: list[Place], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Of adapter_config.json; `ranks` by the name of the place."""
    adapter = spec.adapter
    rank = adapter.rank if adapter.rank in ranks.values() else Counter(ranks.values()).most_common(1)[0][0]
    adapted = {name: place for place in places for name in place.names()}
    rest = _module_names(base) - set(adapted)
    modules: list[str] = []
    parameters: list[str] = []
    patterns: dict[str, dict[str, float]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for place in places:
        (parameters if place.is_parameter else modules).extend(shortest_ends(place.names(), rest))
        if ranks[place.name] == rank:
            continue
        for end in shortest_ends(place.names(), set(adapted) - set(place.names())):
            patterns["rank_pattern"][end] = ranks[place.name]
            patterns["alpha_pattern"][end] = _alpha(adapter, ranks[place.name])
    return LORA_KEYS | {
        **patterns,
        "auto_mapping": None if spec.config.causal else _auto_mapping(base.family),
        "fan_in_fan_out": any(place.inputs_first for place in places),
        "lora_alpha": _alpha(adapter, rank),
        "lora_dropout": adapter.dropout,
        "r": rank,
        "target_modules": sorted(set(modules)),
        "target_parameters": sorted(set(parameters)) or None,
        "task_type": "CAUSAL_LM" if spec.config.causal else None,
        "use_dora": adapter.dora,
        "use_rslora": adapter.rank_stabilized,
    }


def _auto_mapping(family: Family) -> dict[str, str]:
    """The class of transformers, which PEFT notes where an adapter has no task."""
    library = f"transformers.models.{family.model_type}.modeling_{family.model_type}"
    return {"base_model_class": family.architecture, "parent_library": library}


def _alpha(adapter: AdapterConfig, rank: int) -> float:
    """What gives a product of this rank the adapter's scale; a whole number where it is one, as PEFT has it."""
    ratio = rank / adapter.rank
    alpha = adapter.alpha * (math.sqrt(ratio) if adapter.rank_stabilized else ratio)
    return int(alpha) if alpha == int(alpha) else alpha


def _module_names(base: Beside) -> set[str]:
    """Every module of the model that has a weight, its head among them."""
    weights = [*file_tensors(pieces_of(base.family.rows, base.spec)), base.family.head]
    return {name.rpartition(".")[0] for name in weights}


def check_scales(folder: Path, keys: Mapping[str, Any], base: Beside, adapter: AdapterConfig) -> None:
    """Opens what was written as an import would, and compares what each product is multiplied by."""
    opened = open_lora(folder, keys, base)
    for stem in opened.sites:
        if not math.isclose(opened.scale(stem), adapter.scale, rel_tol=1e-12):
            raise RuntimeError(f"{stem} was written to {folder} with the scale {opened.scale(stem)}")


def lora_remarks(adapter: AdapterConfig, keys: Mapping[str, Any]) -> list[str]:
    """What there is to say of a LoRA that was written."""
    lines = []
    if keys["rank_pattern"]:
        lines.append(f"matrices that are one there have adapters of a rank of their own: {keys['rank_pattern']}")
    if adapter.init == "pissa":
        lines.append("what PiSSA started from is subtracted in it, at twice the rank: it is for the base as it is")
    return lines


def _flat(stem: str, factors: Factors) -> dict[str, np.ndarray]:
    """The tensors at a site as the file has them: of stacked experts the rank and the experts are one axis."""
    a, b, magnitude = factors
    flat = {stem + A: a.reshape(-1, a.shape[-1]), stem + B: b.reshape(b.shape[0], -1)}
    return flat | ({} if magnitude is None else {stem + MAGNITUDE: magnitude})
