"""How a run of two real processes ends is in its events.jsonl, whichever process it is that fails."""

import pytest

from jaxllm.errors import RESTARTABLE
from jaxllm.report.run import ENDINGS, read_run
from tests import processes
from tests.train import tiny_run

FLAGS = ("mesh.data=2", "train.steps=8", "train.eval_every=0", "train.checkpoint_every=0")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    tiny_run.write_text(folder / "text.txt")
    return processes.write_config(folder, folder / "text.txt")


def ended(workdir, config, fails, *flags):
    """(the run as a report reads it, its endings in the order of the file)."""
    how = {"devices": 1, "entry": "tests.failing_run", "FAILS": fails}
    started = processes.start(workdir, config, *FLAGS, *flags, **how)
    said, _ = started.communicate(timeout=600)
    assert started.returncode >= RESTARTABLE, said[-3000:]
    run = read_run(workdir)
    return run, [event for event in run.events if event.name in ENDINGS]


def test_a_process_that_crashes_says_so(config, tmp_path):
    run, (first, *others) = ended(tmp_path, config, "1:80:crash")
    assert (run.state, run.why) == ("crashed", "process 1: ValueError: the batch from row 80 on is broken")
    assert (first.step, first.figures["process"]) == (5, 1)
    assert [event.figures["process"] for event in others] in ([], [0])  # which has lost the other


def test_processes_in_which_nothing_moves_say_so(config, tmp_path):
    """Whichever of the two it is that ends first."""
    run, (first, *others) = ended(tmp_path, config, "1:80:hang", "train.hang_timeout=4")
    assert run.state == first.name == "hung" and "nothing moved for" in run.why
    assert len(others) <= 1 and "process" in first.figures
