"""Checkpoints in a bucket: whole or not there, damaged ones set aside, old ones removed."""

import jax
import numpy as np
import pytest

from jaxllm.errors import Lost, UserError
from jaxllm.remote.storage import filesystem
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.checkpoint.files import FILES
from jaxllm.train.checkpoint.places import COMMITTED
from tests.train.test_checkpoint import abstract, assert_equal, make_state, place, write


def names(bucket) -> list[str]:
    """What lies beside the checkpoints."""
    return sorted(path.rpartition("/")[2] for path in filesystem(bucket).ls(bucket, detail=False))


def test_restores_into_another_layout(bucket):
    state = place(make_state(3), 4, 2)
    with Checkpoints(bucket) as checkpoints:
        checkpoints.save(state, {"position": 7}, {"model": {"num_layers": 2}}, {"eval_loss": 1.5})
    with Checkpoints(bucket) as checkpoints:
        restored = checkpoints.restore(abstract(place(make_state(), 2, 2)))
    assert_equal(restored.state, state)
    assert restored.data == {"position": 7} and restored.run["metrics"] == {"eval_loss": 1.5}
    assert filesystem(bucket).exists(f"{bucket}/3/{FILES}")


def test_keeps_the_newest_and_the_best(bucket):
    write(bucket, [1, 2, 3, 4], keep=1)
    assert Checkpoints(bucket).steps() == [2, 4]
    assert names(bucket) == ["2", "4"], "what is not kept is gone"


def test_one_without_its_last_file_is_not_there(bucket):
    write(bucket, [1, 2])
    filesystem(bucket).rm_file(f"{bucket}/2/{COMMITTED}")
    checkpoints = Checkpoints(bucket)
    assert checkpoints.steps() == [1]
    assert checkpoints.restore(abstract(make_state())).step == 1
    checkpoints.clean_up()
    assert names(bucket) == ["1"]


def test_a_step_is_written_again_over_what_was_cut_short(bucket):
    write(bucket, [1])
    filesystem(bucket).rm_file(f"{bucket}/1/{COMMITTED}")
    write(bucket, [1])
    assert Checkpoints(bucket).restore(abstract(make_state())).step == 1


@pytest.mark.parametrize("damage", ["shorter", "changed", "gone"])
def test_a_damaged_one_is_skipped_said_and_set_aside(bucket, damage):
    write(bucket, [1, 2])
    store, file = filesystem(bucket), f"{bucket}/2/run/metadata"
    data = store.cat_file(file)
    if damage == "gone":
        store.rm_file(file)
    else:
        store.pipe_file(file, data[:-1] if damage == "shorter" else data.replace(b"0", b"1", 1))
    said = []
    restored = Checkpoints(bucket, say=said.append).restore(abstract(make_state()))
    assert restored.step == 1 and "of step 2 is damaged and skipped (run/metadata" in said[0]
    assert names(bucket) == ["1", "2.damaged"]


def test_arrays_that_changed_are_found_by_their_hash(bucket):
    write(bucket, [1, 2])
    store = filesystem(bucket)
    for name in store.find(f"{bucket}/1/params/ocdbt.process_0/d"):
        store.cp_file(name, name.replace("/1/params/", "/2/params/"))
    store.rm(f"{bucket}/2/{FILES}")
    for name in ("manifest.ocdbt", "ocdbt.process_0/manifest.ocdbt"):
        store.cp_file(f"{bucket}/1/params/{name}", f"{bucket}/2/params/{name}")
    for name in store.find(f"{bucket}/1/params/d"):
        store.cp_file(name, name.replace("/1/params/", "/2/params/"))
    said = []
    assert Checkpoints(bucket, say=said.append).restore(abstract(make_state())).step == 1
    assert "the parameters have the hash" in said[0]


def test_a_store_that_does_not_answer_is_no_damage(bucket, monkeypatch):
    write(bucket, [1, 2])
    checkpoints = Checkpoints(bucket)

    def no_answer(*_, **__):
        raise ValueError("UNAVAILABLE: the store does not answer")

    monkeypatch.setattr(checkpoints._handler, "restore", no_answer)
    with pytest.raises(Lost, match=f"{bucket}/2 cannot be read now"):
        checkpoints.restore(abstract(make_state()))
    assert names(bucket) == ["1", "2"]


def test_a_save_that_a_store_refuses_is_said_and_another_follows(bucket, monkeypatch):
    from jaxllm.train.checkpoint.checkpoints import SaveFailed

    write(bucket, [1])
    with Checkpoints(bucket) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._place, "make_way", _refuses)
            with pytest.raises(SaveFailed, match="The checkpoint of step 1 is whole"):
                checkpoints.save(make_state(2), {}, {}, {})
        checkpoints.save(make_state(2), {}, {}, {})
    assert Checkpoints(bucket).steps() == [1, 2]


def _refuses(step):
    raise PermissionError(13, "no right to write there")


def test_another_model_is_refused(bucket):
    write(bucket, [1])
    with pytest.raises(UserError, match="is a checkpoint of another model"):
        Checkpoints(bucket).restore(abstract(make_state(width=8)))


def test_parameters_alone(bucket):
    write(bucket, [1, 2])
    step, params, _ = Checkpoints(bucket).restore_params(abstract(make_state()).params, 1)
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, params, make_state(1).params)
