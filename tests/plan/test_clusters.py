"""Clusters as data, the user's own among them."""

import re

import pytest

from jaxllm.errors import UserError
from jaxllm.layout.config import ClusterConfig, MeshConfig
from jaxllm.plan.clusters import chosen_cluster, cluster_names, load_cluster
from jaxllm.train.flops import PEAK_TFLOPS


@pytest.mark.parametrize("name", cluster_names())
def test_every_cluster_of_the_table(name):
    cluster = load_cluster(name)
    assert cluster.gpus_per_node >= 1 and 0 < cluster.network_bandwidth < cluster.gpu.link_bandwidth
    assert 0.3 < cluster.gpu.matmul_efficiency < 1 and cluster.usable_bytes < cluster.gpu.memory_bytes


@pytest.mark.parametrize("name", cluster_names())
def test_its_peak_is_that_of_the_training_metrics(name):
    """One figure for MFU, planned or measured (train/flops.py)."""
    gpu = load_cluster(name).gpu
    known = [peak for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", gpu.name)]
    assert not known or known[0] == gpu.tflops["bfloat16"]


def test_the_clusters_that_people_type():
    assert {"a100-80gx8", "h100x8", "h200x8", "b200x8"} <= set(cluster_names())


def test_an_unknown_cluster():
    with pytest.raises(UserError, match=r"--cluster=h100x9: not a cluster\. Did you mean 'h100x8'"):
        load_cluster("h100x9")


def test_one_of_ones_own(tmp_path):
    file = tmp_path / "ours.toml"
    file.write_text('[gpu.ours]\nlike = "h100"\nmemory_bytes = 64_000_000_000\n[cluster.oursx4]\ngpu = "ours"\n')
    with pytest.raises(UserError, match=r"\[cluster.oursx4\] has no gpus_per_node"):
        load_cluster(str(file))
    with file.open("a") as text:
        text.write("gpus_per_node = 4\nnetwork_bandwidth = 25\n")
    cluster = load_cluster(str(file))
    assert (cluster.gpus_per_node, cluster.gpu.memory_bytes) == (4, 64_000_000_000)
    assert cluster.gpu.multiprocessors == load_cluster("h100x8").gpu.multiprocessors
    file.write_text(file.read_text().replace("memory_bytes", "memory_gigabytes"))
    with pytest.raises(UserError, match=r"\[gpu.ours\] may have no memory_gigabytes"):
        load_cluster(str(file))


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"--cluster=.*none.toml"):
        load_cluster(str(tmp_path / "none.toml"))


def test_a_config_changes_the_nodes_of_its_own_cluster():
    config = ClusterConfig(name="h100x8", gpus=32, gpus_per_node=4, network_bandwidth=25.0, gpu="h200")
    cluster, gpus = chosen_cluster(config, MeshConfig())
    assert (gpus, cluster.gpus_per_node, cluster.network_bandwidth) == (32, 4, 25.0)
    assert cluster.gpu.name == "NVIDIA H200"
    assert chosen_cluster(config, MeshConfig(), "a100-80gx8", 16) == (load_cluster("a100-80gx8"), 16)
    assert chosen_cluster(ClusterConfig(), MeshConfig(pipeline=2, model=4))[1] == 8


def test_gpus_that_are_no_whole_nodes():
    with pytest.raises(UserError, match=r"--gpus=12 is not a multiple of the 8 of a node of h100x8. Nearest: 8 or 16"):
        chosen_cluster(ClusterConfig(), MeshConfig(), "h100x8", 12)
    assert chosen_cluster(ClusterConfig(), MeshConfig(), "h100x8", 4)[1] == 4
