"""A plan in figures: memory, FLOPs, seconds, tokens and GPU-hours of a training run under a layout."""

import dataclasses
from typing import Any, NamedTuple

from jaxllm.model.spec import model_spec
from jaxllm.plan.clusters import Cluster
from jaxllm.plan.job import Job, make_job
from jaxllm.plan.memory import Memory, memory
from jaxllm.plan.time import StepTime, step_time
from jaxllm.plan.work import end_work, layer_work
from jaxllm.train.config import Config
from jaxllm.train.flops import flops_per_token

TOKENS_A_PARAMETER = 20  # compute-optimal: Hoffmann et al. 2022


class Estimate(NamedTuple):
    """What a run is expected to need."""

    parameters: int
    active_parameters: int
    memory: Memory
    usable_bytes: float
    time: StepTime
    tokens_a_step: int
    model_flops: float  # of a token, as MFU counts them (train/flops.py)
    device_flops: float  # of a step and device, as computed: recomputation included, of attention what is not masked
    mfu: float
    bubble: float  # part of the step
    tokens: float  # of the run
    days: float
    gpu_hours: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_a_step / self.time.total

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = self._asdict()
        values["memory"] = {**self.memory._asdict(), "total": self.memory.total}
        values["time"] = {**self.time._asdict(), "total": self.time.total}
        return values | {"tokens_per_second": self.tokens_per_second}


def estimate(config: Config, cluster: Cluster, num_gpus: int, tokens: float = 0) -> Estimate:
    """Of a config whose vocabulary is known.

    Args:
      tokens: of the run; 0: TOKENS_A_PARAMETER for each active parameter.

    Raises:
      UserError: a mesh that does not fit the GPUs, or a card that cannot compute in the precision.
    """
    return estimate_job(make_job(config, cluster, num_gpus), model_size(config), tokens)


class ModelSize(NamedTuple):
    """What no layout changes."""

    parameters: int
    active_parameters: int
    flops: float  # of a token


def model_size(config: Config) -> ModelSize:
    """Of a config whose vocabulary is known."""
    spec = model_spec(dataclasses.replace(config.model.resolved(), scalar_head=False), config.adapter)
    length = config.data.length or spec.config.max_length
    return ModelSize(spec.num_parameters, spec.num_active_parameters, flops_per_token(spec, length))


def estimate_job(job: Job, size: ModelSize, tokens: float = 0) -> Estimate:
    """The same of a job."""
    seconds = step_time(job)
    a_step = job.batch_size * job.length
    peak = job.cluster.gpu.peak_flops(job.compute)
    tokens = tokens or TOKENS_A_PARAMETER * size.active_parameters
    in_all = tokens / a_step * seconds.total
    return Estimate(
        parameters=size.parameters,
        active_parameters=size.active_parameters,
        memory=memory(job),
        usable_bytes=job.cluster.usable_bytes,
        time=seconds,
        tokens_a_step=a_step,
        model_flops=size.flops,
        device_flops=device_flops(job),
        mfu=size.flops * a_step / (seconds.total * job.num_gpus * peak),
        bubble=seconds.bubble / seconds.total,
        tokens=tokens,
        days=in_all / 86_400,
        gpu_hours=in_all * job.num_gpus / 3_600,
    )


def device_flops(job: Job) -> float:
    """Of a step, on a device of the stage with most layers and the head."""
    work, ends = layer_work(job), end_work(job)
    products, attention, _ = job.recomputes
    stage = job.stage_recomputes
    gradients = 2 if job.trained == 1 else 1
    of_products = sum(p.flops for p in work.products) * (1 + gradients + products + stage)
    of_attention = work.attention.flops * (1 + 2.5 + attention + stage)
    head = sum(p.flops for p in ends.products) * (1 + gradients + job.practice.chunked_loss)
    a_microbatch = max(job.stage_layers) * (of_products + of_attention) + head
    return job.num_microbatches * job.models * a_microbatch
