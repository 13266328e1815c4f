"""adapter_config.json: what PEFT 0.21.2 writes, and what of it is read here."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError
from jaxllm.interop.hf.config import read_json
from jaxllm.interop.hf.files import refuse_pickles
from jaxllm.interop.peft.targets import of_pattern

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
LORA = "LORA"
READ = (LORA,)  # the values of peft_type
VERSION = "0.21.2"

# Every key of a LoRA's file, in its order, as it is where nothing is said.
LORA_KEYS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": LORA,
    "peft_version": VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Keys that add to the model, or change it, where they say anything.
REFUSED = {
    "modules_to_save": "modules that were trained whole",
    "trainable_token_indices": "embeddings of tokens that were trained",
    "lora_bias": "biases of adapters",
    "alora_invocation_tokens": "an adapter that begins at certain tokens (aLoRA)",
    "layer_replication": "layers that are used several times",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow's routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Of init_lora_weights: those that leave the base as it is. The others (pissa, olora, loftq, …) are for a changed base.
SAME_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# What the keys that are read may hold, beside null where that is what they hold by default.
JSON_NAMES = {
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
}
TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "target_modules": (list, str),
    "target_parameters": (list,),
    "exclude_modules": (list, str),
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
    "use_dora": (bool,),
    "use_rslora": (bool,),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The keys of a directory's adapter_config.json, with PEFT's defaults where it is silent.

    Raises:
      UserError: no such folder or file, a broken one, or a kind of adapter that is not read here.
    """
    if not folder.is_dir():
        raise UserError(f"--from peft:{folder}: no such folder. It is a local one; nothing is downloaded.")
    file = folder / CONFIG_FILE
    if not file.is_file():
        way_out = f" Write --from hf:{folder}." if (folder / "config.json").is_file() else ""
        raise UserError(f"--from peft:{folder}: there is no {CONFIG_FILE} in it, so it is no adapter.{way_out}")
    keys = read_json(file)
    kind = keys.get("peft_type")
    if kind not in READ:
        raise UserError(f"{file}: peft_type={json.dumps(kind)} is not read here; {' and '.join(READ)} are.")
    return LORA_KEYS | keys


def weights_file(folder: Path) -> Path:
    """The weights of an adapter.

    Raises:
      UserError: there are none, or in a pickle.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        refuse_pickles(folder)
        raise UserError(f"{folder} has no weights: {WEIGHTS_FILE} is not there.")
    return file


def check_lora(file: Path, keys: Mapping[str, Any]) -> None:
    """Refuses a LoRA that is more than matrices beside linear layers.

    Raises:
      UserError: it names the key.
    """
    for key, what in REFUSED.items():
        if keys[key]:
            raise UserError(
                f"{file}: {key}={json.dumps(keys[key])}: {what}: only LoRA, rsLoRA and DoRA of linear layers are read "
                "here. Merge it into its base with PEFT (merge_and_unload), and import that: --from hf:DIR."
            )
    if keys["bias"] != "none":
        raise UserError(
            f"{file}: bias={json.dumps(keys['bias'])}: biases that were trained are not read here. Merge it into its "
            "base with PEFT (merge_and_unload), and import that: --from hf:DIR."
        )
    if keys["init_lora_weights"] not in SAME_BASE:
        raise UserError(
            f"{file}: init_lora_weights={json.dumps(keys['init_lora_weights'])} is for a base that it changed. Save a "
            "plain LoRA: model.save_pretrained(DIR, path_initial_model_for_weight_conversion=…)."
        )
    _check_types(file, keys)


def _check_types(file: Path, keys: Mapping[str, Any]) -> None:
    for key, types in TYPES.items():
        value = keys[key]
        if value is None and LORA_KEYS[key] is None:
            continue
        if not isinstance(value, types) or isinstance(value, bool) != (types == (bool,)):
            names = " or ".join(JSON_NAMES[kind] for kind in types)
            raise UserError(f"{file}: {key}={json.dumps(value)} must be {names}.")
    ranks, alphas = keys["rank_pattern"], keys["alpha_pattern"]
    for key, rank in [("r", keys["r"]), *((f"rank_pattern of {name}", rank) for name, rank in ranks.items())]:
        if not isinstance(rank, int) or rank < 1:
            raise UserError(f"{file}: {key}={json.dumps(rank)} must be a whole number, 1 or more.")
    for name, alpha in alphas.items():
        if not isinstance(alpha, (int, float)):
            raise UserError(f"{file}: alpha_pattern of {name}={json.dumps(alpha)} must be a number.")
    patterns = [keys[key] for key in ("target_modules", "exclude_modules") if isinstance(keys[key], str)]
    layers = keys["layers_pattern"] or []
    for pattern in [*patterns, *([layers] if isinstance(layers, str) else layers), *ranks, *alphas]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{file}: {pattern!r} is no regular expression: {error}.") from None


def rank_of(name: str, keys: Mapping[str, Any]) -> int:
    """The rank at the weight `name`."""
    return of_pattern(name, keys["rank_pattern"], keys["r"])


def scale_of(name: str, keys: Mapping[str, Any]) -> float:
    """What the product at the weight `name` is multiplied by."""
    rank, alpha = rank_of(name, keys), of_pattern(name, keys["alpha_pattern"], keys["lora_alpha"])
    return alpha / (math.sqrt(rank) if keys["use_rslora"] else rank)
