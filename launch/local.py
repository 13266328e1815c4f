#!/usr/bin/env python3
"""Several processes on this machine, as on a cluster, started again where one fails.

    launch/local.py --processes 2 --devices 4 -- train --config configs/quickstart.py --workdir runs/two

On GPUs --devices is how many each process gets; with JAX_PLATFORMS=cpu each has so many virtual CPU devices. Only
Python's own library is used: it also runs where jaxllm lives in a container that it is told to start.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

RESTARTABLE = 64  # codes from here on, and deaths by a signal: starting again may help
PREEMPTED = 75


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("--restarts", type=int, default=3, help="on end without a new checkpoint")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds for the others once one has ended")
    parser.add_argument("--port", type=int, default=0, help="of process 0; default: one that is free")
    parser.add_argument("--jaxllm", default="jaxllm", help="the command to run in each process")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- VERB [--flag=value …]")
    options = parser.parse_args()
    arguments = options.arguments[options.arguments[:1] == ["--"] :]
    if not arguments:
        parser.error("say what to run: launch/local.py --processes 2 -- train --config … --workdir …")
    return Launcher(options, arguments).run()


class Launcher:
    """The processes of a run."""

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]):
        self.options, self.arguments = options, list(arguments)
        self.children: list[subprocess.Popen] = []
        self.told_to_stop = False

    def run(self) -> int:
        """Starts the processes, again where that may help. Returns the exit code of the first that failed."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._pass_on)
        left, newest = self.options.restarts, self._newest_checkpoint()
        while True:
            code = self._once()
            may_help = code < 0 or code >= RESTARTABLE
            if not may_help or self.told_to_stop or code == PREEMPTED:
                return code if code >= 0 else 128 - code
            reached = self._newest_checkpoint()
            left, newest = (self.options.restarts, reached) if reached != newest else (left - 1, newest)
            if left < 0:
                print(f"local.py: no new checkpoint after {self.options.restarts} restarts, gave up", file=sys.stderr)
                return code if code >= 0 else 128 - code
            print(f"local.py: ended with {code}; starting again (newest checkpoint: {newest})", file=sys.stderr)

    def _once(self) -> int:
        address = f"localhost:{self.options.port or free_port()}"
        self.children = [self._start(number, address) for number in range(self.options.processes)]
        first = self._wait_for_first()
        if first:
            self._end_the_others()
        codes = [child.wait() for child in self.children]
        return first or next((code for code in codes if code), 0)

    def _start(self, number: int, address: str) -> subprocess.Popen:
        options = self.options
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(options.processes),
            "JAX_PROCESS_ID": str(number),
        }
        if options.processes == 1:
            environment = dict(os.environ)
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            flag = f"--xla_force_host_platform_device_count={options.devices}"
            environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        else:
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
            all_gpus = gpus.split(",") if gpus else [str(i) for i in range(options.processes * options.devices)]
            mine = all_gpus[number * options.devices : (number + 1) * options.devices]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return subprocess.Popen([*shlex.split(options.jaxllm), *self.arguments], env=environment)

    def _wait_for_first(self) -> int:
        """The code of the first process that fails; 0 where all end well."""
        while True:
            codes = [child.poll() for child in self.children]  # of each: one that is stopped hides no other
            failed = [code for code in codes if code]
            if failed:
                return failed[0]
            if None not in codes:
                return 0
            time.sleep(0.05)

    def _end_the_others(self) -> None:
        """They end by themselves, for they notice; one that hangs or is stopped does not."""
        end = time.monotonic() + self.options.grace
        while time.monotonic() < end and any(child.poll() is None for child in self.children):
            time.sleep(0.05)
        for child in self.children:
            if child.poll() is None:
                child.kill()

    def _pass_on(self, number: int, frame: object) -> None:
        self.told_to_stop = True
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    def _newest_checkpoint(self) -> int | None:
        joined = " ".join(self.arguments).replace("--workdir=", "--workdir ").split()
        if "--workdir" not in joined[:-1]:
            return None
        folder = Path(joined[joined.index("--workdir") + 1]) / "checkpoints"
        steps = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
        return max(steps, default=None)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
