"""From the WORKDIR of an adapter to a directory of PEFT, read back before it gets its name."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.errors import UserError
from jaxllm.generate.run import at_rest
from jaxllm.interop.hf.config import write_model
from jaxllm.interop.hf.export import Origin, read_origin
from jaxllm.interop.hf.family import Family
from jaxllm.interop.hf.files import NewTensor, write_file
from jaxllm.interop.hf.load import write_json
from jaxllm.interop.hf.tensors import file_tensors, pieces_of
from jaxllm.interop.hf.whole import whole_or_nothing
from jaxllm.interop.merge import adapted_spec
from jaxllm.interop.peft.config import CONFIG_FILE, LORA_KEYS, read_config
from jaxllm.interop.peft.files import MAGNITUDE, WEIGHTS_FILE, A, B, Beside, open_lora
from jaxllm.interop.peft.lengths import Lengths, column_lengths
from jaxllm.interop.peft.lora import Factors, fused, plain_matrices
from jaxllm.interop.peft.places import Place, linear_spec, places_of, sites_of, stems
from jaxllm.interop.peft.targets import shortest_ends
from jaxllm.layout.layout import make_layout
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.spec import ModelSpec
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.checks import check_for_use
from jaxllm.train.config import Config
from jaxllm.train.initial import restore_base
from jaxllm.train.state import Params

FLOAT32 = np.dtype(np.float32)
Found = dict[str, Factors]  # by what the names of the tensors begin with


def export_adapter(workdir: Path, folder: Path, config: Config, say: Callable[[str], None]) -> None:
    """Writes the adapter in `workdir` as PEFT does, and verifies what was written.

    Args:
      config: the adapter's, with the layout to read it in.

    Raises:
      UserError: no adapter, no checkpoint, or an adapter or model that PEFT or transformers have not.
    """
    adapter = config.adapter
    if adapter.kind == "none":
        raise UserError(f"--from {workdir} is a whole model and no adapter (config.adapter.kind=none): --to hf:DIR.")
    if adapter.kind != "lora":
        raise UserError(f"--from {workdir} is an adapter of the kind {adapter.kind}, which is not written yet.")
    check_for_use(config, jax.device_count())
    spec, origin = adapted_spec(workdir, config), read_origin(workdir)
    family, _ = write_model(spec.config, origin.keys)
    beside = Beside(workdir, family, linear_spec(spec.config))
    layout = make_layout(config.mesh, config.layout)
    abstract = at_rest(spec, layout)
    with whole_or_nothing(folder) as partial:
        with Checkpoints(workdir / "checkpoints", say=say) as checkpoints:
            restored = checkpoints.restore_params(spec.own(abstract))
        if restored is None:
            raise UserError(f"--from {workdir} has no checkpoint yet.")
        _, own, run = restored
        restore = lambda: restore_base(workdir, config, run["base"], spec.base(abstract), say).params  # noqa: E731
        found, keys = lora_file(spec, own, beside, column_lengths(beside.spec, restore))
        keys["base_model_name_or_path"] = _base_name(origin, run["base"])
        write_json(partial / CONFIG_FILE, keys)
        flat = [item for stem, factors in found.items() for item in _flat(stem, factors).items()]
        tensors = {name: _new(values) for name, values in flat}
        write_file(partial / WEIGHTS_FILE, tensors, tensors)
        _verify(partial, beside, found, adapter.scale)
    for line in _remarks(folder, config, keys):
        say(line)


def lora_file(spec: ModelSpec, own: Params, base: Beside, lengths: Lengths) -> tuple[Found, dict[str, Any]]:
    """A LoRA of ours as PEFT has it, and the keys of its adapter_config.json.

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
    found = {stem: by_name[site.name] for stem, site in stems(sites_of(places)).items()}
    ranks = {place.name: by_name[next(iter(place.names()))].rank for place in places}
    return found, _keys(spec, base, places, ranks)


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


def _base_name(origin: Origin, identity: Mapping[str, Any]) -> str:
    """The name of the directory whose parameters the base has, unchanged; "" where it has others."""
    if not origin.keys or origin.parameter_hash != identity["parameter_hash"]:
        return ""
    return origin.keys.get("_name_or_path") or origin.folder


def _flat(stem: str, factors: Factors) -> dict[str, np.ndarray]:
    """The tensors at a site as the file has them: of stacked experts the rank and the experts are one axis."""
    a, b, magnitude = factors
    flat = {stem + A: a.reshape(-1, a.shape[-1]), stem + B: b.reshape(b.shape[0], -1)}
    return flat | ({} if magnitude is None else {stem + MAGNITUDE: magnitude})


def _new(values: np.ndarray) -> NewTensor:
    return NewTensor(values.shape, FLOAT32, lambda: np.ascontiguousarray(values, FLOAT32))


def _verify(folder: Path, base: Beside, found: Found, scale: float) -> None:
    """Reads the files as an import would, and compares names, shapes, scales and every bit."""
    opened = open_lora(folder, read_config(folder), base)
    same = set(opened.sites) == set(found)
    for stem, factors in found.items():
        same = same and math.isclose(opened.scale(stem), scale, rel_tol=1e-12)
        for wanted, read in zip(factors, opened.factors(stem), strict=True) if same else ():
            same = same and (wanted is read or np.array_equal(wanted.view(np.uint32), read.view(np.uint32)))
        if not same:
            raise RuntimeError(f"{stem} was read back from {folder} as something else")


def _remarks(folder: Path, config: Config, keys: Mapping[str, Any]) -> list[str]:
    adapter = config.adapter
    lines = [f"{folder}: LoRA of rank {keys['r']}, scale {adapter.scale:g}, read back and equal"]
    if keys["rank_pattern"]:
        lines.append(f"matrices that are one there have adapters of a rank of their own: {keys['rank_pattern']}")
    if adapter.init == "pissa":
        lines.append("what PiSSA started from is subtracted in it, at twice the rank: it is for the base as it is")
    if adapter.base_weights == "nf4":
        lines.append("it was trained beside a base in 4 bits: load that in 4 bits (nf4), or export the merged model")
    if not keys["base_model_name_or_path"]:
        lines.append(
            f"base_model_name_or_path is empty: its base has no directory. Write one: jaxllm convert --from "
            f"{config.train.init_from} --to hf:DIR, and load that for PeftModel.from_pretrained."
        )
    return lines
