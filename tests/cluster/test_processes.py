"""Two real processes, joined by Gloo, train what one process does, with each mesh axis across their border."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.data.loader import read_sharding
from jaxllm.train.metrics import read_metrics
from tests import processes
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
    said = processes.train(tmp_path, config, *FEW, *LAYOUTS[layout])
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in records] == pytest.approx([r[name] for r in alone], rel=1e-5)
    assert records[-1]["eval_loss"] == pytest.approx(alone[-1]["eval_loss"], rel=1e-5)
    assert said.count("done: ") == 1  # the first process speaks for both


@pytest.mark.parametrize("axes", [("pipeline", "data"), ("data", "model"), ("model", "data")])
def test_every_row_is_read_by_one_process_alone(monkeypatch, axes):
    """Over meshes of which each process needs all rows, or half of them."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), axes)
    sharding = NamedSharding(mesh, P("data", None))
    process_of = {device.id: index // 4 for index, device in enumerate(mesh.devices.flat)}
    monkeypatch.setattr("jaxllm.data.loader.process_of", lambda device: process_of[device.id])
    read = read_sharding(sharding, (16, 8))
    rows = {0: set(), 1: set()}
    for device, index in read.devices_indices_map((16, 8)).items():
        rows[process_of[device.id]] |= set(range(*index[0].indices(16)))
    assert rows[0] | rows[1] == set(range(16)) and not rows[0] & rows[1]
