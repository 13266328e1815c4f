"""What one model takes on eight devices under ten layouts: compiled, not run.

    python -m tests.benchmarks.layout_memory

A Llama of 1.1 billion parameters, 32 sequences of 2,048 tokens a step, bfloat16 compute, remat `full`, on 8 virtual CPU
devices. Prints a Markdown table: bytes a device of the state at rest, of what a step needs besides, and what it sends.
XLA's GPU compiler may arrange a step otherwise; the state at rest is the same.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # a test has its own

import dataclasses
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.data.batch import Batch
from jaxllm.layout.collectives import collectives
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.steps import STEPS
from jaxllm.train.config import Config
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.state import abstract_state, bytes_per_device
from jaxllm.train.train_step import make_train_step

MODEL = ModelConfig(
    num_layers=16,
    embed_dim=2048,
    num_heads=16,
    num_kv_heads=8,
    mlp_dim=8192,
    vocab_size=32_000,
    max_length=2048,
    positions="rope",
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    use_bias=False,
    tied_head=False,
)
BATCH, LENGTH = 32, 2048
LAYOUTS: list[tuple[dict[str, int], dict[str, object]]] = [
    ({"data": 8}, {"zero_stage": 0}),
    ({"data": 8}, {"zero_stage": 1}),
    ({"data": 8}, {"zero_stage": 3}),
    ({"data": 8}, {"zero_stage": 3, "num_microbatches": 4}),
    ({"replica": 2, "data": 4}, {"zero_stage": 3}),
    ({"data": 2, "model": 4}, {"zero_stage": 1}),
    ({"data": 2, "model": 4}, {"zero_stage": 1, "sequence_parallel": True}),
    ({"data": 2, "context": 4}, {"zero_stage": 3}),
    ({"pipeline": 4, "data": 2}, {"zero_stage": 1, "num_microbatches": 16}),
    ({"pipeline": 2, "data": 2, "model": 2}, {"zero_stage": 1, "sequence_parallel": True, "num_microbatches": 8}),
]


def measure(spec: ModelSpec, mesh: dict[str, int], fields: dict[str, object]) -> str:
    """One row of the table."""
    config = Config()
    layout = make_layout(MeshConfig(**{"data": 1} | mesh), LayoutConfig(remat="full", **fields))
    optimizer = make_optimizer(config.optimizer, 1000, spec.axes)
    state = abstract_state(spec, optimizer, layout)
    place = NamedSharding(layout.mesh, layout.spec(("batch", None)))
    integers, mask = (jax.ShapeDtypeStruct((BATCH, LENGTH), dtype, sharding=place) for dtype in (np.int32, bool))
    step = make_train_step(STEPS["pretrain"], spec, optimizer, make_schedule(config.optimizer, 1000), config, layout)
    compiled = step.trace(state, Batch(integers, integers, integers, mask)).lower().compile()
    sent: dict[str, int] = {}
    for c in collectives(compiled.as_text(), layout.mesh):
        sent["+".join(c.mesh_axes)] = sent.get("+".join(c.mesh_axes), 0) + c.bytes * c.runs
    traffic = ", ".join(f"{axes} {size / 1e9:.1f}" for axes, size in sorted(sent.items()) if size > 5e7)
    flags = " ".join(f"{name}={value}" for name, value in (mesh | fields).items())
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return f"| `{flags}` | {bytes_per_device(state) / 1e9:.2f} | {temporary / 1e9:.2f} | {traffic} |"


def main() -> None:
    spec = model_spec(dataclasses.replace(MODEL).resolved())
    print(f"{spec.num_parameters / 1e9:.2f} billion parameters", file=sys.stderr)
    print("| layout | state, GB | a step besides, GB | results of collectives a step, GB by mesh axis |")
    print("| --- | --- | --- | --- |")
    for mesh, fields in LAYOUTS:
        print(measure(spec, mesh, fields), flush=True)


if __name__ == "__main__":
    main()
