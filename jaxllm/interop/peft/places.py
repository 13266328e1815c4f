"""Where PEFT's LoRAs stand: the weights of transformers, each one matrix of ours or several that are one there.

What stands beside a weight lies in the file as the weight itself does. So the rows of a family's table say it too, with
the axis `rank` in place of the outputs (A) or of the inputs (B).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxllm.interop.hf.family import Family
from jaxllm.interop.hf.tensors import Piece, Row
from jaxllm.layout.scope import Tensor
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.adapters import STACKED
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import ModelSpec, model_spec

KERNEL, WEIGHT = ".kernel", ".weight"
PREFIX = "base_model.model."  # of every tensor's name


class Part(NamedTuple):
    """A matrix of ours in a place, and how what stands beside it lies in the file."""

    path: str  # "layers.attention.query"
    row: Row  # of the matrix
    lora: Mapping[str, Tensor]  # a, b and magnitude: what they are here
    stack: str  # axes that only experts have: "experts" where all of them are one weight
    inputs: str  # the groups of the row's pattern
    outputs: str

    def a(self, rank: int) -> Piece:
        """[rank, inputs] in the file; of stacked experts [experts, rank, inputs]."""
        return self._piece("a", f"{self.stack} rank {self.inputs}", rank)

    def b(self, rank: int) -> Piece:
        """[outputs, rank] in the file; of stacked experts [outputs, rank, experts]."""
        return self._piece("b", f"{self.outputs} rank {self.stack}", rank)

    def magnitude(self) -> Piece:
        """[outputs] in the file."""
        return self._piece("magnitude", self.outputs, 0)

    def _piece(self, which: str, pattern: str, rank: int) -> Piece:
        axes, shape = self.lora[which]
        sized = tuple(rank if axis == "rank" else size for axis, size in zip(axes, shape, strict=True))
        return Piece(self.row._replace(path=f"{self.path}.lora.{which}", pattern=pattern), Tensor(axes, sized))


class Place(NamedTuple):
    """A weight of transformers, in every layer."""

    name: str  # "model.layers.{layer}.self_attn.q_proj": a module; or a parameter, "….mlp.experts.down_proj"
    is_parameter: bool  # one of a module that has several
    inputs_first: bool  # the weight is [inputs, outputs] (Conv1D), else [outputs, inputs]
    parts: list[Part]

    @property
    def experts(self) -> int:
        """How many experts the weight is a stack of; 0 where it is a matrix."""
        return self.parts[0].a(1).sizes["experts"] if self.parts[0].stack else 0

    def names(self) -> dict[str, tuple[int, ...]]:
        """The name in each layer: that layer's number, with the expert's where each has a weight of its own."""
        return {name: index for index, name in self.parts[0].a(1).names()}


class Site(NamedTuple):
    """A place in one layer."""

    place: Place
    name: str


def linear_spec(model: ModelConfig) -> ModelSpec:
    """The spec of a resolved model with an adapter at every linear layer that may have one."""
    return model_spec(model, AdapterConfig(kind="lora", rank=1, dora=True))


def linear_paths(spec: ModelSpec) -> list[str]:
    """The paths of the linear layers, in the order of the model: "layers.attention.query"."""
    return [path.removesuffix(".lora.a") for path in spec.parameters if path.endswith(".lora.a")]


def places_of(family: Family, spec: ModelSpec, *, held: bool = True) -> list[Place]:
    """Every place of a model.

    Args:
      spec: `linear_spec` of it.
      held: as transformers 5 holds the model; else as the files name its weights, each expert's its own.
    """
    rows = {row.path: row for row in (*family.rows, *(family.held if held else ()))}
    places: dict[str, Place] = {}
    for path, row in rows.items():
        path = path.removesuffix(KERNEL)
        if f"{path}.lora.a" not in spec.parameters:
            continue
        name = row.name.removesuffix(WEIGHT)
        part, inputs_first = _part(path, row._replace(name=name), spec)
        place = places.setdefault(name, Place(name, name == row.name, inputs_first, []))
        place.parts.append(part)
    return list(places.values())


def _part(path: str, row: Row, spec: ModelSpec) -> tuple[Part, bool]:
    """A part, and whether its inputs come first."""
    lora = {which: spec.parameters[f"{path}.lora.{which}"] for which in ("a", "b", "magnitude")}
    ours = set(lora["a"].axes) - {"rank", *STACKED}
    stack, inputs, outputs, order = "", "", "", ""
    for group in re.findall(r"\([^)]*\)|\w+", row.pattern):
        axes = set(re.findall(r"\w+", group))
        if axes <= set(STACKED):
            stack = group
        elif axes & ours:
            inputs, order = group, order + "i"
        else:
            outputs, order = group, order + "o"
    return Part(path, row, lora, stack, inputs, outputs), order == "io"


def sites_of(places: Iterable[Place]) -> list[Site]:
    """The weights of every layer."""
    return [Site(place, name) for place in places for name in place.names()]


def stems(sites: Iterable[Site]) -> dict[str, Site]:
    """What the names of tensors begin with, where adapters stand at these sites and no others.

    PEFT wraps a module once for each of its parameters, the first of them innermost.
    """
    found: dict[str, Site] = {}
    wrapped: Counter[str] = Counter()
    for site in reversed(list(sites)):
        module = site.name
        if site.place.is_parameter:
            module = site.name.rpartition(".")[0]
            wrapped[module] += 1
            module += (wrapped[module] - 1) * ".base_layer"
        found[PREFIX + module] = site
    return dict(reversed(found.items()))
