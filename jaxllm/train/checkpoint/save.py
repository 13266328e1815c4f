"""One save under way: Orbax writes it in the background, and all processes learn together whether it is on disk.

A process that cannot write would leave the others waiting in Orbax's barriers for twenty minutes. So here they wait for
each other in a way that can be called off.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxllm.train.watch.roll_call import any_process

POLL_SECONDS = 0.05
COMMIT_SECONDS = 1200  # for a save as a whole


class CalledOff(Exception):
    """Another process could not write its part."""


class Save:
    """A save of `folder`. Every process makes one, and asks the same of it in the same order.

    Args:
      number: of saves before it in this run.
      finished: called in the first process once the checkpoint is whole, in the background.
      commits_by: as that of the checkpoint's place (jaxllm/train/checkpoint/places.py).
    """

    def __init__(
        self,
        handler: ocp.CompositeCheckpointHandler,
        folder: epath.Path,
        number: int,
        finished: Callable[[], None],
        commits_by: type | None = None,
    ):
        self.folder, self._number, self.seconds = folder, number, 0.0
        self._finished, self._begun = finished, time.monotonic()
        self._off = threading.Event()
        self.error: BaseException | None = None
        options = ocp.options.AsyncOptions(
            timeout_secs=COMMIT_SECONDS,
            barrier_sync_fn=self._barrier,
            # Else its threads would wait for folders that a full disk never takes, and keep the process from ending.
            create_directories_asynchronously=False,
        )
        # Orbax would write a part in a thread of which no error is heard.
        metadata = ocp.metadata.metadata_store(enable_write=True, blocking_write=True)
        self._orbax = ocp.AsyncCheckpointer(
            handler, async_options=options, checkpoint_metadata_store=metadata, temporary_path_class=commits_by
        )
        self._thread: threading.Thread | None = None

    def start(self, items: Mapping[str, Any]) -> None:
        """Copies the arrays to the host and starts writing them. What goes wrong is kept in `error`."""
        try:
            self._orbax.save(self.folder, args=ocp.args.Composite(**items))
        except Exception as error:
            self.error = error
        else:
            self._thread = threading.Thread(target=self._wait, name="checkpoint_save")
            self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether this process knows that it cannot be written."""
        return self.error is not None

    def wait(self) -> None:
        """Waits until the checkpoint is whole, or it is known in all processes that it never will be.

        Raises:
          Exception: why not, as Orbax says it; CalledOff in the other processes.
        """
        while not any_process(self.failed):
            under_way = self._thread is not None and self._thread.is_alive()
            if not any_process(under_way):
                if any_process(self.failed):  # it ended in between
                    break
                return
            if self._thread is not None:
                self._thread.join(POLL_SECONDS)
        self._call_off()
        raise self.error or CalledOff("another process could not write its part")

    def close(self) -> None:
        """Lets go of Orbax."""
        with contextlib.suppress(Exception):
            self._orbax.close()

    def _wait(self) -> None:
        try:
            self._orbax.wait_until_finished()
            self.seconds = time.monotonic() - self._begun
            if jax.process_index() == 0:
                self._finished()
        except BaseException as error:
            self.error = error

    def _call_off(self) -> None:
        self._off.set()
        if self._thread is not None and self._thread.is_alive():
            self._orbax.cancel()
            self._thread.join()

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes at a point of the save."""
        from jax._src import distributed  # the one way to reach JAX's key-value store; Orbax takes it too

        client, place = distributed.global_state.client, f"jaxllm/save {self._number}/{key}/"
        client.key_value_set(f"{place}{jax.process_index()}", "here")
        end = time.monotonic() + timeout_ms / 1000
        while len(client.key_value_dir_get(place)) < jax.process_count():
            if self._off.wait(POLL_SECONDS):
                raise CalledOff("another process could not write its part")
            if time.monotonic() > end:
                raise TimeoutError(f"the other processes did not write their parts within {timeout_ms / 1000:.0f} s")
