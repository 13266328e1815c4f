"""Joins the processes of a run: from flags, from the environment, or as SLURM, Open MPI or Kubernetes say.

Where one process has a node to itself it sees all of the node's GPUs; where several share a node, they share its GPUs
out evenly. (JAX's own detection gives every task of SLURM one GPU, also the only task of a node of eight.)
"""

import argparse
import os
import re
from collections.abc import Mapping
from typing import Any

from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError

_ENVIRONMENT = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
COMPLETION_INDEX = "JOB_COMPLETION_INDEX"  # which Kubernetes gives the pods of an indexed job
JOIN_SECONDS = (60, 300)  # at least and at most, for all processes to join
HEARTBEAT_SECONDS = 100  # a process that was silent for so long is taken for dead, and the others end
_PORTS = 2**12  # at the upper end of the range: by the job's number


def add_flags(parser: Parser) -> None:
    """The three flags of a run of several processes. Each may come from the environment instead."""
    group = parser.add_argument_group(
        "several processes (found by themselves under SLURM's srun and Open MPI's mpirun)"
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0; or $JAX_COORDINATOR_ADDRESS")
    group.add_argument("--num_processes", type=int, metavar="N", help="or $JAX_NUM_PROCESSES")
    group.add_argument("--process_id", type=int, metavar="I", help="or $JAX_PROCESS_ID, or $JOB_COMPLETION_INDEX")


def arguments(options: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`; None on one process.

    Raises:
      UserError: some of the three flags are given but not all, or they contradict one another.
    """
    given = _given(options, environment)
    if not given or given == {"num_processes": 1}:
        return _of_slurm(environment) or _of_open_mpi(environment)
    missing = [f"--{name} (or ${variable})" for name, variable in _ENVIRONMENT.items() if name not in given]
    if missing:
        raise UserError(f"a run of several processes needs {' and '.join(missing)} too.")
    if ":" not in str(given["coordinator_address"]):
        raise UserError(f"--coordinator_address={given['coordinator_address']} must be host:port, say node0:8476.")
    if not 0 <= given["process_id"] < given["num_processes"]:
        raise UserError(
            f"--process_id={given['process_id']} must be between 0 and num_processes - 1 = "
            f"{given['num_processes'] - 1}."
        )
    return given


def _given(options: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, variable in _ENVIRONMENT.items():
        value = getattr(options, name)
        value = environment.get(variable) or None if value is None else value
        if value is None:
            continue
        try:
            found[name] = value if name == "coordinator_address" else int(value)
        except ValueError:
            raise UserError(f"${variable}={value} must be a whole number.") from None
    if found and "process_id" not in found and environment.get(COMPLETION_INDEX):
        found["process_id"] = int(environment[COMPLETION_INDEX])
    return found


def _of_slurm(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """As srun tells its tasks. A shell of salloc has no step, and is no task."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environment for name in names) or int(environment["SLURM_NTASKS"]) < 2:
        return None
    job, nodes, tasks, process, local = (environment[name] for name in names)
    a_node = -(-int(tasks) // int(environment.get("SLURM_STEP_NUM_NODES", 1)))
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)  # of "n1,n7", "n[1,3-5]" or "n[001-015],m2"
    address = f"{first[1]}{first[2] or ''}:{_port(int(job))}"
    return _launched(address, int(tasks), int(process), int(local), a_node, environment)


def _of_open_mpi(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """As mpirun tells its processes; process 0 is where mpirun was called, as it is by default."""
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    if any(name not in environment for name in names) or int(environment[names[0]]) < 2:
        return None
    size, rank, local, a_node = (int(environment[name]) for name in names)
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")  # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    host = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    if host is None:
        raise UserError(
            "mpirun started this process, but does not say where process 0 is. "
            "Give --coordinator_address HOST:PORT, --num_processes and --process_id=$OMPI_COMM_WORLD_RANK."
        )
    job = int(uri.partition(".")[0]) // 2**12 if uri.partition(".")[0].isdecimal() else 0
    return _launched(f"{host[1] or host[2]}:{_port(job)}", size, rank, local, a_node, environment)


def _launched(
    address: str, processes: int, process: int, local: int, a_node: int, environment: Mapping[str, str]
) -> dict[str, Any]:
    found = {"coordinator_address": address, "num_processes": processes, "process_id": process}
    gpus = local_gpus(local, a_node, environment)
    return found | ({} if gpus is None else {"local_device_ids": gpus})


def local_gpus(local: int, processes_a_node: int, environment: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that it sees a process takes, by its number on the node: None for all of them."""
    if processes_a_node == 1:
        return None
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if len(visible) == 1:  # --gpus-per-task and the like: what it sees is its own
        return None
    share = max(len(visible) // processes_a_node, 1)
    return list(range(local * share, (local + 1) * share))


def _port(job: int) -> int:
    return job % _PORTS + 65536 - _PORTS


def initialize(options: argparse.Namespace, silent_seconds: float = HEARTBEAT_SECONDS) -> None:
    """Joins the processes, where the run has several.

    Args:
      silent_seconds: after which a process that sends no heartbeat, or never joins, is taken for dead.

    Raises:
      UserError: what the flags say cannot be.
    """
    keywords = arguments(options, os.environ)
    if keywords is None:
        return
    import jax

    jax.distributed.initialize(
        **keywords,
        initialization_timeout=int(min(max(silent_seconds, JOIN_SECONDS[0]), JOIN_SECONDS[1])),
        cluster_detection_method="deactivate",  # what it would find is found above
        heartbeat_timeout_seconds=max(int(min(silent_seconds, HEARTBEAT_SECONDS)), 2),
        shutdown_timeout_seconds=60,
    )
