"""Checkpoints in a bucket: whole or not there, damaged ones set aside, old ones removed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.errors import Lost, UserError
from jaxllm.remote.storage import filesystem
from jaxllm.train.checkpoint.checkpoints import Checkpoints, SaveFailed
from jaxllm.train.checkpoint.places import COMMITTED, FILES
from tests.train.test_checkpoint import abstract, assert_equal, make_state, place, write

ROOT = Path(__file__).parents[2]


def names(bucket) -> list[str]:
    """What lies beside the checkpoints."""
    return sorted(path.rpartition("/")[2] for path in filesystem(bucket).ls(bucket, detail=False))


def test_restores_into_another_layout(bucket):
    state = place(make_state(3), 4, 2)
    with Checkpoints(bucket) as checkpoints:
        checkpoints.save(state, {"position": 7}, {"model": {"num_layers": 2}}, {"eval_loss": 1.5})
    with Checkpoints(bucket) as checkpoints:
        restored = checkpoints.restore(abstract(place(make_state(), 2, 2)))
        step, params, _ = checkpoints.restore_params(abstract(make_state()).params)
        with pytest.raises(UserError, match="is a checkpoint of another model"):
            checkpoints.restore(abstract(make_state(width=8)))
    assert_equal(restored.state, state)
    assert restored.data == {"position": 7} and restored.run["metrics"] == {"eval_loss": 1.5}
    assert step == 3
    assert_equal(params, state.params)
    assert filesystem(bucket).exists(f"{bucket}/3/{FILES}")


def test_keeps_the_newest_and_the_best(bucket):
    write(bucket, [1, 2, 3], keep=1)
    assert Checkpoints(bucket).steps() == [2, 3]
    assert names(bucket) == ["2", "3"], "what is not kept is gone"


def test_one_that_was_cut_short_is_not_there(bucket):
    """By a kill when all of it was written but its last file."""
    program = (
        "import sys; from tests.train import test_checkpoint, tiny_run\n"
        f"tiny_run.kill_at_commit(2); test_checkpoint.write({bucket!r}, [1, 2])"
    )
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert filesystem(bucket).exists(f"{bucket}/2/params/_METADATA"), "it was about to be whole"
    checkpoints = Checkpoints(bucket)
    assert checkpoints.steps() == [1]
    assert checkpoints.restore(abstract(make_state())).step == 1
    write(bucket, [2])  # over what is left
    assert checkpoints.restore(abstract(make_state())).step == 2
    filesystem(bucket).rm_file(f"{bucket}/2/{COMMITTED}")
    filesystem(bucket).rm_file(f"{bucket}/2/{FILES}")
    checkpoints.clean_up()
    assert names(bucket) == ["1"]


def test_damaged_ones_are_skipped_said_and_set_aside(bucket):
    write(bucket, [1, 2, 3])
    store, file = filesystem(bucket), "run/metadata"
    store.rm_file(f"{bucket}/2/{file}")
    store.pipe_file(f"{bucket}/3/{file}", store.cat_file(f"{bucket}/3/{file}").replace(b"0", b"1", 1))
    said = []
    assert Checkpoints(bucket, say=said.append).restore(abstract(make_state())).step == 1
    for line, found in zip(said, ("has another checksum", "is missing"), strict=True):
        assert f"is damaged and skipped ({file} {found}" in line
    assert names(bucket) == ["1", "2.damaged", "3.damaged"]


def test_a_store_that_does_not_answer_is_no_damage(bucket, monkeypatch):
    write(bucket, [2])
    checkpoints = Checkpoints(bucket)

    def no_answer(*_, **__):
        raise ValueError("UNAVAILABLE: the store does not answer")

    monkeypatch.setattr(checkpoints._handler, "restore", no_answer)
    with pytest.raises(Lost, match=f"{bucket}/2 cannot be read now"):
        checkpoints.restore(abstract(make_state()))
    assert names(bucket) == ["2"]


def test_a_save_that_a_store_refuses_is_said_and_another_follows(bucket, monkeypatch):
    with Checkpoints(bucket) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._place, "make_way", _refuses)
            with pytest.raises(SaveFailed, match=r"step 2 could not be written to .*: the folder is not writable"):
                checkpoints.save(make_state(2), {}, {}, {})
        checkpoints.save(make_state(2), {}, {}, {})
    assert Checkpoints(bucket).steps() == [2]


def _refuses(step):
    raise PermissionError(13, "no right to write there")


def test_one_that_was_copied_from_a_disk(bucket, tmp_path):
    write(tmp_path / "run", [1, 2])
    filesystem(bucket).put(f"{tmp_path}/run/", f"{bucket}/", recursive=True)
    filesystem(bucket).rm_file(f"{bucket}/2/state/_METADATA")  # this one was cut short
    said = []
    assert Checkpoints(bucket, say=said.append).restore(abstract(make_state())).step == 1
    assert "state/_METADATA is missing" in said[0]
    assert names(bucket) == ["1", "2.damaged"]
