"""Small models trained for a few steps under any layout: what the layout tests compare."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.data.batch import Batch, Vocabulary, row_random
from jaxllm.data.config import DataConfig
from jaxllm.layout.at_rest import fitted
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import Layout, make_layout
from jaxllm.layout.mesh import one_at_a_time
from jaxllm.model.adapter_config import NO_ADAPTER, AdapterConfig
from jaxllm.model.config import ModelConfig
from jaxllm.model.lora_trees import started
from jaxllm.model.spec import ModelSpec, model_spec
from jaxllm.steps import STEPS
from jaxllm.train.config import Config, OptimizerConfig, PrecisionConfig
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.state import FIRST_LOSS_SCALE, abstract_state, state_of
from jaxllm.train.train_step import make_train_step

LLAMA = ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    mlp_dim=64,
    vocab_size=40,
    max_length=16,
    positions="rope",
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    use_bias=False,
    tied_head=False,
    dropout=0.1,
    attention_dropout=0.1,
    z_loss=1e-3,
).resolved()
# A vocabulary that no `model` divides, and everything else that Llama does not have.
GPT2 = ModelConfig(
    num_layers=2, embed_dim=32, num_heads=8, mlp_dim=64, vocab_size=37, max_length=16, dropout=0.1
).resolved()
# Four experts, two of them for each token, and every loss that a router has.
MOE = dataclasses.replace(
    LLAMA, num_experts=4, experts_per_token=2, mlp_dim=32, router_balance_loss=0.02, router_z_loss=1e-3
)
# Adam divides by sqrt(v) + epsilon: an epsilon below what rounding leaves of a gradient that is nothing (1e-8) makes an
# update of it as large as any other. This one is above that, and below the gradients (1e-3).
LEARNING_RATE = 1e-2
FLOAT32 = Config(
    precision=PrecisionConfig(compute="float32"),
    optimizer=OptimizerConfig(warmup_steps=2, learning_rate=LEARNING_RATE, epsilon=1e-4),
)
BATCH, LENGTH, STEPS_TAKEN = 32, 16, 5


class Shape(NamedTuple):
    """A layout, as a test names it."""

    replica: int
    data: int
    model: int
    zero_stage: int = 1
    sequence_parallel: bool = False
    num_microbatches: int = 1
    context: int = 1

    def __str__(self) -> str:
        parallel = "-sp" if self.sequence_parallel else ""
        mesh = f"r{self.replica}d{self.data}m{self.model}" + (f"c{self.context}" if self.context > 1 else "")
        return f"{mesh}-zero{self.zero_stage}{parallel}-mb{self.num_microbatches}"

    def layout(self, **fields) -> Layout:
        devices = jax.devices()[: self.replica * self.data * self.context * self.model]
        mesh = MeshConfig(replica=self.replica, data=self.data, context=self.context, model=self.model)
        config = LayoutConfig(
            zero_stage=self.zero_stage,
            sequence_parallel=self.sequence_parallel,
            num_microbatches=self.num_microbatches,
            **fields,
        )
        return make_layout(mesh, config, devices=devices)


def all_shapes(devices: int = 8, microbatches: tuple[int, ...] = (1, 4)) -> list[Shape]:
    """Every (replica, data, model) factorisation x ZeRO 0 to 3 x sequence parallelism x microbatches."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    meshes = [mesh for mesh in itertools.product(sizes, repeat=3) if np.prod(mesh) == devices]
    return [Shape(*mesh, *rest) for mesh in meshes for rest in itertools.product(range(4), (False, True), microbatches)]


def canonical(shape: Shape) -> Shape:
    """The first of the shapes that make the same program: what an axis of size 1 would split does not matter."""
    return shape._replace(
        zero_stage=shape.zero_stage if shape.data > 1 else 0,
        sequence_parallel=shape.sequence_parallel and shape.model > 1,
    )


@functools.cache
def parts(model: ModelConfig, adapter: AdapterConfig = NO_ADAPTER):
    """Spec, optimizer, schedule and the first state on the host, made once a model. An adapter is on a random model."""
    spec = model_spec(model, adapter)
    optimizer = make_optimizer(FLOAT32.optimizer, 1000, spec.trained_axes)
    make = lambda: state_of(started(spec, spec.base(spec.init(0)), 1), spec, optimizer, "float32")  # noqa: E731
    first = jax.device_get(jax.jit(make)())
    return spec, optimizer, make_schedule(FLOAT32.optimizer, 1000), first


def packed_batch(spec: ModelSpec, number: int) -> Batch:
    """Two documents a row and padding, loss masks of very uneven weight from row to row; on the host."""
    random = np.random.default_rng(number)
    tokens = random.integers(0, spec.config.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    first = random.integers(2, LENGTH - 4, (BATCH, 1))
    column = np.arange(LENGTH)[None]
    segments = np.where(column < first, 1, np.where(column < LENGTH - 2, 2, 0)).astype(np.int32)
    positions = np.where(column < first, column, column - first).astype(np.int32)
    counted = random.random((BATCH, LENGTH)) < random.random((BATCH, 1)) ** 2
    counted &= (positions > max(0, spec.adapter.places - 1)) & (segments > 0)
    return Batch(tokens, positions, segments, counted)


def make_batch(spec: ModelSpec, number: int, layout: Layout, step: str = "pretrain") -> Any:
    """The rows of `packed_batch` as a step takes them, on the devices."""
    rows, vocabulary = packed_batch(spec, number), Vocabulary(spec.config.vocab_size, mask_id=4)
    make_row, config = STEPS[step].batch.make_row, DataConfig(mask_fraction=0.5)
    packed = map(Batch._make, zip(*rows, strict=True))
    made = [make_row(row, row_random(number, i), vocabulary, config) for i, row in enumerate(packed)]
    return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *made), layout.sharding("batch", None))


def lowered(model: ModelConfig, layout: Layout, config: Config = FLOAT32):
    """The train step, lowered for abstract arguments."""
    spec, optimizer, schedule, _ = parts(model)
    state = abstract_state(spec, optimizer, layout)
    place = NamedSharding(layout.mesh, layout.spec(("batch", None)))
    int32, boolean = (jax.ShapeDtypeStruct((BATCH, LENGTH), dtype, sharding=place) for dtype in (np.int32, bool))
    step = make_train_step(STEPS["pretrain"], spec, optimizer, schedule, config, layout)
    return step.trace(state, Batch(int32, int32, int32, boolean)).lower()


class Trained(NamedTuple):
    """What a few steps lead to."""

    numbers: np.ndarray  # loss and gradient norm of each step, [steps, 2]
    params: dict  # the last parameters, on the host


def run(model: ModelConfig, layout: Layout, steps: int = STEPS_TAKEN, compute: str = "float32") -> np.ndarray:
    """Loss and gradient norm of each step, [steps, 2]."""
    return train(model, layout, steps, compute).numbers


def train(
    model: ModelConfig,
    layout: Layout,
    steps: int,
    compute: str = "float32",
    step: str = "pretrain",
    adapter: AdapterConfig = NO_ADAPTER,
) -> Trained:
    """Trains for a few steps, each on its own batch."""
    spec, optimizer, schedule, first = parts(model, adapter)
    config = dataclasses.replace(FLOAT32, precision=PrecisionConfig(compute=compute, gradients=layout.reduce_dtype))
    if compute == "float16":
        first = first._replace(loss_scale=np.float32(FIRST_LOSS_SCALE))
    abstract = abstract_state(spec, optimizer, layout, compute)
    state = jax.device_put(fitted(first, abstract), jax.tree.map(lambda leaf: leaf.sharding, abstract))
    train_step = one_at_a_time(make_train_step(STEPS[step], spec, optimizer, schedule, config, layout))
    seen = []
    for number in range(steps):
        state, metrics = train_step(state, make_batch(spec, number, layout, step))
        seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return Trained(np.array(seen), fitted(jax.device_get(state.params), first.params))


@functools.cache
def reference(model: ModelConfig, compute: str = "float32") -> np.ndarray:
    """The same on one device."""
    return run(model, Shape(1, 1, 1, zero_stage=0).layout(), compute=compute)
