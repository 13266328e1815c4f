"""What of a LoRA's adapter_config.json is read here, and what is refused."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError
from jaxllm.interop.peft.config import LORA_KEYS
from jaxllm.interop.peft.targets import of_pattern

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
JSON_NAMES = {
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
}
# What the keys that are read may hold, beside null where that is what they hold by default.
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
