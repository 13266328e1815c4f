"""adapter_config.json: what PEFT 0.21.2 writes, and what of it is read here."""

import json
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError
from jaxllm.interop.hf.config import read_json
from jaxllm.interop.hf.files import refuse_pickles

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
LORA, PROMPT_TUNING, P_TUNING, PREFIX_TUNING = "LORA", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"
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
_PROMPT_KEYS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "",
    "inference_mode": True,
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": None,
    "peft_version": VERSION,
    "revision": None,
    "task_type": None,
    "token_dim": None,
}
_PROMPT_TUNING_KEYS = {"prompt_tuning_init": "RANDOM"} | dict.fromkeys(
    ("prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path")
)
_P_TUNING_KEYS = {"encoder_dropout": 0.0, "encoder_num_layers": 2, "encoder_reparameterization_type": "MLP"}
# Of each kind that is read here.
DEFAULTS: dict[str, dict[str, Any]] = {
    LORA: LORA_KEYS,
    PROMPT_TUNING: _PROMPT_KEYS | _PROMPT_TUNING_KEYS,
    P_TUNING: _PROMPT_KEYS | _P_TUNING_KEYS | {"encoder_hidden_size": None},
    PREFIX_TUNING: _PROMPT_KEYS | {"encoder_hidden_size": None, "init_weights": None, "prefix_projection": False},
}
DEFAULTS = {kind: dict(sorted((keys | {"peft_type": kind}).items())) for kind, keys in DEFAULTS.items()}


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
    if kind not in list(DEFAULTS):
        raise UserError(f"{file}: peft_type={json.dumps(kind)} is not read here; {', '.join(DEFAULTS)} are.")
    return DEFAULTS[kind] | keys


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
