"""Clusters as data: GPUs, the nodes they are in, and what the network between nodes carries (clusters.toml)."""

import dataclasses
import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError, did_you_mean
from jaxllm.layout.config import ClusterConfig, MeshConfig

GIGA, TERA = 1e9, 1e12
NEEDED = ("gpu", "gpus_per_node", "network_bandwidth")
# Of the memory of a card, what the CUDA context, NCCL's buffers and the libraries' workspaces take: not the program's.
RESERVED_BYTES = 2.5e9


@dataclass(frozen=True)
class Gpu:
    """One kind of card. Bandwidths in GB/s, of one GPU, in one direction."""

    name: str  # as the driver names it
    compute_capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float  # to the others of its node
    tflops: Mapping[str, float]  # dense, by dtype of compute
    matmul_efficiency: float  # of the peak, that large matrix products sustain
    shared_memory: int  # bytes a multiprocessor
    l2_bytes: int
    clock_ghz: float

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s in this dtype.

        Raises:
          UserError: a card that cannot compute in it.
        """
        if dtype not in self.tflops:
            raise UserError(f"config.precision.compute={dtype}: {self.name} has {', '.join(self.tflops)}.")
        return self.tflops[dtype] * TERA


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind of GPU."""

    name: str
    gpu: Gpu
    gpus_per_node: int
    network_bandwidth: float  # GB/s of one GPU to other nodes, in one direction

    @property
    def usable_bytes(self) -> float:
        """Memory of a GPU that a program may fill."""
        return self.gpu.memory_bytes - RESERVED_BYTES

    def check_gpus(self, num_gpus: int) -> None:
        """Raises: UserError: not whole nodes."""
        a_node = self.gpus_per_node
        if num_gpus < 1 or (num_gpus > a_node and num_gpus % a_node):
            below = max(num_gpus // a_node, 1) * a_node
            raise UserError(
                f"--gpus={num_gpus} is not a multiple of the {a_node} of a node of {self.name}. "
                f"Nearest: {below} or {below + a_node}."
            )


def load_cluster(name: str) -> Cluster:
    """A cluster of the table by its name, or the one that a TOML file describes.

    Raises:
      UserError: an unknown name, or a file that is none.
    """
    if name.endswith(".toml"):
        return _from_file(Path(name))
    tables = _known()
    if name not in tables["cluster"]:
        raise UserError(
            f"--cluster={name}: not a cluster. {did_you_mean(name, tables['cluster'])} "
            "One of your own: --cluster=FILE.toml, see jaxllm/plan/clusters.toml."
        )
    return _cluster(name, tables, "clusters.toml")


def chosen_cluster(
    config: ClusterConfig, mesh: MeshConfig, name: str = "", num_gpus: int | None = None
) -> tuple[Cluster, int]:
    """The cluster that flags or else a config name, with what the config changes of it; and the number of GPUs.

    Raises:
      UserError: an unknown cluster, or GPUs that are no whole nodes.
    """
    least = math.prod(max(size, 1) for size in dataclasses.asdict(mesh).values())
    count = (config.gpus or least) if num_gpus is None else num_gpus
    cluster = load_cluster(name or config.name)
    if not name or name == config.name:
        changed = {"gpus_per_node": config.gpus_per_node, "network_bandwidth": config.network_bandwidth}
        cluster = dataclasses.replace(cluster, **{field: value for field, value in changed.items() if value})
        if config.gpu:
            cluster = dataclasses.replace(cluster, gpu=Gpu(**_gpu(config.gpu, _known(), "config.cluster.gpu")))
    cluster.check_gpus(count)
    return cluster, count


def cluster_names() -> list[str]:
    """The clusters of the table."""
    return list(_known()["cluster"])


@functools.cache
def _known() -> Mapping[str, Any]:
    return tomllib.loads((resources.files("jaxllm.plan") / "clusters.toml").read_text())


def _from_file(path: Path) -> Cluster:
    try:
        written = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--cluster={path}: {error}.") from None
    names = list(written.get("cluster", {}))
    if len(names) != 1:
        raise UserError(f"--cluster={path} must have one table [cluster.NAME], this one has {len(names)}.")
    tables = {kind: {**_known()[kind], **written.get(kind, {})} for kind in ("gpu", "cluster")}
    own = written["cluster"][names[0]]
    if own.get("like") == names[0]:
        tables["cluster"] = {**tables["cluster"], names[0]: {**_known()["cluster"].get(names[0], {}), **own}}
    return _cluster(names[0], tables, str(path))


def _cluster(name: str, tables: Mapping[str, Any], source: str) -> Cluster:
    row = _inherited(name, tables["cluster"], "cluster", source)
    missing = [field for field in NEEDED if field not in row]
    if missing:
        raise UserError(f"{source}: [cluster.{name}] has no {missing[0]}.")
    gpu = Gpu(**_gpu(row["gpu"], tables, source))
    return Cluster(name, gpu, row["gpus_per_node"], row["network_bandwidth"])


def _gpu(name: str, tables: Mapping[str, Any], source: str) -> dict[str, Any]:
    gpu = _inherited(name, tables["gpu"], "gpu", source)
    fields = {f.name for f in dataclasses.fields(Gpu)}
    wrong = sorted(fields ^ set(gpu))
    if wrong:
        what = "has no" if wrong[0] in fields else "may have no"
        raise UserError(f"{source}: [gpu.{name}] {what} {wrong[0]}.")
    return gpu | {"compute_capability": tuple(gpu["compute_capability"])}


def _inherited(name: str, table: Mapping[str, Any], kind: str, source: str) -> dict[str, Any]:
    if name not in table:
        raise UserError(f"{source}: no [{kind}.{name}]. {did_you_mean(name, table)}")
    row = dict(table[name])
    base = row.pop("like", name)
    return row if base == name else {**_inherited(base, table, kind, source), **row}
