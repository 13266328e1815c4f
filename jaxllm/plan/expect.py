"""The planner's word on a run that is about to start, for `jaxllm train` to print."""

from jaxllm.errors import UserError
from jaxllm.layout.layout import Layout
from jaxllm.plan.clusters import Cluster, chosen_cluster, cluster_names, load_cluster
from jaxllm.plan.job import make_job
from jaxllm.plan.memory import memory
from jaxllm.plan.time import step_time
from jaxllm.train.config import Config
from jaxllm.train.watch.expectation import Expectation


def expected(config: Config, layout: Layout) -> Expectation:
    """Of a config whose model is resolved, on the devices of its layout."""
    mesh, device = layout.mesh, layout.mesh.devices.flat[0]
    cluster = _cluster_of(device.device_kind, config)
    known = cluster is not None
    if not known:
        cluster = chosen_cluster(config.cluster, config.mesh, num_gpus=1)[0]
    job = make_job(config, cluster, mesh.size)
    told = cluster.name if known else f"{device.device_kind} is not in the planner's table: no time is planned"
    try:
        seconds = step_time(job).total if known else None
    except UserError as error:  # what a plan cannot say, a precision that the table has no figure for, hinders no run
        seconds, told = None, str(error)
    return Expectation(memory(job).total, seconds, told)


def _cluster_of(device_kind: str, config: Config) -> Cluster | None:
    """The config's cluster where its card is the one that is here, else the first of the table that has it."""
    named = [config.cluster.name, *cluster_names()]
    for name in named:
        cluster = load_cluster(name)
        if cluster.gpu.name == device_kind:
            return cluster
    return None
