"""A LoRA of PEFT as it is here."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxllm.interop.peft.beside import Arrays
from jaxllm.interop.peft.lengths import Lengths
from jaxllm.interop.peft.lora import Matrices, apart
from jaxllm.interop.peft.lora_files import LoRAFile
from jaxllm.interop.peft.targets import ALL_LINEAR
from jaxllm.model.adapter_config import AdapterConfig

LAYERS = "layers."  # what the paths of linear layers begin with


def lora_here(opened: LoRAFile, linear: Sequence[str], lengths: Lengths) -> tuple[AdapterConfig, Arrays]:
    """The config and the parameters: of one rank and one scale, at the same matrices in every layer.

    Smaller ranks, and layers without an adapter, are filled with zeros. Where scales differ B is multiplied by their
    ratio to the most common one.

    Args:
      linear: the paths of all linear layers.
    """
    keys = opened.keys
    scales = {stem: opened.scale(stem) for stem in opened.sites}
    scale = Counter(filter(None, map(abs, scales.values()))).most_common(1)
    scale = scale[0][0] if scale else 1.0
    matrices: dict[str, Matrices] = {}
    places = {site.place.name: site.place for site in opened.sites.values()}
    for name, place in places.items():
        found = {}
        for stem, site in opened.sites.items():
            if site.place.name == name:
                ratio, factors = np.float32(scales[stem] / scale), opened.factors(stem)
                found[site.name] = factors if ratio == 1 else factors._replace(b=factors.b * ratio)
        matrices |= apart(place, found, lengths)
    rank = max(each.rank for each in matrices.values())
    config = AdapterConfig(
        kind="lora",
        rank=rank,
        alpha=float(f"{scale * (rank**0.5 if keys['use_rslora'] else rank):.12g}"),
        rank_stabilized=bool(keys["use_rslora"]),
        dropout=float(keys["lora_dropout"]),
        targets=_targets([path for path in linear if path in matrices], linear),
        dora=bool(keys["use_dora"]),
    )
    return config, _parameters(matrices, rank)


def _targets(chosen: list[str], linear: Sequence[str]) -> str:
    """`config.adapter.targets` for some of the linear layers."""
    return ALL_LINEAR if chosen == list(linear) else ",".join(path.removeprefix(LAYERS) for path in chosen)


def _parameters(matrices: dict[str, Matrices], rank: int) -> Arrays:
    found: Arrays = {}
    for path, each in matrices.items():
        a, b, magnitude, _ = each.of_rank(rank)
        found |= {f"{path}.lora.a": a, f"{path}.lora.b": b}
        found |= {} if magnitude is None else {f"{path}.lora.magnitude": magnitude}
    return found
