"""Joins the processes of a run: from flags, from the environment, or by SLURM; on one process it does nothing."""

import argparse
import os
from collections.abc import Mapping

from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_ENVIRONMENT = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def add_flags(parser: Parser) -> None:
    """The three flags of a run of several processes. Each may come from the environment instead."""
    group = parser.add_argument_group("several processes (under SLURM's srun they are found by themselves)")
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0; or $JAX_COORDINATOR_ADDRESS")
    group.add_argument("--num_processes", type=int, metavar="N", help="or $JAX_NUM_PROCESSES")
    group.add_argument("--process_id", type=int, metavar="I", help="or $JAX_PROCESS_ID")


def arguments(options: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, str | int] | None:
    """The arguments of `jax.distributed.initialize`: None on one process, {} where SLURM tells them.

    Raises:
      UserError: some of the three are given but not all, or they contradict one another.
    """
    given: dict[str, str | int] = {}
    for name, variable in _ENVIRONMENT.items():
        value = getattr(options, name)
        value = environment.get(variable) or None if value is None else value
        if value is None:
            continue
        try:
            given[name] = value if name == "coordinator_address" else int(value)
        except ValueError:
            raise UserError(f"${variable}={value} must be a whole number.") from None
    if not given or given == {"num_processes": 1}:
        under_srun = all(name in environment for name in _SLURM) and int(environment["SLURM_NTASKS"]) > 1
        return {} if under_srun else None
    missing = [f"--{name} (or ${variable})" for name, variable in _ENVIRONMENT.items() if name not in given]
    if missing:
        raise UserError(f"a run of several processes needs {' and '.join(missing)} too.")
    if ":" not in str(given["coordinator_address"]):
        raise UserError(f"--coordinator_address={given['coordinator_address']} must be host:port, say node0:8476.")
    if not 0 <= int(given["process_id"]) < int(given["num_processes"]):
        raise UserError(
            f"--process_id={given['process_id']} must be between 0 and num_processes - 1 = "
            f"{int(given['num_processes']) - 1}."
        )
    return given


def initialize(options: argparse.Namespace) -> None:
    """Calls `jax.distributed.initialize` where the run has several processes."""
    keywords = arguments(options, os.environ)
    if keywords is not None:
        import jax

        jax.distributed.initialize(**keywords)
