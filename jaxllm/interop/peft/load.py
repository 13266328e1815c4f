"""From a directory of PEFT to the WORKDIR of an adapter."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.errors import UserError
from jaxllm.generate.run import at_rest, restore_for_use
from jaxllm.interop.hf.config import write_model
from jaxllm.interop.hf.export import read_origin
from jaxllm.interop.hf.load import write_json
from jaxllm.interop.hf.whole import whole_or_nothing
from jaxllm.interop.merge import adapted_spec
from jaxllm.interop.peft.config import read_config
from jaxllm.interop.peft.files import Beside, LoRAFile, open_lora
from jaxllm.interop.peft.lengths import Lengths, column_lengths
from jaxllm.interop.peft.lora import Matrices, apart
from jaxllm.interop.peft.places import linear_paths, linear_spec
from jaxllm.interop.peft.targets import ALL_LINEAR
from jaxllm.layout.layout import make_layout
from jaxllm.layout.scope import path_name
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.spec import model_spec
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.checks import check_for_use
from jaxllm.train.config import Config, config_dict
from jaxllm.train.initial import carry_origin, newest_identity

LAYERS = "layers."  # what the paths of linear layers begin with


class Adapter(NamedTuple):
    """An adapter as it is here."""

    config: AdapterConfig
    parameters: dict[str, np.ndarray]  # by path, float32


def import_adapter(folder: Path, base: Path, workdir: Path, config: Config, say: Callable[[str], None]) -> None:
    """Writes the adapter in `folder` as a WORKDIR, a run beside `base`.

    Args:
      config: that of the run in `base`, with the layout to read it in.

    Raises:
      UserError: an adapter that is not read here, not whole, or for another model; nothing is written then.
    """
    if config.adapter.kind != "none":
        raise UserError(
            f"--base {base} is an adapter itself. Give the model that it is beside, or merge the two: "
            f"jaxllm convert --from {base} --to WORKDIR."
        )
    check_for_use(config, jax.device_count())
    keys = read_config(folder)
    model = adapted_spec(base, config).config
    family, _ = write_model(model, read_origin(base).keys)
    beside = Beside(base, family, linear_spec(model))
    opened = open_lora(folder, keys, beside)
    layout = make_layout(config.mesh, config.layout)
    restore = lambda: restore_for_use(base, config, model_spec(model), layout, say)[1]  # noqa: E731
    with whole_or_nothing(workdir) as partial:
        adapter = lora_adapter(opened, linear_paths(beside.spec), column_lengths(beside.spec, restore))
        spec = model_spec(model, adapter.config)
        abstract = spec.own(at_rest(spec, layout))
        place = lambda path, leaf: jax.device_put(adapter.parameters[path_name(path)], leaf.sharding)  # noqa: E731
        written = dataclasses.replace(
            config,
            train_step="lora",
            adapter=adapter.config,
            data=dataclasses.replace(config.data, tokenizer=str(workdir / "tokenizer")),
            train=dataclasses.replace(config.train, init_from=str(base)),
        )
        with Checkpoints(partial / "checkpoints", say=say) as checkpoints:
            params = jax.tree_util.tree_map_with_path(place, abstract)
            checkpoints.save_params(params, config_dict(written), newest_identity(base))
        write_json(partial / "config.json", config_dict(written))
        if (base / "tokenizer").is_dir():
            shutil.copytree(base / "tokenizer", partial / "tokenizer")
        carry_origin(str(base), partial)
    lora = adapter.config
    say(
        f"{workdir}: LoRA of rank {lora.rank} at {lora.targets}, {spec.num_trained_parameters:,} parameters as "
        f"float32, for {base}"
    )


def lora_adapter(opened: LoRAFile, linear: Sequence[str], lengths: Lengths) -> Adapter:
    """A LoRA of PEFT as it is here: of one rank and one scale, at the same matrices in every layer.

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
    return Adapter(config, _parameters(matrices, rank))


def _targets(chosen: list[str], linear: Sequence[str]) -> str:
    """`config.adapter.targets` for some of the linear layers."""
    return ALL_LINEAR if chosen == list(linear) else ",".join(path.removeprefix(LAYERS) for path in chosen)


def _parameters(matrices: dict[str, Matrices], rank: int) -> dict[str, Any]:
    found = {}
    for path, each in matrices.items():
        a, b, magnitude, _ = each.of_rank(rank)
        found |= {f"{path}.lora.a": a, f"{path}.lora.b": b}
        found |= {} if magnitude is None else {f"{path}.lora.magnitude": magnitude}
    return found
