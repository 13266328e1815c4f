"""How long a deep model on a large mesh takes to trace and compile, without the devices.

    python -m tests.benchmarks.compile_time

A 96-layer Llama on pipeline=8 x data=4 x model=8, 256 virtual CPU devices in one process; prints a line for each number
of microbatches and of layers. Nothing is run.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=256"

import resource
import time

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.data.batch import Batch
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.model.config import ModelConfig
from jaxllm.model.presets import llama3_8b
from jaxllm.model.spec import model_spec
from jaxllm.steps import STEPS
from jaxllm.train.config import Config
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.state import abstract_state
from jaxllm.train.train_step import make_train_step

LENGTH = 2048


def measure(num_layers: int, num_microbatches: int) -> None:
    """Lowers and compiles one step, and prints how long it took."""
    config = Config()
    sizes = {"num_layers": num_layers, "embed_dim": 8192, "num_heads": 64, "mlp_dim": 28672, "vocab_size": 32000}
    spec = model_spec(ModelConfig(**{**llama3_8b(), **sizes, "num_kv_heads": 8, "head_dim": 128}).resolved())
    mesh = MeshConfig(pipeline=8, data=4, model=8)
    layout = make_layout(mesh, LayoutConfig(num_microbatches=num_microbatches, remat="full"))
    optimizer = make_optimizer(config.optimizer, 1000, spec.axes)
    schedule = make_schedule(config.optimizer, 1000)
    state = abstract_state(spec, optimizer, layout)
    place = NamedSharding(layout.mesh, layout.spec(("batch", None)))
    shape = (num_microbatches * 4, LENGTH)
    integers, mask = (jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in (np.int32, bool))
    step = make_train_step(STEPS["pretrain"], spec, optimizer, schedule, config, layout)
    begin = time.perf_counter()
    lowered = step.trace(state, Batch(integers, integers, integers, mask)).lower()
    traced = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    done = time.perf_counter()
    print(
        f"{num_layers:4} layers, {num_microbatches:4} microbatches, {spec.num_parameters / 1e9:5.1f}B parameters: "
        f"traced in {traced - begin:5.1f} s, compiled in {done - traced:5.1f} s; "
        f"{len(lowered.as_text()) / 1e6:.2f} MB of StableHLO; {memory.temp_size_in_bytes / 1e9:.1f} GB temporary; "
        f"host {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB",
        flush=True,
    )


if __name__ == "__main__":
    for layers, microbatches in ((96, 64), (96, 128), (192, 64), (48, 64)):
        measure(layers, microbatches)
