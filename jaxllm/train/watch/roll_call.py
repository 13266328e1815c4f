"""What each process tells all others at every step: that it must stop, that its save failed, how it spent its time.

It goes along with the step as a small array, gathered on the devices, and is read with the step's metrics. So all
processes hear the same at the same step, nobody waits, and no message can be missed or overtake a step.
"""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.layout.mesh import in_order


class Told(NamedTuple):
    """By one process, at one step."""

    process: int = 0
    stop: bool = False  # a signal came
    save_failed: bool = False
    data_seconds: float = 0.0  # it waited for its batch
    host_seconds: float = 0.0  # it spent otherwise, its devices not waited for


class RollCall:
    """The roll calls of a run, one a step, in the same order in all processes."""

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._sharding = NamedSharding(mesh, P(mesh.axis_names, None))
        self._shape = (mesh.size, len(Told._fields))
        self._gather = jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, P()))

    def call(self, told: Told) -> jax.Array | np.ndarray:
        """Starts to gather what the processes have to tell; `heard` reads it."""
        row = np.array([told], np.float32)
        if self._alone:
            return row
        of_device = lambda index: row  # noqa: E731
        return in_order(self._gather(jax.make_array_from_callback(self._shape, self._sharding, of_device)))

    @staticmethod
    def heard(called: jax.Array | np.ndarray) -> list[Told]:
        """What all processes told, by process."""
        rows = {int(row[0]): row for row in np.asarray(called)}
        return [Told(p, bool(row[1]), bool(row[2]), *map(float, row[3:])) for p, row in sorted(rows.items())]


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All wait for each other, and for what the devices do."""
    from jax.experimental import multihost_utils

    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())
