"""The launch scripts, with stand-ins for the programs of a cluster."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from jaxllm.cli import distributed
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError

OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
LAUNCH = Path(__file__).parents[2] / "launch"
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


def arguments(argv: list[str], environment: dict[str, str]):
    parser = Parser("train", "")
    distributed.add_flags(parser)
    return distributed.arguments(parser.parse(argv), environment)


@pytest.mark.parametrize(
    ("argv", "environment", "expected"),
    [
        ([], {}, None),
        ([], {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # a shell of salloc is not a task of srun
        ([], SLURM | {"SLURM_NTASKS": "1"}, None),
        (
            [],
            SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
            {"coordinator_address": "n1:61447", "num_processes": 4, "process_id": 3, "local_device_ids": [4, 5, 6, 7]},
        ),
        (  # one task a node sees all of its GPUs
            [],
            SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu07,gpu[11-12]"},
            {"coordinator_address": "gpu07:61447", "num_processes": 2, "process_id": 3},
        ),
        (  # --gpus-per-task: it sees its own
            [],
            SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "0"},
            {"coordinator_address": "n1:61447", "num_processes": 4, "process_id": 3},
        ),
        (
            [],
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            {"coordinator_address": "10.96.0.1:62624", "num_processes": 4, "process_id": 1, "local_device_ids": [1]},
        ),
        (
            [],
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            {"coordinator_address": "10.96.0.1:62624", "num_processes": 4, "process_id": 1},
        ),
        (  # a pod of an indexed job
            [],
            {"JAX_COORDINATOR_ADDRESS": "n0:1", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"},
            {"coordinator_address": "n0:1", "num_processes": 2, "process_id": 1},
        ),
        (
            ["--coordinator_address=n0:1", "--num_processes=2", "--process_id=1"],
            {},
            {"coordinator_address": "n0:1", "num_processes": 2, "process_id": 1},
        ),
        (
            ["--process_id=0"],
            {"JAX_COORDINATOR_ADDRESS": "n0:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {"coordinator_address": "n0:1", "num_processes": 2, "process_id": 0},
        ),
        (["--num_processes=1"], {}, None),
    ],
)
def test_how_processes_are_found(argv, environment, expected):
    assert arguments(argv, environment) == expected


@pytest.mark.parametrize(
    ("argv", "environment", "says"),
    [
        (["--num_processes=2"], {}, "needs --coordinator_address (or $JAX_COORDINATOR_ADDRESS) and --process_id"),
        ([], {"JAX_COORDINATOR_ADDRESS": "n0:1"}, "--num_processes (or $JAX_NUM_PROCESSES)"),
        ([], {"JAX_NUM_PROCESSES": "two"}, "$JAX_NUM_PROCESSES=two must be a whole number"),
        (["--coordinator_address=n0", "--num_processes=2", "--process_id=0"], {}, "must be host:port"),
        (
            ["--coordinator_address=n0:1", "--num_processes=2", "--process_id=2"],
            {},
            "between 0 and num_processes - 1 = 1",
        ),
    ],
)
def test_processes_that_cannot_be_joined(argv, environment, says):
    with pytest.raises(UserError) as error:
        arguments(argv, environment)
    assert says in str(error.value)


def stand_in(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (2, False), (0, False)])
def test_slurm_passes_the_signal_on_waits_for_the_save_and_requeues_only_after_75(tmp_path, code, requeued):
    """The stand-in for srun saves for a while after SIGUSR1, as a run does, and exits with `code`."""
    tools = tmp_path / "bin"
    saving = f"trap 'sleep 0.3; echo saved > {tmp_path}/saved; exit {code}' USR1"
    stand_in(tools, "srun", f"{saving}; touch {tmp_path}/ready; while true; do sleep 0.05; done")
    stand_in(tools, "scontrol", f'echo "$@" > {tmp_path}/scontrol')
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", LAUNCH / "slurm" / "train.sbatch", "--config", "c.py"], env=environment)
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == code
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
