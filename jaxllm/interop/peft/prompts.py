"""Virtual tokens, ours and PEFT's, which keeps of each kind one tensor: what stands in the places, whatever made it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.errors import UserError
from jaxllm.interop.hf.files import DTYPES, tensors_of
from jaxllm.interop.peft.beside import Arrays, Beside
from jaxllm.interop.peft.config import CONFIG_FILE, DEFAULTS, P_TUNING, PREFIX_TUNING, PROMPT_TUNING, weights_file
from jaxllm.layout.scope import map_leaves
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.config import ModelConfig
from jaxllm.model.prompt_trees import flattened, unflattened
from jaxllm.model.prompts import encoder_dim
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.train.state import Params

TENSOR = "prompt_embeddings"
TYPES = {"prompt": PROMPT_TUNING, "p_tuning": P_TUNING, "prefix": PREFIX_TUNING}
# What is read as what: without its encoder P-tuning is a prompt.
KINDS = {PROMPT_TUNING: "prompt", P_TUNING: "prompt", PREFIX_TUNING: "prefix"}


def prompt_file(spec: ModelSpec, own: Params) -> tuple[dict[str, Any], Arrays]:
    """The keys of adapter_config.json and the tensors of an adapter of ours."""
    adapter, model, kind = spec.adapter, spec.config, TYPES[spec.adapter.kind]
    heads, dim = model.num_heads, model.embed_dim
    said: dict[str, Any] = {}
    if adapter.kind == "prefix":
        heads, dim = model.num_kv_heads, model.num_kv_heads * model.head_dim
        hidden = encoder_dim(model, adapter) if adapter.prefix_projection else dim
        said = {"encoder_hidden_size": hidden, "prefix_projection": adapter.prefix_projection}
    if adapter.kind == "p_tuning":
        said = {
            "encoder_hidden_size": encoder_dim(model, adapter),
            "encoder_num_layers": adapter.encoder_layers,
            "encoder_reparameterization_type": adapter.encoder.upper(),
        }
    keys = DEFAULTS[kind] | {
        "num_attention_heads": heads,
        "num_layers": model.num_layers,
        "num_virtual_tokens": adapter.num_virtual_tokens,
        "task_type": "CAUSAL_LM",
        "token_dim": dim,
        **said,
    }
    return keys, {TENSOR: np.asarray(flattened(spec, own))}


def prompt_here(folder: Path, keys: Mapping[str, Any], base: Beside) -> tuple[AdapterConfig, Arrays]:
    """The config and the parameters of an adapter of PEFT.

    Raises:
      UserError: more than one tensor, or one that does not fit the model.
    """
    file, model, number = folder / CONFIG_FILE, base.spec.config, keys["num_virtual_tokens"]
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(f"{file}: num_virtual_tokens={json.dumps(number)} must be a whole number, 1 or more.")
    if keys["modules_to_save"]:
        raise UserError(
            f"{file}: modules_to_save={json.dumps(keys['modules_to_save'])}: modules that were trained whole are not "
            "read here."
        )
    if not model.causal or number > model.max_length - 2:
        why = "reads both ways" if not model.causal else f"has a context of {model.max_length} tokens"
        raise UserError(f"{file}: {number} virtual tokens do not go before the text of {base.workdir}, which {why}.")
    config = AdapterConfig(kind=KINDS[keys["peft_type"]], num_virtual_tokens=number)
    spec = model_spec(model, config)
    tree = unflattened(spec, _read(weights_file(folder), (number, _width(config, model)), base))
    return config, map_leaves(lambda leaf, _: np.asarray(leaf), tree, spec.own(spec.axes))


def _width(config: AdapterConfig, model: ModelConfig) -> int:
    """Numbers that PEFT keeps of each virtual token."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim if config.kind == "prefix" else model.embed_dim


def _read(file: Path, shape: tuple[int, int], base: Beside) -> np.ndarray:
    tensors = tensors_of([file])
    if set(tensors) != {TENSOR}:
        names = ", ".join(sorted(tensors)[:3]) or "none"
        raise UserError(f"{file}: one tensor is expected, {TENSOR}; there is {names}.")
    stored = tensors[TENSOR]
    if stored.shape != shape:
        raise UserError(
            f"{file}: {TENSOR} is {list(stored.shape)}, but {CONFIG_FILE} and the model of {base.workdir} make it "
            f"{list(shape)}. Give the adapter's own base: --base WORKDIR."
        )
    if stored.dtype not in DTYPES:
        raise UserError(f"{file}: {TENSOR} is of type {stored.dtype}; {', '.join(DTYPES)} are read.")
    return stored.read((slice(None), slice(None))).astype(np.float32)


def prompt_remarks(adapter: AdapterConfig, workdir: Path) -> list[str]:
    """What there is to say of an adapter that was written."""
    if adapter.kind != "p_tuning" and not adapter.prefix_projection:
        return []
    return [f"PEFT keeps what the encoder makes, and not the encoder: to train on, keep {workdir}"]
