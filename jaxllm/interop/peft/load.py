"""From a directory of PEFT to the WORKDIR of an adapter."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from jaxllm.errors import UserError
from jaxllm.generate.run import at_rest, restore_for_use
from jaxllm.interop.hf.config import write_model
from jaxllm.interop.hf.export import Origin, read_origin
from jaxllm.interop.hf.load import write_json
from jaxllm.interop.hf.whole import whole_or_nothing
from jaxllm.interop.merge import adapted_spec
from jaxllm.interop.peft.beside import Beside, described
from jaxllm.interop.peft.config import LORA, read_config
from jaxllm.interop.peft.lengths import column_lengths
from jaxllm.interop.peft.lora_files import open_lora
from jaxllm.interop.peft.lora_import import lora_here
from jaxllm.interop.peft.places import linear_paths, linear_spec
from jaxllm.interop.peft.prompts import prompt_here
from jaxllm.layout.layout import make_layout
from jaxllm.layout.scope import path_name
from jaxllm.model.spec import model_spec
from jaxllm.steps import STEPS
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.checks import check_for_use
from jaxllm.train.config import Config, config_dict
from jaxllm.train.initial import carry_origin, newest_identity


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
    origin = read_origin(base)
    family, _ = write_model(model, origin.keys)
    beside = Beside(base, family, linear_spec(model))
    layout = make_layout(config.mesh, config.layout)
    restore = lambda: restore_for_use(base, config, model_spec(model), layout, say)[1]  # noqa: E731
    with whole_or_nothing(workdir) as partial:
        if keys["peft_type"] == LORA:
            opened = open_lora(folder, keys, beside)
            adapter, arrays = lora_here(opened, linear_paths(beside.spec), column_lengths(beside.spec, restore))
        else:
            adapter, arrays = prompt_here(folder, keys, beside)
        spec = model_spec(model, adapter)
        abstract = spec.own(at_rest(spec, layout))
        place = lambda path, leaf: jax.device_put(arrays[path_name(path)], leaf.sharding)  # noqa: E731
        written = dataclasses.replace(
            config,
            train_step=next(name for name, step in STEPS.items() if adapter.kind in step.adapters),
            adapter=adapter,
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
    if remark := _another_base(keys["base_model_name_or_path"], base, origin):
        say(remark)
    say(f"{workdir}: {described(adapter)}, {spec.num_trained_parameters:,} parameters as float32, for {base}")


def _another_base(name: str | None, base: Path, origin: Origin) -> str | None:
    """What to say where the adapter names another model than the one that the base came from, as far as names tell."""
    known = (origin.folder, (origin.keys or {}).get("_name_or_path") or "")
    if not name or Path(name).name in [Path(each).name for each in known]:
        return None
    came = f"came from {origin.folder}" if origin.folder else "came from no directory"
    return f"the adapter names its base {name}, and {base} {came}: names and shapes fit, see that it is the same model"
