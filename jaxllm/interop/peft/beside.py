"""What both directions know of an adapter: the model that it is for, and how to name it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxllm.interop.hf.family import Family
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.spec import ModelSpec

Arrays = dict[str, np.ndarray]  # float32, by name


class Beside(NamedTuple):
    """The model that an adapter is for."""

    workdir: Path  # of the model or the adapter: how a message names it
    family: Family
    spec: ModelSpec  # `linear_spec` of it


def described(adapter: AdapterConfig) -> str:
    """An adapter in a few words."""
    if adapter.kind == "lora":
        return f"LoRA of rank {adapter.rank}, scale {adapter.scale:g}, at {adapter.targets}"
    return f"{adapter.kind} of {adapter.num_virtual_tokens} virtual tokens"
