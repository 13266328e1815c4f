"""Two real processes, joined by Gloo, train what one process does, with each mesh axis across their border."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.data.loader import read_sharding
from jaxllm.train.metrics import read_metrics
from tests import processes, recorded_run
from tests.train import tiny_run

# The first axis of the mesh that is not 1 is the one that crosses from one process to the other.
LAYOUTS = {
    "data": ("mesh.data=8",),
    "data, ZeRO 3": ("mesh.data=8", "layout.zero_stage=3"),
    "replica": ("mesh.replica=2", "mesh.data=4", "layout.zero_stage=2"),
    "model": ("mesh.model=8", "mesh.data=1", "layout.model_across_nodes=true", "layout.sequence_parallel=true"),
    "pipeline": ("mesh.pipeline=2", "mesh.model=2", "mesh.data=2", "layout.num_microbatches=2"),
    "context": ("mesh.context=8", "mesh.data=1", "layout.zero_stage=1"),
}
BATCH = 16
FEW = ("train.steps=4", "optimizer.warmup_steps=1", "train.eval_every=4", "train.checkpoint_every=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    tiny_run.write_text(folder / "text.txt")
    return processes.write_config(folder, folder / "text.txt")


@pytest.fixture(scope="module")
def alone(config) -> list[dict]:
    """One process, one device: every layout's losses are its own."""
    workdir = config.parent / "alone"
    processes.train(workdir, config, *FEW, processes=1, devices=1)
    return read_metrics(workdir / "metrics.jsonl")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_what_one_does(config, alone, tmp_path, layout):
    """And read every row once: none is read by both, and none that is needed by neither."""
    said = processes.train(tmp_path, config, *FEW, *LAYOUTS[layout], entry="tests.recorded_run")
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in records] == pytest.approx([r[name] for r in alone], rel=1e-5)
    assert records[-1]["eval_loss"] == pytest.approx(alone[-1]["eval_loss"], rel=1e-5)
    assert said.count("done: ") == 1  # the first process speaks for both
    for kind, needed in {"Rows": 4 * BATCH, "EvaluationRows": 2 * BATCH}.items():  # 4 steps, an evaluation of 2 batches
        read = [recorded_run.rows_read(tmp_path, kind, process) for process in range(2)]
        assert all(len(rows) >= needed // 2 for rows in read)  # each process does its part
        rows = sorted(read[0] + read[1])
        assert len(set(rows)) == len(rows) and set(rows) >= set(range(needed))  # some are read ahead


@pytest.mark.parametrize("axes", [("pipeline", "data"), ("data", "model"), ("model", "data")])
def test_every_row_is_read_by_one_process_alone(axes):
    """Over meshes of which each process needs all rows, or half of them."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), axes)
    sharding = NamedSharding(mesh, P("data", None))
    process_of = {device.id: index // 4 for index, device in enumerate(mesh.devices.flat)}
    read = read_sharding(sharding, (16, 8), lambda device: process_of[device.id])
    rows = {0: set(), 1: set()}
    for device, index in read.devices_indices_map((16, 8)).items():
        rows[process_of[device.id]] |= set(range(*index[0].indices(16)))
    assert rows[0] | rows[1] == set(range(16)) and not rows[0] & rows[1]
