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
        ([], SLURM | {"SLURM_NTASKS": "4"}, {}),
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


def test_local_processes_get_their_numbers_and_the_first_failure_is_the_exit_code(tmp_path):
    stand_in(
        tmp_path / "bin",
        "jaxllm",
        f'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $*" > {tmp_path}/$JAX_PROCESS_ID; exit $((JAX_PROCESS_ID * 2))',
    )
    environment = os.environ | {"JAXLLM": str(tmp_path / "bin" / "jaxllm")}
    done = subprocess.run([LAUNCH / "local" / "processes.sh", "2", "train", "--seed=3"], env=environment, check=False)
    assert done.returncode == 2
    assert (tmp_path / "0").read_text() == "0 of 2: train --seed=3\n"
    assert (tmp_path / "1").read_text() == "1 of 2: train --seed=3\n"


def test_local_processes_are_told_to_stop_and_waited_for(tmp_path):
    saving = f"trap 'sleep 0.3; touch {tmp_path}/saved.$JAX_PROCESS_ID; exit 75' TERM"
    stand_in(
        tmp_path / "bin", "jaxllm", f"{saving}; touch {tmp_path}/ready.$JAX_PROCESS_ID; while true; do sleep 0.05; done"
    )
    environment = os.environ | {"JAXLLM": str(tmp_path / "bin" / "jaxllm")}
    job = subprocess.Popen([LAUNCH / "local" / "processes.sh", "2", "train"], env=environment)
    while not all((tmp_path / f"ready.{i}").exists() for i in range(2)):
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    assert all((tmp_path / f"saved.{i}").exists() for i in range(2))
