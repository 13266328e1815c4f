"""What a step takes on one device when the whole of a model is trained, and when an adapter is: compiled, not run.

    python -m tests.benchmarks.adapter_memory

A Llama of 1.1 billion parameters, one sequence of 512 tokens, remat `full`. Prints a Markdown table: bytes at rest by
part of the state, and what a step needs besides at its peak. XLA's CPU backend multiplies bfloat16 as float32, and
keeps matrices that do not change converted while a step runs: 4.5 GB here that no GPU needs, and that the rows in
float32 are without. XLA's GPU compiler may arrange a step otherwise; what is at rest is the same.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import sys
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.data.batch import Batch
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.spec import model_spec
from jaxllm.steps import STEPS
from jaxllm.train.config import Config, PrecisionConfig
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.state import abstract_state, bytes_per_device
from jaxllm.train.train_step import make_train_step
from tests.benchmarks.layout_memory import MODEL

KINDS = {
    "everything": AdapterConfig(),
    "LoRA": AdapterConfig(kind="lora", rank=16),
    "QLoRA": AdapterConfig(kind="lora", rank=16, base_weights="nf4"),
}
LENGTH = 512


class Memory(NamedTuple):
    """Bytes on the device."""

    num_parameters: int
    num_trained: int
    trained: int  # float32 master weights
    optimizer: int
    frozen: int
    matrices: float  # bytes a parameter of the frozen matrices of the layers
    temporary: int  # what a step needs besides

    @property
    def peak(self) -> int:
        return self.trained + self.optimizer + self.frozen + self.temporary


def measure(adapter: AdapterConfig, compute: str) -> Memory:
    """Compiles the step."""
    config = Config(adapter=adapter, precision=PrecisionConfig(compute=compute))
    spec = model_spec(MODEL.resolved(), adapter)
    layout = make_layout(MeshConfig(data=1), LayoutConfig(remat="full"), devices=jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, 1000, spec.trained_axes)
    state = abstract_state(spec, optimizer, layout, compute)
    integers, mask = (
        jax.ShapeDtypeStruct((1, LENGTH), dtype, sharding=layout.sharding("batch", None)) for dtype in (np.int32, bool)
    )
    step = make_train_step(STEPS["pretrain"], spec, optimizer, make_schedule(config.optimizer, 1000), config, layout)
    compiled = step.trace(state, Batch(integers, integers, integers, mask)).lower().compile()
    parts = (state.params, state.optimizer, state.held)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    counts = (spec.num_parameters, spec.num_trained_parameters)
    return Memory(*counts, *map(bytes_per_device, parts), _bytes_a_weight(spec, state.frozen), temporary)


def _bytes_a_weight(spec, frozen) -> float:
    """Of the matrices of the frozen layers."""
    if not frozen:
        return 0.0
    layers = {name: frozen["layers"][name] for name in ("attention", "mlp")}
    weights = sum(leaf.size for path, leaf in _leaves(spec.shapes["layers"]) if path.endswith("kernel"))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers)) / weights


def _leaves(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def main() -> None:
    print("| trained | compute | weights, GB | optimizer, GB | frozen, GB | a step besides, GB | peak, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for compute in ("bfloat16", "float32"):
        for name, adapter in KINDS.items():
            memory = measure(adapter, compute)
            sizes = (memory.trained, memory.optimizer, memory.frozen, memory.temporary, memory.peak)
            row = " | ".join(f"{size / 1e9:.3f}" for size in sizes)
            print(f"| {name}: {memory.num_trained:,} parameters | {compute} | {row} |", flush=True)
            if memory.matrices:
                told = f"{name}, {compute}: {memory.matrices:.4f} bytes a weight of the frozen layers' matrices"
                print(told, file=sys.stderr)


if __name__ == "__main__":
    main()
