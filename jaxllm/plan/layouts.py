"""Every layout of a model on N devices: the legal ones, why the others are not, and what a device keeps at rest.

Nothing is compiled, and the devices need not be here: a layout is legal where `train.checks.check` accepts it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jaxllm.errors import UserError, did_you_mean
from jaxllm.layout import zero
from jaxllm.layout.at_rest import shape_at_rest
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import REMAT, Layout
from jaxllm.layout.mesh import AXES, mesh_shape
from jaxllm.layout.rules import LOGICAL_AXES, RULE_SETS, Rules, make_rules
from jaxllm.layout.schedules import SCHEDULES
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.train.checks import check
from jaxllm.train.config import Config, OptimizerConfig
from jaxllm.train.optimizer import make_optimizer
from jaxllm.train.state import bytes_per_device, new_state, place_state

VARIED = ("mesh", "zero_stage", "sequence_parallel", "schedule")

# What a field may be, for a config.
_CHOICES: dict[str, Callable[[Config], Sequence[Any]]] = {
    "zero_stage": lambda config: range(4),
    "sequence_parallel": lambda config: (False, True),
    "schedule": lambda config: tuple(SCHEDULES),
    "virtual_stages": lambda config: _divisors(config.model.num_layers),
    "num_microbatches": lambda config: _divisors(config.data.batch_size),
    "context_attention": lambda config: ("ring", "all_gather"),
    "rules": lambda config: tuple(RULE_SETS),
    "remat": lambda config: REMAT,
    "scan_layers": lambda config: (True, False),
}
FIELDS = ("mesh", *_CHOICES)  # what can vary: "mesh" stands for all its axes, the others are fields of `config.layout`


def variations(config: Config, num_devices: int, fields: Sequence[str] = VARIED) -> dict[str, Sequence[Any]]:
    """The values that each of `fields` takes in `candidates`, the config's own first; of the mesh all factorisations.

    Raises:
      UserError: a name that is not one of FIELDS.
    """
    values: dict[str, Sequence[Any]] = {}
    for name in fields:
        if name not in FIELDS:
            raise UserError(f"--vary {name}: not a field that varies. {did_you_mean(name, FIELDS)}")
        if name == "mesh":
            values[name] = _meshes(config, num_devices)
        else:
            own = getattr(config.layout, name)
            values[name] = [own, *(choice for choice in _CHOICES[name](config) if choice != own)]
    return values


def candidates(config: Config, num_devices: int, vary: Mapping[str, Sequence[Any]] | None = None) -> Iterator[Config]:
    """`config` under every combination of the values of `vary`, legal or not.

    Of those that make the same program (ZeRO stages with nothing to spread over, schedules without a pipeline, …) only
    the first is there. Where the schedule varies and `virtual_stages` does not, each schedule gets as many as it can
    have: `interleaved` the config's, at least 2, the others 1.

    Args:
      vary: default `variations(config, num_devices)`.

    Raises:
      UserError: a mistake in the config that no layout mends.
    """
    check(dataclasses.replace(config, mesh=MeshConfig(), layout=LayoutConfig()), 1)
    vary = variations(config, num_devices) if vary is None else vary
    weights = functools.cache(_weights)
    seen = set()
    for combination in itertools.product(*vary.values()):
        fields = dict(zip(vary, combination, strict=True))
        mesh = fields.pop("mesh", config.mesh)
        if "schedule" in fields and "virtual_stages" not in fields:
            fields["virtual_stages"] = _virtual_stages(config.layout, fields["schedule"])
        candidate = dataclasses.replace(config, mesh=mesh, layout=dataclasses.replace(config.layout, **fields))
        program = _program(candidate, num_devices, weights)
        if program not in seen:
            seen.add(program)
            yield candidate


def legal_layouts(config: Config, num_devices: int, vary: Mapping[str, Sequence[Any]] | None = None) -> list[Config]:
    """The candidates that can be trained."""
    return [c for c, reason in judged_layouts(config, num_devices, vary) if reason is None]


def illegal_layouts(
    config: Config, num_devices: int, vary: Mapping[str, Sequence[Any]] | None = None
) -> list[tuple[Config, str]]:
    """The other candidates, each with what `check` says of it."""
    return [(c, reason) for c, reason in judged_layouts(config, num_devices, vary) if reason is not None]


def judged_layouts(
    config: Config, num_devices: int, vary: Mapping[str, Sequence[Any]] | None = None
) -> Iterator[tuple[Config, str | None]]:
    """Every candidate, with what is wrong with it, or None."""
    for candidate in candidates(config, num_devices, vary):
        try:
            check(candidate, num_devices)
        except UserError as error:
            yield candidate, str(error)
        else:
            yield candidate, None


def flags(config: Config, base: Config) -> list[str]:
    """What to type after `--config FILE.py`, which says `base`, to get the mesh and the layout of `config`."""
    written = []
    for group in ("mesh", "layout"):
        for field, value in dataclasses.asdict(getattr(config, group)).items():
            before = getattr(getattr(base, group), field)
            if value != before and not (group == "mesh" and before == -1 and value == 1):  # -1 is "the rest": 1
                written.append(f"--config.{group}.{field}={str(value).lower() if isinstance(value, bool) else value}")
    return written


def bytes_at_rest(config: Config, num_devices: int) -> int:
    """Bytes of parameters and optimizer state that a device keeps between steps. The vocabulary must be known."""
    model = config.model.resolved()
    compute = config.precision.compute
    spec, optimizer, shapes = _state_shapes(model, config.adapter, config.optimizer, config.train.steps, compute)
    layout = _abstract_layout(_axis_sizes(config.mesh, num_devices), _rules(config.layout), config.layout.zero_stage)
    return bytes_per_device(place_state(shapes, spec, optimizer, layout, compute))


@functools.lru_cache(maxsize=8)
def _state_shapes(model: ModelConfig, adapter: AdapterConfig, optimizer: OptimizerConfig, steps: int, compute: str):
    spec = model_spec(model, adapter)
    made = make_optimizer(optimizer, steps, spec.trained_axes)
    return spec, made, jax.eval_shape(lambda: new_state(spec, made, 0, compute))


@functools.lru_cache(maxsize=8)
def _spec(model: ModelConfig) -> ModelSpec:
    return model_spec(model)


def _meshes(config: Config, num_devices: int) -> list[MeshConfig]:
    """Every way to deal the devices to the axes; `expert` stays as it is where the model has no experts."""
    if config.model.num_experts:
        return [MeshConfig(**dict(zip(AXES, sizes, strict=True))) for sizes in factorisations(num_devices, len(AXES))]
    expert = max(config.mesh.expert, 1)
    if num_devices % expert:
        return [config.mesh]
    rest = [axis for axis in AXES if axis != "expert"]
    found = factorisations(num_devices // expert, len(rest))
    return [MeshConfig(expert=expert, **dict(zip(rest, sizes, strict=True))) for sizes in found]


def factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every tuple of `parts` sizes whose product is `number`."""
    if parts == 1:
        yield (number,)
        return
    for size in _divisors(number):
        for rest in factorisations(number // size, parts - 1):
            yield (size, *rest)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _virtual_stages(layout: LayoutConfig, schedule: str) -> int:
    if schedule == "interleaved":
        return max(layout.virtual_stages, 2)
    return layout.virtual_stages if schedule == layout.schedule else 1


def _program(config: Config, num_devices: int, weights_of: Callable[..., Any]) -> Any:
    """What tells the compiled program of a config: two configs with an equal one differ in nothing that runs.

    A config that has no such thing, because its mesh or its rules make no sense, stands for itself.
    """
    layout = config.layout
    try:
        sizes, rules = _axis_sizes(config.mesh, num_devices), _rules(layout)
        shape = dict(sizes)
        weights = weights_of(config.model.resolved(num_devices), sizes, rules, layout.zero_stage)
    except UserError:
        return config
    split = tuple(tuple(a for a in rules.mesh_axes(axis) if shape[a] > 1) for axis in LOGICAL_AXES if axis != "state")
    pipeline = (layout.schedule, layout.virtual_stages, layout.stage_layers) if shape["pipeline"] > 1 else ()
    context = layout.context_attention if shape["context"] > 1 else ""
    rest = (layout.num_microbatches, layout.remat, layout.scan_layers, layout.attention)
    return sizes, split, weights, pipeline, context, rest


def _weights(model: ModelConfig, sizes: tuple[tuple[str, int], ...], rules: Rules, zero_stage: int) -> Any:
    """Where each weight lies at rest and in a step, where its gradient is summed, and over what once a step."""
    spec, layout = _spec(model), _abstract_layout(sizes, rules, zero_stage)
    inside = layout.of_stage
    axes, shapes = jax.tree.leaves(spec.axes, is_leaf=lambda a: isinstance(a, tuple)), jax.tree.leaves(spec.shapes)
    leaves = [(a, leaf.shape) for a, leaf in zip(axes, shapes, strict=True)]
    steps = tuple(zero.step_spec(inside, *leaf) for leaf in leaves)
    gradients = tuple(zero.gradient_spec(inside, *leaf) for leaf in leaves)
    rest = [(a, shape_at_rest(layout, a, shape)) for a, shape in leaves]
    return tuple(zero.state_spec(layout, *leaf) for leaf in rest), steps, gradients, zero.reduced_once(layout, steps)


def _axis_sizes(mesh: MeshConfig, num_devices: int) -> tuple[tuple[str, int], ...]:
    return tuple(mesh_shape(mesh, num_devices).items())


def _rules(layout: LayoutConfig) -> Rules:
    return make_rules(layout.rules, layout.rule_overrides, sequence_parallel=layout.sequence_parallel)


def _abstract_layout(sizes: tuple[tuple[str, int], ...], rules: Rules, zero_stage: int) -> Layout:
    names, numbers = zip(*sizes, strict=True)
    return Layout(AbstractMesh(numbers, names), rules, zero_stage=zero_stage)
