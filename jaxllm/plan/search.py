"""Ranks the layouts of a model on a cluster: all legal ones counted, and those that fit put in order of their speed."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxllm.errors import UserError
from jaxllm.layout.config import MeshConfig
from jaxllm.layout.mesh import AXES
from jaxllm.plan.clusters import Cluster
from jaxllm.plan.estimate import Estimate, estimate_job, model_size
from jaxllm.plan.job import make_job
from jaxllm.plan.layouts import factorisations
from jaxllm.plan.memory import memory
from jaxllm.train.checks import check
from jaxllm.train.config import Config

SCHEDULES = ("1f1b", "1f1b_aligned", "interleaved", "zero_bubble")
MARGIN = 0.95  # of the usable memory, that a counted layout may fill: XLA may need more
ENOUGH = 40  # layouts that a search ranks


class Candidate(NamedTuple):
    config: Config
    estimate: Estimate


class Search(NamedTuple):
    counted: int  # layouts
    fitting: list[Candidate]  # of the legal ones, fastest first, at most ENOUGH
    smallest: Candidate | None  # where none fits, the one that needs least memory


def search(
    config: Config, cluster: Cluster, num_gpus: int, tell: Callable[[int, int], None] = lambda done, total: None
) -> Search:
    """Varies the mesh, ZeRO, schedule, microbatches, remat and sequence parallelism.

    Args:
      tell: called with how many layouts are judged and how many there are.
    """
    size = model_size(config)
    candidates = list(_candidates(config, cluster, num_gpus))
    counted, smallest = [], None
    for done, candidate in enumerate(candidates):
        if done % 50 == 0:
            tell(done, len(candidates))
        try:
            job = make_job(candidate, cluster, num_gpus)
        except UserError:
            continue
        needed = memory(job).total
        if needed <= MARGIN * cluster.usable_bytes:
            counted.append(Candidate(candidate, estimate_job(job, size)))
        elif not counted and (smallest is None or needed < smallest[0]):
            smallest = (needed, candidate, job)
    tell(len(candidates), len(candidates))
    # `check` is the dear part: the fastest are asked first, and no more of them than are wanted.
    fastest = sorted(counted, key=lambda c: c.estimate.time.total)
    fitting = list(itertools.islice((c for c in fastest if _is_legal(c.config, num_gpus)), ENOUGH))
    least = None if fitting or smallest is None else Candidate(smallest[1], estimate_job(smallest[2], size))
    return Search(len(candidates), fitting, least)


def _is_legal(config: Config, num_gpus: int) -> bool:
    try:
        check(config, num_gpus)
    except UserError:
        return False
    return True


def _candidates(config: Config, cluster: Cluster, num_gpus: int) -> Iterator[Config]:
    """Every combination worth a count: `model` and `context` inside a node, no replica, experts where there are any."""
    model, a_node = config.model.resolved(), cluster.gpus_per_node
    axes = ("pipeline", "data", "expert", "context", "model")
    for sizes in factorisations(num_gpus, len(axes)):
        mesh = dict(zip(axes, sizes, strict=True))
        if mesh["model"] > a_node or model.num_heads % mesh["model"] or mesh["context"] not in _contexts(config):
            continue
        if mesh["expert"] > 1 and (not model.num_experts or model.num_experts % mesh["expert"]):
            continue
        if mesh["pipeline"] > model.num_layers or config.data.batch_size % (mesh["data"] * mesh["expert"]):
            continue
        yield from _of_mesh(config, MeshConfig(**{**dict.fromkeys(AXES, 1), **mesh}))


def _contexts(config: Config) -> tuple[int, ...]:
    """Splits of the sequence: only long ones are worth it."""
    length = config.data.length or config.model.max_length
    return tuple(size for size in (1, 2, 4, 8, 16) if size == 1 or length >= 8192 * size)


def _of_mesh(config: Config, mesh: MeshConfig) -> Iterator[Config]:
    rows = config.data.batch_size // (mesh.data * mesh.expert)
    stages = mesh.pipeline
    layers = config.model.num_layers
    spread = "state=data+expert" if mesh.expert > 1 else config.layout.rule_overrides
    for microbatch in (1, 2, 4, 8, 16, 32):
        count = rows // microbatch
        if rows % microbatch or count < stages:
            continue
        for schedule, virtual in _schedules(stages, layers, count):
            for zero in (1, 2, 3) if mesh.data * mesh.expert > 1 else (0,):
                for remat in ("none", "selective", "full"):
                    for sequence in (True, False) if mesh.model > 1 else (False,):
                        fields = {
                            "zero_stage": zero,
                            "remat": remat,
                            "sequence_parallel": sequence,
                            "schedule": schedule,
                            "virtual_stages": virtual,
                            "num_microbatches": count,
                            "stage_layers": _stage_layers(layers, stages, virtual),
                            "rule_overrides": spread,
                        }
                        layout = dataclasses.replace(config.layout, **fields)
                        yield dataclasses.replace(config, mesh=mesh, layout=layout)


def _schedules(stages: int, layers: int, count: int) -> list[tuple[str, int]]:
    if stages == 1:
        return [("1f1b", 1)]
    found = [(name, 1) for name in SCHEDULES if name != "interleaved"]
    if count % stages == 0:
        found += [("interleaved", v) for v in (2, 4) if layers % (stages * v) == 0]
    return found


def _stage_layers(layers: int, stages: int, virtual: int) -> str:
    if layers % (stages * virtual) == 0:
        return ""
    if (layers + 2) % stages == 0 and stages > 1:
        return "light_ends"
    least, more = divmod(layers, stages)
    # The ends hold the tables beside their layers, so they are the last to get one more.
    fuller = [*range(1, stages - 1), 0, stages - 1][:more]
    return ",".join(str(least + (stage in fuller)) for stage in range(stages))
