"""The model that an adapter of PEFT is for."""

from pathlib import Path
from typing import NamedTuple

from jaxllm.interop.hf.family import Family
from jaxllm.model.spec import ModelSpec


class Beside(NamedTuple):
    """The model that an adapter is for."""

    workdir: Path  # of the model or the adapter: how a message names it
    family: Family
    spec: ModelSpec  # `linear_spec` of it
