"""`jaxllm fabric` on virtual devices: every axis and collective, and bytes as nccl-tests counts them."""

import json

import jax
import pytest

from jaxllm.cli.main import main
from jaxllm.layout.config import MeshConfig
from jaxllm.layout.mesh import make_mesh
from jaxllm.plan.clusters import load_cluster
from jaxllm.plan.fabric import COLLECTIVES, measure_fabric


def test_each_axis_of_more_than_one_device_is_measured():
    mesh = make_mesh(MeshConfig(data=2, model=4))
    measured = measure_fabric(mesh, 400_000, load_cluster("h100x8"))
    assert [(m.axis, m.collective) for m in measured] == [(a, c) for a in ("data", "model") for c in COLLECTIVES]
    for m in measured:
        sent = {"all-reduce": 2 * (m.size - 1) / m.size, "permute": 1.0}.get(m.collective, (m.size - 1) / m.size)
        assert m.gigabytes_per_second == pytest.approx(sent * m.num_bytes / m.seconds / 1e9)
        assert m.num_bytes == 400_000 and not m.crosses_nodes and m.expected == 450


def test_an_axis_over_two_nodes_is_held_against_the_network(monkeypatch):
    monkeypatch.setattr("jaxllm.plan.fabric.node_of", lambda device: device.id // 4)
    measured = measure_fabric(make_mesh(MeshConfig(data=2, model=4)), 4_000, load_cluster("h100x8"))
    assert {m.axis: m.crosses_nodes for m in measured} == {"data": True, "model": False}
    network = load_cluster("h100x8").network_bandwidth
    assert {m.axis: m.expected for m in measured} == {"data": network, "model": 450}


def test_the_command_prints_a_line_a_collective(capsys):
    assert main(["fabric", "--config.mesh.data=8", "--megabytes=0.1", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["collective"] for line in lines] == list(COLLECTIVES) and lines[0]["share"] is None
    assert main(["fabric", "--megabytes=0"]) == 2
    assert jax.device_count() == 8
