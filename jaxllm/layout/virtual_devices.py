"""Virtual CPU devices: how many, and the threads that they need. Imports no JAX: it is asked for before that starts."""

import os
import re

FLAG = "--xla_force_host_platform_device_count"
THREADS_A_DEVICE = 4


def set_virtual_devices(num_devices: int) -> None:
    """Makes JAX, where it has not started, and processes started from here see so many CPU devices."""
    before = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(FLAG)]
    os.environ["XLA_FLAGS"] = " ".join([*before, f"{FLAG}={num_devices}"])
    add_threads()


def add_threads() -> None:
    """Sees that each virtual device of XLA_FLAGS has four threads, where XLA would give it one.

    A device that waits in a collective keeps its thread, and independent collectives may wait at once: with one thread
    a device the last ones find none, and the program stops for good (seen about once in an hour of tests).
    """
    if found := re.search(rf"{FLAG}=(\d+)", os.environ.get("XLA_FLAGS", "")):
        threads = max(int(os.environ.get("PJRT_NPROC", 0)), THREADS_A_DEVICE * int(found[1]))
        os.environ["PJRT_NPROC"] = str(threads)
