"""Checkpoints: any layout restores any other's; damage is skipped and said; a full disk or a kill spoils none."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.errors import UserError
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.checkpoint.files import FILES
from jaxllm.train.checkpoint.tree_hash import tree_hash
from jaxllm.train.state import TrainState

OPTIMIZER = optax.chain(
    optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale_by_schedule(lambda step: 0.1)
)


def make_state(step=1, width=16, seed=0):
    random_key = jax.random.key(seed + step)
    kernel = jax.random.normal(random_key, (8, width))
    params = {"head": {"kernel": kernel}, "layers": {"norm": {"scale": kernel[:, 0]}, "mlp": {"bias": kernel[0] * 2}}}
    optimizer = jax.tree.map(lambda leaf: leaf + step, OPTIMIZER.init(params))
    return TrainState(jnp.int32(step), params, optimizer, jnp.int32(0), jnp.float32(1), jnp.int32(step), {}, {}, {})


def place(state, rows, columns):
    """The state on rows x columns devices, matrices split over both."""
    mesh = Mesh(np.array(jax.devices()[: rows * columns]).reshape(rows, columns), ("rows", "columns"))
    spec = {0: PartitionSpec(), 1: PartitionSpec("rows"), 2: PartitionSpec("rows", "columns")}
    return jax.device_put(state, jax.tree.map(lambda leaf: NamedSharding(mesh, spec[leaf.ndim]), state))


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def write(folder, steps, **fields):
    checkpoints = Checkpoints(folder, **({"keep": 9} | fields))
    for step in steps:
        checkpoints.save(make_state(step), {"position": step}, {"seed": 0}, {"eval_loss": abs(step - 2.0)})
    checkpoints.close()


def assert_equal(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (8, 1), (2, 2)])
def test_restores_into_any_layout(tmp_path, shape):
    state = place(make_state(3), 4, 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"position": 7, "epoch": [1, 2]}, {"model": {"num_layers": 2}}, {"eval_loss": 1.5})
    checkpoints.close()
    target = abstract(place(make_state(), *shape))
    restored = Checkpoints(tmp_path).restore(target)
    assert_equal(restored.state, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored.state) == jax.tree.map(lambda leaf: leaf.sharding, target)
    assert restored.step == 3 and restored.data == {"position": 7, "epoch": [1, 2]}
    assert restored.run["config"] == {"model": {"num_layers": 2}} and restored.run["metrics"] == {"eval_loss": 1.5}
    assert set(restored.run["versions"]) == {"jax", "flax", "optax", "orbax-checkpoint"}
    step, params, run = Checkpoints(tmp_path).restore_params(target.params)
    assert_equal(params, state.params)
    assert step == 3 and run["parameter_hash"] == tree_hash(params)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what a process reads is counted on Linux alone")
def test_another_layout_reads_each_byte_once(tmp_path):
    """Rows were saved by eight devices; now each needs a part of every one of them."""
    state = place(make_state(width=2**20), 8, 1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {}, {}, {})
    target = abstract(place(make_state(width=2**20), 1, 8))
    Checkpoints(tmp_path).restore(target)  # reads Python's modules too
    size = sum(path.stat().st_size for path in (tmp_path / "1").rglob("*") if path.is_file())
    read = []
    for _ in range(3):  # without the cache some are lucky
        before = bytes_read()
        Checkpoints(tmp_path).restore(target)
        read.append(bytes_read() - before)
    assert size > 3e7 and 0.9 < max(read) / size < 1.1, read


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def test_hash_is_of_bits_and_positions_not_of_the_layout():
    params = make_state().params
    value = tree_hash(params)
    assert len(value) == 16 and value == "".join(c for c in value if c in "0123456789abcdef")
    for shape in [(1, 1), (2, 4), (8, 1)]:
        assert tree_hash(place(params, *shape)) == value
    kernel = params["head"]["kernel"]
    swapped = kernel.at[0, 0].set(kernel[5, 3]).at[5, 3].set(kernel[0, 0])
    mirrored = kernel.at[0, 1].set(kernel[1, 0]).at[1, 0].set(kernel[0, 1])
    last_bit = kernel.at[7, 15].set(jnp.nextafter(kernel[7, 15], 9.0))
    zeros = [jnp.zeros((3, 4)), jnp.zeros((3, 4)).at[1, 1].set(-0.0), jnp.zeros((4, 3)), jnp.zeros((3, 4), jnp.int32)]
    others = [
        tree_hash(params | {"head": {"kernel": k}}) for k in (swapped, mirrored, last_bit, kernel.T, kernel[::-1])
    ]
    others += [tree_hash({"head": leaf}) for leaf in zeros] + [tree_hash({"tail": zeros[0]})]
    others += [tree_hash({"head": kernel.astype(jnp.bfloat16)}), tree_hash({"head": kernel > 0})]
    assert len({value, *others}) == 1 + len(others)


def test_donating_the_state_right_after_a_save_is_safe(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 + 7, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    state = place(make_state(width=4096), 2, 4)
    want = jax.tree.map(np.array, state)
    checkpoints.save(state, {}, {}, {})
    for _ in range(3):
        state = overwrite(state)
    checkpoints.close()
    assert_equal(checkpoints.restore(abstract(state)).state, want)


def test_keeps_the_newest_and_the_best(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5], keep=2, keep_best=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]


@pytest.mark.parametrize(("keep", "left"), [(1, ["5"]), (3, ["3", "4", "5"]), (4, ["2", "3", "4", "5"])])
def test_keeps_as_many_of_the_newest_as_asked(tmp_path, keep, left):
    write(tmp_path, [1, 2, 3, 4, 5], keep=keep, keep_best=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def _truncate(folder):
    for data in (folder / "params").rglob("d/*"):
        os.truncate(data, data.stat().st_size // 2)


def _remove_data(folder):
    for data in (folder / "params").rglob("d"):
        shutil.rmtree(data)


DAMAGES = {
    "truncated": _truncate,
    "half_deleted": _remove_data,
    "item_gone": lambda folder: shutil.rmtree(folder / "state"),
    "metadata_gone": lambda folder: (folder / "params" / "_METADATA").unlink(),
    "json_cut": lambda folder: [os.truncate(p, 9) for p in (folder / "run").iterdir() if p.name == "metadata"],
    "iterator_gone": lambda folder: shutil.rmtree(folder / "data"),
    "all_but_the_name": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    write(folder, [1, 2])
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_said(tmp_path, two_checkpoints, damage):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    DAMAGES[damage](folder / "2")
    said = []
    checkpoints = Checkpoints(folder, say=said.append)
    restored = checkpoints.restore(abstract(make_state()))
    assert restored.step == 1
    assert_equal(restored.state, make_state(1))
    assert len(said) == 1 and "step 2 is damaged and skipped" in said[0] and "of step 1" in said[0]
    checkpoints.save(make_state(2), {}, {}, {})  # the run reaches the step again
    checkpoints.close()
    assert checkpoints.restore(abstract(make_state())).step == 2 and len(said) == 1

    DAMAGES[damage](folder / "1"), DAMAGES[damage](folder / "2")
    assert [path.name for path in folder.glob("*.damaged")] == ["2.damaged"]
    with pytest.raises(UserError, match=r"None of the 2 checkpoints in .* can be read"):
        checkpoints.restore(abstract(make_state()))


def test_an_unfinished_checkpoint_is_no_checkpoint(tmp_path, two_checkpoints):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(folder)
    checkpoints.clean_up()
    assert [path.name for path in folder.iterdir()] == ["1"]
    assert checkpoints.restore(abstract(make_state())).step == 1
    assert Checkpoints(tmp_path / "nothing").restore(abstract(make_state())) is None


@pytest.mark.parametrize("name", ["parameter_hash", "state_hash"])
def test_arrays_that_are_not_those_saved_are_found(tmp_path, two_checkpoints, name):
    """Also where no list of files was written any more."""
    folder, said = tmp_path / "checkpoints", []
    shutil.copytree(two_checkpoints, folder)
    (folder / "2" / FILES).unlink()
    file = folder / "2" / "run" / "metadata"
    run = json.loads(file.read_text())
    file.write_text(json.dumps(run | {name: "0123456789abcdef"}))
    assert Checkpoints(folder, say=said.append).restore(abstract(make_state())).step == 1
    assert f"have the hash {run[name]}, but 0123456789abcdef was taken at the save" in said[0]


def test_one_changed_byte_in_any_file_is_found(tmp_path, two_checkpoints):
    files = sorted(p.relative_to(two_checkpoints / "2") for p in (two_checkpoints / "2").rglob("*") if p.is_file())
    draw = random.Random(0)
    for number, name in enumerate(files):
        folder, said = tmp_path / str(number), []
        shutil.copytree(two_checkpoints, folder)
        content = bytearray((folder / "2" / name).read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (folder / "2" / name).write_bytes(content)
        assert Checkpoints(folder, say=said.append).restore(abstract(make_state())).step == 1, name
        assert len(said) == 1 and "step 2 is damaged and skipped" in said[0]


def test_another_model_or_optimizer_is_refused(two_checkpoints):
    with pytest.raises(UserError) as caught:
        Checkpoints(two_checkpoints).restore(abstract(make_state(width=24)))
    assert "2 is a checkpoint of another model" in str(caught.value)
    assert "head/kernel: [8, 16] float32 in the checkpoint, [8, 24] float32 in this run" in str(caught.value)
    fewer = make_state()._replace(params={"head": make_state().params["head"], "tail": {"bias": jnp.zeros(3)}})
    with pytest.raises(UserError, match=r"layers/norm/scale: \[8\] float32 in the checkpoint, absent in this run"):
        Checkpoints(two_checkpoints).restore(abstract(fewer))
    lion = make_state()._replace(optimizer=optax.scale_by_lion().init(make_state().params))
    with pytest.raises(UserError, match=r"another optimizer(.|\n)*optimizer/mu/head/kernel: absent in the checkpoint"):
        Checkpoints(two_checkpoints).restore(abstract(lion))


def test_the_run_of_the_newest_checkpoint(tmp_path, two_checkpoints):
    assert Checkpoints(two_checkpoints).newest_run()["config"] == {"seed": 0}
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    DAMAGES["json_cut"](folder / "2")
    assert Checkpoints(folder).newest_run()["metrics"] == {"eval_loss": 1.0}
    assert Checkpoints(tmp_path / "nothing").newest_run() is None


@pytest.mark.parametrize("small_disk", ["3m"], indirect=True)
def test_a_full_disk_leaves_the_earlier_checkpoint(small_disk):
    checkpoints = Checkpoints(small_disk / "checkpoints")
    state = make_state(1, width=60_000)  # the kernel takes 1.9 MB, the moments compress to little
    checkpoints.save(state, {}, {}, {})
    checkpoints.wait()
    with pytest.raises(UserError) as caught:
        checkpoints.save(make_state(2, width=60_000), {}, {}, {})
        checkpoints.wait()
    assert "The checkpoint of step 2 could not be written" in str(caught.value)
    assert "no space left on the disk" in str(caught.value) and "The checkpoint of step 1 is whole" in str(caught.value)
    again = Checkpoints(small_disk / "checkpoints")
    again.clean_up()
    restored = again.restore(abstract(state))
    assert restored.step == 1
    assert_equal(restored.state, state)


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_checkpoint import Checkpoints, make_state
checkpoints = Checkpoints({folder!r})
for step in range(1, 1000):
    checkpoints.save(make_state(step, width=100_000), {{}}, {{}}, {{}})
    print(step, flush=True)  # the one before it is committed, this one under way
"""


def test_killed_during_a_save(tmp_path):
    script = WRITER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    started = 0
    for line in child.stdout:
        started = int(line)
        if started == 4:
            break
    time.sleep(random.Random(0).uniform(0, 0.02))
    child.send_signal(signal.SIGKILL)
    child.wait()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.clean_up()
    restored = checkpoints.restore(abstract(make_state(width=100_000)))
    assert started == 4 and restored.step >= 3
    assert_equal(restored.state, make_state(restored.step, width=100_000))
