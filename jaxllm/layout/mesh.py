"""The device mesh: six named axes, sizes from flags, `model` innermost so that it stays inside a node."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxllm.errors import UserError
from jaxllm.layout.config import MeshConfig

AXES = tuple(f.name for f in dataclasses.fields(MeshConfig))


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Resolves the sizes of `config` for `num_devices`, filling in the one that is -1.

    Raises:
      UserError: a size below 1, two sizes of -1, or a product that is not the number of devices.
    """
    sizes = dataclasses.asdict(config)
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"config.mesh.{axis}={size} must be 1 or more, or -1 for 'the rest'.")
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise UserError(
            f"config.mesh: only one axis may be -1 ('the rest'), not {' and '.join(rest)}. "
            f"Give config.mesh.{rest[-1]} a size."
        )
    given = math.prod(size for size in sizes.values() if size != -1)
    written = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"
    if rest:
        if num_devices % given:
            raise UserError(
                f"config.mesh: {written} = {given} does not divide the {num_devices} devices, "
                f"so {rest[0]}=-1 has no size. {_nearest(sizes, num_devices)}"
            )
        sizes[rest[0]] = num_devices // given
    elif given != num_devices:
        raise UserError(
            f"config.mesh: {written} = {given} devices, but there are {num_devices}. {_nearest(sizes, num_devices)}"
        )
    return sizes


def _nearest(sizes: dict[str, int], num_devices: int) -> str:
    """The way out: the largest sizes at or below those asked for that divide the devices; `data` takes the rest."""
    fitted, left = {}, num_devices
    for axis in ("model", "context", "expert", "replica", "pipeline"):
        size = max(d for d in range(1, min(max(sizes[axis], 1), left) + 1) if left % d == 0)
        fitted[axis], left = size, left // size
    flags = [f"--config.mesh.{axis}={fitted[axis]}" for axis in AXES if axis != "data" and sizes[axis] != 1]
    return "Nearest mesh that fits: " + " ".join([f"--config.mesh.data={left}", *flags])


def make_mesh(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None, *, model_across_nodes: bool = True
) -> Mesh:
    """The mesh over `devices` (default: all), nodes outermost.

    Devices are taken in the order (process, device id), so each axis is as near as the axes inside it allow: with
    `model` x `context` x ... up to the devices of a node, those axes never leave the node, and the outer axes cross
    the network. That is the hybrid mesh of a cluster whose nodes are all-to-all inside (NVLink).

    Raises:
      UserError: sizes that do not fit the devices, or `model` spread unevenly over nodes, or over several
        where that is not meant.
    """
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    shape = mesh_shape(config, len(devices))
    nodes = len({node_of(device) for device in devices})
    a_node = len(devices) // nodes
    if a_node % shape["model"] and shape["model"] % a_node:
        raise UserError(
            f"config.mesh.model={shape['model']} would straddle nodes of {a_node} devices unevenly. "
            f"Choose a divisor of {a_node}."
        )
    if shape["model"] > a_node and not model_across_nodes:
        raise UserError(
            f"config.mesh.model={shape['model']} would leave a node of {a_node} devices: every layer would all-reduce "
            f"over the network between nodes. Use --config.mesh.model={a_node} and more of data or pipeline, or say "
            "--config.layout.model_across_nodes=true."
        )
    grid = np.array(devices).reshape(tuple(shape[axis] for axis in AXES))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def node_of(device: jax.Device) -> int:
    """Which node a device is in: where JAX knows it (of GPUs: what NVLink joins), else its process is taken for one."""
    of_gpu = getattr(device, "slice_index", None) if getattr(device, "platform", "") == "gpu" else None
    return device.process_index if of_gpu is None else of_gpu


def platform_of(device: jax.Device) -> str:
    """ "cpu", "gpu", or of a GPU that lacks what Hopper brought (cuDNN's packed attention) "gpu before Hopper"."""
    capability = str(getattr(device, "compute_capability", "") or "9.0")
    before = device.platform == "gpu" and tuple(map(int, capability.split("."))) < (9, 0)
    return "gpu before Hopper" if before else device.platform


def one_at_a_time(program: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function whose results come back once the next program may follow it (`in_order`)."""
    return lambda *arguments: in_order(program(*arguments))


def in_order(results: Any) -> Any:
    """Returns what a jitted function returned, once the next program may follow it.

    GPUs run programs in the order of their dispatch. CPUs may run two at once, and with collectives in them those can
    wait for each other for ever: Gloo, which joins the processes of a run, cannot tell theirs apart; and the virtual
    devices of a process share a pool with a thread for each, where one program may hold threads that another needs. So
    with more than one CPU device this waits.
    """
    if jax.device_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(results)
    return results
