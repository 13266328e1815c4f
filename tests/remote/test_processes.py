"""Two real processes with their run in a bucket: as the same run on a disk, also after it was cut short."""

import signal

import pytest

from jaxllm.remote.copy import fresh_copy
from jaxllm.remote.storage import filesystem
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from tests import processes
from tests.faulty_run import Running
from tests.train import tiny_run
from tests.train.kill_campaign import records

FLAGS = ("mesh.data=2", "train.steps=12", "train.eval_every=12", "train.hang_timeout=60")
SAVED = ("parameter_hash", "state_hash", "metrics")


def test_a_killed_run_of_two_processes_goes_on_from_the_bucket(store, bucket, tmp_path):
    if store[0] == "gs":
        pytest.skip("in the other store alone, as it takes its time")
    tiny_run.write_text(tmp_path / "text.txt")
    config, on_disk = processes.write_config(tmp_path, tmp_path / "text.txt"), tmp_path / "on_disk"
    processes.train(on_disk, config, *FLAGS, devices=1)

    run = Running(tmp_path, processes.start(bucket, config, *FLAGS, devices=1))
    run.at_step(9)
    run.signal(signal.SIGKILL)
    assert run.finish() not in (0, None)
    assert Checkpoints(f"{bucket}/checkpoints").steps()[-1] in (4, 8)
    processes.train(bucket, config, *FLAGS, devices=1)

    assert records(fresh_copy(bucket)) == records(on_disk)
    theirs, ours = Checkpoints(f"{bucket}/checkpoints").newest_run(), Checkpoints(on_disk / "checkpoints").newest_run()
    assert {name: theirs[name] for name in SAVED} == {name: ours[name] for name in SAVED}
    assert not [name for name in filesystem(bucket).find(bucket) if "orbax-checkpoint-tmp" in name]
