"""A run killed with SIGKILL, also during a save, ends with the very numbers of one that was not."""

import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import kill_campaign
import tiny_run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    tiny_run.write_text(path)
    return path


@pytest.fixture(scope="module")
def straight(text):
    """An uninterrupted run."""
    workdir = text.parent / "straight"
    kill_campaign.run_through(workdir, text, 0, random.Random(0))
    return workdir


def assert_bit_equal(workdir, straight):
    assert kill_campaign.records(workdir) == kill_campaign.records(straight)
    assert kill_campaign.last_hashes(workdir) == kill_campaign.last_hashes(straight)


def test_killed_at_random_moments(text, straight):
    steps = [record["step"] for record in kill_campaign.records(straight)]
    hashes = {record["tokens_hash"] for record in kill_campaign.records(straight)}
    assert steps == list(range(1, 41)) and len(hashes) == 40
    workdir = text.parent / "killed"
    campaign = kill_campaign.run_through(workdir, text, 2, random.Random(1))
    assert campaign.kills == 2
    assert_bit_equal(workdir, straight)


def test_killed_before_a_save_is_committed(text, straight):
    workdir = text.parent / "killed_at_commit"
    child = tiny_run.start(workdir, text, **{tiny_run.KILL_AT_COMMIT: "12"})
    _, output = child.communicate()
    assert child.returncode == -signal.SIGKILL, output
    assert any((workdir / "checkpoints").glob(kill_campaign.UNFINISHED))
    campaign = kill_campaign.run_through(workdir, text, 0, random.Random(0))
    assert re.search(r"resumed at step 8, parameter hash [0-9a-f]{16} as saved", campaign.output)
    assert_bit_equal(workdir, straight)


@pytest.mark.parametrize("small_disk", ["1m"], indirect=True)
def test_a_run_goes_on_while_the_disk_is_full_and_ends_without_loss_of_what_was_saved(text, straight, small_disk):
    workdir, changes = small_disk / "run", ("train.checkpoint_every=1", "train.keep=99")
    child = tiny_run.start(workdir, text, *changes)
    _, output = child.communicate()
    assert child.returncode == 2
    assert "The training goes on; the next try is at step" in output and "\nstep 40/40" in output
    assert re.search(r"\njaxllm: .*no space left on the disk.*\n.*run the same command again.*$", output, re.I)
    assert "Traceback" not in output and "orbax/" not in output
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    subprocess.run(["mount", "-o", "remount,size=99m", small_disk], check=True)
    campaign = kill_campaign.run_through(workdir, text, 0, random.Random(0), *changes)
    assert f"resumed at step {saved}," in campaign.output
    assert_bit_equal(workdir, straight)
