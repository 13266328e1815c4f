"""launch/local.py with stand-ins for jaxllm: numbers, exit codes, signals, restarts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "launch" / "local.py"


def launch(folder: Path, script: str, *flags: str) -> subprocess.Popen:
    """`script` runs in each process in place of jaxllm; $folder is its folder."""
    (folder / "jaxllm").write_text(f"#!/usr/bin/env bash\nfolder={folder}\n{script}\n")
    (folder / "jaxllm").chmod(0o755)
    command = [sys.executable, LOCAL, f"--jaxllm={folder / 'jaxllm'}", *flags, "--", "train", f"--workdir={folder}"]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True)


def test_processes_get_their_numbers_and_devices(tmp_path):
    script = 'echo "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $* $XLA_FLAGS" > $folder/$JAX_PROCESS_ID'
    run = launch(tmp_path, script, "--processes=3", "--devices=2")
    run.communicate()
    assert run.returncode == 0
    for number in range(3):
        told = (tmp_path / str(number)).read_text()
        assert told.startswith(f"{number}/3 train --workdir={tmp_path} ")
        assert told.strip().endswith("--xla_force_host_platform_device_count=2")


def test_a_mistake_is_not_tried_again_and_its_code_is_that_of_the_run(tmp_path):
    script = "echo x >> $folder/starts; [ $JAX_PROCESS_ID = 1 ] && exit 2; exec sleep 600"
    run = launch(tmp_path, script, "--grace=0.2")
    run.communicate(timeout=60)
    assert run.returncode == 2
    assert (tmp_path / "starts").read_text() == "x\n" * 2


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_hangs_is_killed_once_another_has_failed_and_all_are_started_again(tmp_path, failing):
    script = f"""
failing={failing}"""
    script += """
echo x >> $folder/starts.$JAX_PROCESS_ID
[ $(wc -l < $folder/starts.$JAX_PROCESS_ID) = 2 ] && exit 0
[ $JAX_PROCESS_ID = $failing ] && exit 76
trap '' TERM; while true; do sleep 0.1; done
"""
    run = launch(tmp_path, script, "--grace=0.2")
    _, said = run.communicate(timeout=60)
    assert run.returncode == 0, said
    assert "ended with 76; starting again" in said


def test_restarts_end_where_no_new_checkpoint_comes_and_start_anew_where_one_does(tmp_path):
    """Two checkpoints, then none: two restarts that lead on, then as many in vain as are allowed."""
    script = """
[ $JAX_PROCESS_ID = 1 ] && exit 0
echo x >> $folder/starts
starts=$(wc -l < $folder/starts)
[ $starts -le 2 ] && mkdir -p $folder/checkpoints/$starts
kill -KILL $$
"""
    run = launch(tmp_path, script, "--restarts=2", "--grace=5")
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGKILL
    assert "no new checkpoint after 2 restarts, gave up" in said
    assert (tmp_path / "starts").read_text() == "x\n" * 5


def test_a_signal_is_passed_on_and_nothing_is_started_again(tmp_path):
    script = """
trap 'sleep 0.3; touch $folder/saved.$JAX_PROCESS_ID; exit 75' TERM
touch $folder/ready.$JAX_PROCESS_ID; while true; do sleep 0.05; done
"""
    run = launch(tmp_path, script)
    while not all((tmp_path / f"ready.{i}").exists() for i in range(2)):
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    run.communicate()
    assert run.returncode == 75
    assert all((tmp_path / f"saved.{i}").exists() for i in range(2))
