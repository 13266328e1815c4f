"""What is estimated: one training step of a model under a layout on a cluster, in plain numbers."""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

from jaxllm.layout.config import LayoutConfig
from jaxllm.layout.mesh import mesh_shape
from jaxllm.layout.stages import make_stages
from jaxllm.model.attention_backends import choose_backend
from jaxllm.model.attention_pattern import pattern_of
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import model_spec
from jaxllm.plan.clusters import Cluster
from jaxllm.plan.practice import JAXLLM, Practice
from jaxllm.steps import STEPS
from jaxllm.train.config import Config

NF4_BYTES = 0.53  # a weight of four bits with its scales (layout/nf4.py)
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class _Fields(NamedTuple):
    model: ModelConfig  # resolved
    mesh: Mapping[str, int]
    layout: LayoutConfig
    cluster: Cluster
    batch_size: int  # sequences a step, of all devices
    length: int
    compute: str = "bfloat16"
    practice: Practice = JAXLLM
    trained: float = 1.0  # part of the parameters that have gradients and optimizer state
    forwards: int = 0  # forward passes besides: of a reference, of a critic
    models: float = 1.0  # models trained: 2 with a critic


class Job(_Fields):
    """A step to estimate."""

    @property
    def num_gpus(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def stages(self) -> int:
        return self.mesh["pipeline"]

    @property
    def tensor(self) -> int:
        return self.mesh["model"]

    @property
    def batch_shards(self) -> int:
        """Devices that the rows of a batch are dealt to."""
        return self.mesh["replica"] * self.mesh["data"] * self.mesh["expert"]

    @property
    def num_microbatches(self) -> int:
        return self.layout.num_microbatches

    @property
    def rows(self) -> float:
        """Sequences of a microbatch on one device."""
        return self.batch_size / self.num_microbatches / self.batch_shards

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch on one device: its part of the sequence, where `context` splits it."""
        return self.rows * self.length / self.mesh["context"]

    @property
    def itemsize(self) -> int:
        return BYTES[self.compute]

    @property
    def recomputes(self) -> tuple[float, float, float]:
        """Parts of a layer's matrix products, attention and the rest that the backward pass computes again."""
        return dict(self.practice.recomputes)[self.layout.remat]

    @property
    def stage_recomputes(self) -> bool:
        """Whether it computes a stage's layers once more besides."""
        return self.stages > 1 and self.practice.stage_recomputes

    @cached_property
    def stage_layers(self) -> tuple[int, ...]:
        """Layers of each stage, those of all its virtual stages together."""
        counts = make_stages(
            self.model.num_layers, self.stages, self.layout.virtual_stages, self.layout.stage_layers
        ).counts
        return tuple(sum(counts[stage :: self.stages]) for stage in range(self.stages))

    def spread(self, axis: str) -> int:
        """How far apart in the order of the devices neighbours along a mesh axis are."""
        names = list(self.mesh)
        return math.prod(self.mesh[name] for name in names[names.index(axis) + 1 :])

    def in_node(self, axis: str, size: int | None = None) -> int:
        """How many of a group along a mesh axis are in one node."""
        size = self.mesh[axis] if size is None else size
        return min(size, max(1, self.cluster.gpus_per_node // self.spread(axis)))

    def crosses_nodes(self, axis: str) -> bool:
        """Whether a group along this mesh axis spans nodes."""
        return self.mesh[axis] > self.in_node(axis)


def make_job(config: Config, cluster: Cluster, num_gpus: int, practice: Practice = JAXLLM) -> Job:
    """The step of a config whose vocabulary is known.

    Raises:
      UserError: a mesh that does not fit the GPUs.
    """
    model = config.model.resolved()
    step = STEPS[config.train_step]
    spec = model_spec(model, config.adapter)
    refers = bool(step.options) and step.refers(getattr(config, step.options))
    return Job(
        model=model,
        mesh=mesh_shape(config.mesh, num_gpus),
        layout=config.layout,
        cluster=cluster,
        batch_size=config.data.batch_size,
        length=config.data.length or model.max_length,
        compute=config.precision.compute,
        practice=_of_run(practice, config, cluster),
        trained=spec.num_trained_parameters / spec.num_parameters,
        forwards=int(refers),
        models=2.0 if step.critic is not None else 1.0,
    )


def _of_run(practice: Practice, config: Config, cluster: Cluster) -> Practice:
    """With the precision of the run, and the attention that it has on such a card."""
    size = BYTES[config.precision.gradients]
    platform = "gpu" if cluster.gpu.compute_capability >= (9, 0) else "gpu before Hopper"
    attention = choose_backend(
        config.layout.attention,
        platform,
        compute=config.precision.compute,
        dropout=config.model.attention_dropout,
        context=config.mesh.context,
        pattern=pattern_of(config.model.resolved()),
    )
    gathered = BYTES[config.precision.compute]
    weight = NF4_BYTES if config.adapter.base_weights == "nf4" else gathered
    return dataclasses.replace(
        practice,
        gradient_bytes=size,
        gradient_traffic=size,
        weight_bytes=weight,
        gather_traffic=gathered,
        flash=attention == "cudnn",
    )
