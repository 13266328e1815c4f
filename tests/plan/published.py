"""Runs whose speed or memory was published, as jobs for the planner (tests/plan/published.toml)."""

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.mesh import AXES, mesh_shape
from jaxllm.model.config import ModelConfig
from jaxllm.plan.clusters import load_cluster
from jaxllm.plan.job import Job
from jaxllm.plan.practice import PRACTICES


class Run(NamedTuple):
    name: str
    job: Job
    measured: dict[str, Any]
    is_fitted: bool
    is_validation: bool

    @property
    def seconds(self) -> float | None:
        """Of a step, as measured or as its TFLOP/s say."""
        job, measured = self.job, self.measured
        if "tokens_per_second_per_gpu" in measured:
            return job.batch_size * job.length / job.num_gpus / measured["tokens_per_second_per_gpu"]
        if "tflops" in measured:
            return narayanan_flops(job, measured["kind"]) / job.num_gpus / measured["tflops"] / 1e12
        return measured.get("seconds")


def narayanan_flops(job: Job, kind: str) -> float:
    """FLOPs of a step as Narayanan et al. 2021 count them (equation 3); `hardware` with full recomputation."""
    model, length = job.model, job.length
    times, head = (96, 16) if kind == "hardware" else (72, 12)
    tokens = job.batch_size * length
    parts = 1 + length / (6 * model.embed_dim) + model.vocab_size / (head * model.num_layers * model.embed_dim)
    return times * tokens * model.num_layers * model.embed_dim**2 * parts


def published_runs() -> list[Run]:
    rows = tomllib.loads((Path(__file__).parent / "published.toml").read_text())["run"]
    return [_run(row) for row in rows]


def _run(row: dict[str, Any]) -> Run:
    given = dict(row["layout"])
    mesh = MeshConfig(**{"data": 1} | {axis: given.pop(axis) for axis in AXES if axis in given})
    sizes = mesh_shape(mesh, row["gpus"])
    batch_size, microbatch = given.pop("batch_size"), given.pop("microbatch")
    microbatches = batch_size // (microbatch * sizes["data"] * sizes["replica"])
    job = Job(
        model=ModelConfig(**row["model"]).resolved(),
        mesh=sizes,
        layout=LayoutConfig(num_microbatches=microbatches, **given),
        cluster=load_cluster(row["cluster"]),
        batch_size=batch_size,
        length=row["model"]["max_length"],
        practice=PRACTICES[row["practice"]],
    )
    return Run(row["name"], job, row["measured"], row.get("fit", False), row.get("validation", False))
