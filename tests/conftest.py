"""Eight virtual CPU devices for every test, set before anything imports jax."""

import os

from jaxllm.layout.virtual_devices import add_threads

# LLVM's optimisation is most of a compile's time, and tests compute next to nothing.
# A machine that is busy with other work may keep a device from a collective for minutes; XLA would abort after 40 s.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
add_threads()
