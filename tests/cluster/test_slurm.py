"""launch/slurm/train.sbatch under a real SLURM on this machine: two nodes, preempted by a requeue.

The packages are slurm-wlm and munge (Debian); without them, or without the right to start them, this is skipped.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import processes
from tests.train import tiny_run
from tests.train.kill_campaign import last_hashes, records

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "munged")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
KillWait=10
MinJobAge=300
SchedulerParameters=requeue_setup_env_fail
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs={cpus} RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _missing() -> str:
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "SLURM's daemons are started as root"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A controller and two nodes; the environment in which its commands find them."""
    if reason := _missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, cpus=os.cpu_count()))
    hosts = Path("/etc/hosts").read_text()
    if "n0 n1" not in hosts:
        try:
            Path("/etc/hosts").write_text(f"{hosts.rstrip()}\n127.0.0.1 n0 n1\n")
        except OSError as error:
            pytest.skip(f"/etc/hosts cannot be written: {error}")
    environment = os.environ | {"SLURM_CONF": str(conf)}
    daemons = []
    Path("/run/munge").mkdir(exist_ok=True)
    subprocess.run(["chown", "munge:munge", "/run/munge"], check=False)
    started = subprocess.run(["su", "munge", "-s", "/bin/sh", "-c", "munged"], capture_output=True, text=True)
    if (
        started.returncode
        and "in use" not in started.stderr + started.stdout
        and not Path("/run/munge/munge.socket.2").exists()
    ):
        pytest.skip(f"munged does not start: {started.stderr.strip()}")
    for command in (["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n0"], ["slurmd", "-D", "-N", "n1"]):
        log = (folder / f"{command[0]}{command[-1]}.out").open("w")
        daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        _wait_for_nodes(environment, folder)
        yield environment
    finally:
        for daemon in daemons[::-1]:
            daemon.terminate()
            daemon.wait(timeout=30)


def _wait_for_nodes(environment: dict[str, str], folder: Path) -> None:
    for _ in range(120):
        found = subprocess.run(["sinfo", "-h", "-o", "%D %t"], env=environment, capture_output=True, text=True).stdout
        if found.strip() == "2 idle":
            return
        time.sleep(0.5)
    pytest.skip(f"SLURM's nodes do not come up: {found} {(folder / 'slurmctld.log').read_text()[-500:]}")


def scontrol(environment: dict[str, str], *arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], env=environment, capture_output=True, text=True).stdout


def state_of(environment: dict[str, str], job: str) -> str:
    shown = scontrol(environment, "show", "job", job)
    return next((part.partition("=")[2] for part in shown.split() if part.startswith("JobState=")), "GONE")


def test_two_nodes_are_requeued_and_end_as_if_they_had_not_been(slurm, tmp_path):
    tiny_run.write_text(tmp_path / "text.txt")
    config = processes.write_config(tmp_path, tmp_path / "text.txt")
    processes.train(tmp_path / "clean", config, "mesh.data=2", processes=1, devices=2)
    jaxllm, workdir, log = tmp_path / "jaxllm", tmp_path / "run", tmp_path / "job.log"
    jaxllm.write_text(f'#!/bin/sh\nexec {sys.executable} -m jaxllm "$@"\n')
    jaxllm.chmod(0o755)
    environment = slurm | processes.environment(tmp_path / "compiled") | {"JAXLLM": str(jaxllm)}
    environment["SLURM_CONF"] = slurm["SLURM_CONF"]
    of_this_machine = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}", f"--chdir={ROOT}"]
    command = ["sbatch", "--parsable", *of_this_machine, ROOT / "launch" / "slurm" / "train.sbatch"]
    command += [f"--config={config}", f"--workdir={workdir}", "--config.mesh.data=2"]
    submitted = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    job, end = submitted.stdout.strip(), time.monotonic() + 400
    while "step 5/24" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < end and state_of(slurm, job) in ("PENDING", "RUNNING", "CONFIGURING"), _told(log)
        time.sleep(0.1)
    scontrol(slurm, "requeue", job)
    while state_of(slurm, job) != "COMPLETED":
        assert time.monotonic() < end and state_of(slurm, job) not in ("FAILED", "GONE", "CANCELLED"), _told(log)
        scontrol(slurm, "update", f"JobId={job}", "StartTime=now")  # SLURM holds a requeued job back for two minutes
        time.sleep(0.5)
    assert "resumed at step" in log.read_text()
    clean, requeued = records(tmp_path / "clean"), records(workdir)
    assert [r["step"] for r in requeued] == [r["step"] for r in clean]
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in requeued] == pytest.approx([r[name] for r in clean], rel=1e-5)
    assert last_hashes(workdir)[0]


def _told(log: Path) -> str:
    return log.read_text()[-3000:] if log.exists() else "no output"
