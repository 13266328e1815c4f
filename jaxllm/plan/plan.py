"""A plan: an estimate of a run on a cluster, and the compiled step where there is one."""

import dataclasses
from typing import Any, NamedTuple

import jax

from jaxllm.layout.mesh import mesh_shape
from jaxllm.plan import gpu_free
from jaxllm.plan.clusters import Cluster
from jaxllm.plan.compiled import Compiled, compile_step
from jaxllm.plan.estimate import Estimate, estimate
from jaxllm.plan.job import Job, make_job
from jaxllm.plan.program import Program, make_program
from jaxllm.plan.traffic import axis_traffic, crosses_nodes
from jaxllm.train.checks import check
from jaxllm.train.config import Config

COUNTED, VIRTUAL, GPUS = "counted", "virtual", "gpus"  # what a step is compiled for; COUNTED: not at all


class Plan(NamedTuple):
    """What is known of a run before it is started."""

    config: Config
    cluster: Cluster
    num_gpus: int
    estimate: Estimate
    program: Program | None  # both None where nothing was compiled
    compiled: Compiled | None

    @property
    def job(self) -> Job:
        return make_job(self.config, self.cluster, self.num_gpus)

    @property
    def bytes(self) -> float:
        """Of a GPU: as XLA laid them out, else as counted."""
        return self.compiled.memory.total if self.compiled else self.estimate.memory.total

    @property
    def fits(self) -> bool:
        return self.bytes <= self.estimate.usable_bytes

    @property
    def head(self) -> str:
        """The run in a line."""
        config, found = self.config, self.estimate
        sizes = mesh_shape(config.mesh, self.num_gpus).items()
        mesh = " x ".join(f"{axis}={size}" for axis, size in sizes if size > 1)
        active = f" ({found.active_parameters / 1e9:,.2f} at work)" if config.model.num_experts else ""
        gpus = f"{self.num_gpus} GPU{'s' * (self.num_gpus > 1)} of {self.cluster.name}"
        return (
            f"{config.train_step}: {found.parameters / 1e9:,.2f} billion parameters{active} on {gpus}: "
            f"{mesh or 'one device'}, ZeRO {config.layout.zero_stage}, {found.tokens_a_step:,} tokens a step in "
            f"{config.layout.num_microbatches} microbatches"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        job, compiled = self.job, self.compiled
        answer = {
            "cluster": self.cluster.name,
            "gpus": self.num_gpus,
            "mesh": mesh_shape(self.config.mesh, self.num_gpus),
            "layout": dataclasses.asdict(self.config.layout),
            "fits": self.fits,
            "estimate": self.estimate.as_dict(),
            "traffic": [row._asdict() for row in axis_traffic(job, compiled and compiled.collectives)],
        }
        if compiled:
            answer["compiled"] = {
                "on": compiled.on,
                "seconds": compiled.seconds,
                "memory": compiled.memory._asdict(),
                "buffers": [buffer._asdict() for buffer in compiled.buffers],
                "collectives": [
                    {**row._asdict(), "crosses_nodes": crosses_nodes(row, job)} for row in compiled.collectives
                ],
            }
        return answer


def make_plan(config: Config, cluster: Cluster, num_gpus: int, on: str = COUNTED, tokens: float = 0) -> Plan:
    """Plans a run whose vocabulary is known.

    Args:
      on: GPUS, that need not be here; VIRTUAL CPU devices; COUNTED.
      tokens: of the run, as `estimate` takes it.

    Raises:
      UserError: a layout that is not legal for the model, or GPUs that cannot be compiled for here.
    """
    check(config, num_gpus)
    found = estimate(config, cluster, num_gpus, tokens)
    if on == COUNTED:
        return Plan(config, cluster, num_gpus, found, None, None)
    if on == VIRTUAL:
        program = make_program(config, jax.devices("cpu")[:num_gpus])
        compiled = compile_step(program, f"{num_gpus} virtual CPU devices")
    else:
        with gpu_free.as_if_here(cluster):
            program = make_program(config, gpu_free.gpus(cluster, num_gpus))
            compiled = compile_step(program, f"{num_gpus} x {cluster.gpu.name}")
    return Plan(config, cluster, num_gpus, found, program, compiled)
