"""GPUs that are not here, for XLA to compile for: the extra `plan`, and no driver.

XLA's CUDA plugin compiles for a described card (a `stream_executor.GpuTargetConfigProto` in text form) and any number
of them. What it makes is the program that runs on such cards, but for what autotuning would pick there.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING
from unittest import mock

from jaxllm.errors import UserError
from jaxllm.plan.clusters import Cluster, Gpu

if TYPE_CHECKING:
    import jax  # not before `prepare_environment`

MISSING = "the extra `plan` is not installed (pip install 'jaxllm[plan]')"
_TARGET = """\
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory}
  threads_per_core_limit: 2048
  core_count: {multiprocessors}
  fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2_bytes}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory_bytes}
  shared_memory_per_block_optin: {optin}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


def missing() -> str:
    """Why no GPU can be compiled for here; "" where it can."""
    if importlib.util.find_spec("jax_plugins") is None:
        return MISSING
    for package in ("jax-cuda12-pjrt", "jax-cuda12-plugin"):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return MISSING
        if found != (jax := importlib.metadata.version("jax")):
            return f"{package} is {found} and jax {jax}: they must be of one version"
    return ""


def prepare_environment() -> None:
    """What must be set before JAX is imported: no GPU is looked for, and none is needed to time kernels on."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "xla_gpu_autotune_level" not in flag]
    os.environ["XLA_FLAGS"] = " ".join([*flags, "--xla_gpu_autotune_level=0"])


def gpus(cluster: Cluster, num_gpus: int) -> "tuple[jax.Device, ...]":
    """Devices to compile for; nothing can be run on them.

    Raises:
      UserError: the plugin is missing, or of another version than JAX; GPUs that are no whole nodes.
    """
    if reason := missing():
        raise UserError(f"{reason[0].upper()}{reason[1:]}.")
    cluster.check_gpus(num_gpus)
    a_node = min(cluster.gpus_per_node, num_gpus)
    return _devices(f"1x{num_gpus // a_node}x{a_node}", target(cluster.gpu))


@functools.lru_cache(maxsize=4)
def _devices(shape: str, described: str) -> "tuple[jax.Device, ...]":
    from jax.experimental import topologies

    return tuple(topologies.get_topology_desc("", "cuda", topology=shape, target_config=described).devices)


def target(gpu: Gpu) -> str:
    """The description of a card as XLA's compiler takes it."""
    major, minor = gpu.compute_capability
    return _TARGET.format(
        major=major,
        minor=minor,
        shared_memory=gpu.shared_memory,
        multiprocessors=gpu.multiprocessors,
        lanes=128 if major >= 9 else 64,
        bandwidth=round(gpu.memory_bandwidth * 1e9),
        l2_bytes=gpu.l2_bytes,
        clock_ghz=gpu.clock_ghz,
        memory_bytes=gpu.memory_bytes,
        optin=gpu.shared_memory - 1024,
        name=gpu.name,
    )


@contextlib.contextmanager
def as_if_here(cluster: Cluster) -> Iterator[None]:
    """Inside, JAX's cuDNN attention can be traced: it asks the GPUs of this machine what they can, not the mesh's."""
    from jax._src.cudnn import fused_attention_stablehlo as attention

    capability = cluster.gpu.compute_capability
    asked = lambda text: tuple(int(part) for part in text.split("."))  # noqa: E731
    with (
        mock.patch.object(attention, "check_compute_capability", lambda text: capability >= asked(text)),
        mock.patch.object(attention, "is_cuda_compute_capability_equal", lambda text: capability == asked(text)),
    ):
        yield
