"""From the WORKDIR of an adapter to a directory of PEFT, read back before it gets its name."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.errors import UserError
from jaxllm.generate.run import at_rest
from jaxllm.interop.hf.config import write_model
from jaxllm.interop.hf.export import Origin, read_origin
from jaxllm.interop.hf.files import NewTensor, tensors_of, write_file
from jaxllm.interop.hf.load import write_json
from jaxllm.interop.hf.whole import whole_or_nothing
from jaxllm.interop.merge import adapted_spec
from jaxllm.interop.peft.beside import Beside, described
from jaxllm.interop.peft.config import CONFIG_FILE, WEIGHTS_FILE, read_config
from jaxllm.interop.peft.lengths import column_lengths
from jaxllm.interop.peft.lora_export import check_scales, lora_file, lora_remarks
from jaxllm.interop.peft.places import linear_spec
from jaxllm.interop.peft.prompts import prompt_file, prompt_here, prompt_remarks
from jaxllm.layout.layout import make_layout
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.checks import check_for_use
from jaxllm.train.config import Config
from jaxllm.train.initial import restore_base

FLOAT32 = np.dtype(np.float32)


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
    check_for_use(config, jax.device_count())
    spec, origin = adapted_spec(workdir, config), read_origin(workdir)
    family, _ = write_model(spec.config, origin.keys)
    base = Beside(workdir, family, linear_spec(spec.config))
    abstract = at_rest(spec, make_layout(config.mesh, config.layout))
    with whole_or_nothing(folder) as partial:
        with Checkpoints(workdir / "checkpoints", say=say) as checkpoints:
            restored = checkpoints.restore_params(spec.own(abstract))
        if restored is None:
            raise UserError(f"--from {workdir} has no checkpoint yet.")
        _, own, run = restored
        restore = lambda: restore_base(workdir, config, run["base"], spec.base(abstract), say).params  # noqa: E731
        if adapter.kind == "lora":
            keys, tensors = lora_file(spec, own, base, column_lengths(base.spec, restore))
        else:
            keys, tensors = prompt_file(spec, own)
        keys["base_model_name_or_path"] = _base_name(origin, run["base"])
        write_json(partial / CONFIG_FILE, keys)
        new = {name: NewTensor(t.shape, FLOAT32, lambda t=t: np.ascontiguousarray(t)) for name, t in tensors.items()}
        write_file(partial / WEIGHTS_FILE, new, new)
        _verify(partial / WEIGHTS_FILE, tensors)
        if adapter.kind == "lora":
            check_scales(partial, read_config(partial), base, adapter)
        else:
            prompt_here(partial, read_config(partial), base)  # refuses what does not fit
    say(f"{folder}: {described(adapter)}, read back and equal")
    of_kind = lora_remarks(adapter, keys) if adapter.kind == "lora" else prompt_remarks(adapter, workdir)
    for line in [*of_kind, *_base_remarks(config, keys)]:
        say(line)


def _base_name(origin: Origin, identity: Mapping[str, Any]) -> str:
    """The name of the directory whose parameters the base has, unchanged; "" where it has others."""
    if not origin.keys or origin.parameter_hash != identity["parameter_hash"]:
        return ""
    return origin.keys.get("_name_or_path") or origin.folder


def _verify(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Reads the file, and compares names, shapes and every bit."""
    stored = tensors_of([file])
    for name in tensors | stored:
        same = name in tensors and name in stored and stored[name].shape == tensors[name].shape
        found = stored[name].read((slice(None),) * len(stored[name].shape)) if same else None
        if found is None or not np.array_equal(found.view(np.uint32), tensors[name].view(np.uint32)):
            raise RuntimeError(f"{name} was read back from {file} as something else")


def _base_remarks(config: Config, keys: Mapping[str, Any]) -> list[str]:
    lines = []
    if config.adapter.base_weights == "nf4":
        lines.append("it was trained beside a base in 4 bits: load that in 4 bits (nf4), or export the merged model")
    if not keys["base_model_name_or_path"]:
        lines.append(
            f"base_model_name_or_path is empty: its base has no directory. Write one: jaxllm convert --from "
            f"{config.train.init_from} --to hf:DIR, and load that for PeftModel.from_pretrained."
        )
    return lines
