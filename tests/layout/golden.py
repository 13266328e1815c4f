"""The golden table: where every parameter and main activation lies, under each named rule set and ZeRO stage.

    python -m tests.layout.golden          # rewrites tests/layout/golden_shardings.txt

so that a change of layout is always a visible diff. The mesh is pipeline=2 replica=2 data=2 context=2 model=2, with
expert=2 in place of replica=2 for the model with experts; for
each parameter: while computed with | where its gradient is accumulated | at rest.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxllm.layout import zero
from jaxllm.layout.layout import Layout, axis_names
from jaxllm.layout.rules import RULE_SETS, make_rules
from jaxllm.layout.scope import Tensor
from jaxllm.model.spec import ACTIVATIONS, model_spec
from tests.layout.runs import GPT2, LLAMA, MOE

FILE = Path(__file__).with_name("golden_shardings.txt")
MESH = AbstractMesh((2, 2, 2, 1, 2, 2), ("pipeline", "replica", "data", "expert", "context", "model"))
EXPERTS_MESH = AbstractMesh((2, 1, 2, 2, 2, 2), MESH.axis_names)
MODELS = {"gpt2": GPT2, "llama": dataclasses.replace(LLAMA, num_kv_heads=4), "moe": MOE}


def table() -> str:
    """The whole table as text."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    for name in RULE_SETS:
        for sequence_parallel in (False, True):
            layout = Layout(MESH, make_rules(name, sequence_parallel=sequence_parallel))
            yield f"== {name}{' sequence_parallel' if sequence_parallel else ''}: activations"
            for activation, axes in ACTIVATIONS.items():
                yield f"{activation}: {_written(axes, layout.spec(axes))}"
        for stage in range(4):
            for model, config in MODELS.items():
                mesh = EXPERTS_MESH if config.num_experts else MESH
                layout = Layout(mesh, make_rules(name), zero_stage=stage)
                yield f"== {name} ZeRO {stage}: {model}"
                yield from (f"{path}: {_places(layout, w)}" for path, w in model_spec(config).parameters.items())


def _places(layout: Layout, w: Tensor) -> str:
    return " | ".join(
        _written(w.axes, place(layout, *w)) for place in (zero.compute_spec, zero.gradient_spec, zero.state_spec)
    )


def _written(axes: tuple[str, ...], spec: P) -> str:
    parts = zip(axes, spec, strict=True)
    return " ".join(f"{axis}/{'+'.join(axis_names(part))}" if axis_names(part) else axis or "-" for axis, part in parts)


if __name__ == "__main__":
    FILE.write_text(table(), encoding="utf-8")
    print(f"{FILE.name}: {len(table().splitlines())} lines")
