"""Where the checkpoints of a run lie, STEP by STEP, and when one is whole there: on a disk, or in a bucket.

On a disk a checkpoint is written beside its place and renamed when it is whole, so a number for a name says that it is.
An object store renames nothing: there it is written in its place, and whole once it holds `commit_success.txt`, which
Orbax writes last. What is to go loses that first. One that was copied from a disk has none, but a list of its files,
which tells whether all came along (train/checkpoint/files.py).
"""

import contextlib
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import orbax.checkpoint as ocp
from etils import epath

from jaxllm.remote.place import address, address_of
from jaxllm.remote.storage import as_os_error, filesystem
from jaxllm.train.checkpoint.s3 import teach_orbax_s3

UNFINISHED = ".orbax-checkpoint-tmp"  # of one that Orbax is writing, or was when it was killed
REMOVED = ".removed"  # suffix of a checkpoint on its way out
COMMITTED = "commit_success.txt"  # of a whole one in a bucket
FILES = "files.json"  # the list of its files, written once it is whole


class Place(Protocol):
    """The folder `path` with the checkpoints of one run. What changes it is called in the first process alone."""

    path: epath.Path
    commits_by: type | None  # how Orbax says that one is whole; None: as it does by itself

    def steps(self) -> list[int]:
        """Of the whole ones, ascending."""
        ...

    def free_bytes(self) -> float:
        """How much more it takes."""
        ...

    def make_way(self, step: int) -> None:
        """Makes it ready for a save of `step`."""
        ...

    def clean_up(self) -> None:
        """Removes what interrupted saves and removals left behind."""
        ...

    def remove_unfinished(self, step: int) -> None:
        """Removes what a failed save of `step` left behind."""
        ...

    def remove(self, steps: Sequence[int]) -> threading.Thread:
        """These are whole no longer when it returns, and gone when the thread ends."""
        ...

    def set_aside(self, step: int, suffix: str) -> None:
        """Moves it to STEP with a suffix."""
        ...

    def sizes(self, step: int) -> dict[str, int]:
        """Bytes of each file in it, by its path there."""
        ...

    def read(self, step: int, names: Sequence[str]) -> Mapping[str, bytes]:
        """What is in these files of it."""
        ...

    def write(self, step: int, name: str, data: bytes) -> None:
        """Writes a file of it, whole or not at all."""
        ...


def place_of(directory: Path) -> Place:
    """The place that a folder is, or for which it stands (jaxllm/remote/place.py)."""
    url = address(directory) or address_of(directory)
    return InBucket(url) if url else OnDisk(directory.absolute())


class OnDisk:
    """A folder of a file system."""

    commits_by = None

    def __init__(self, path: Path):
        self._path, self.path = path, epath.Path(path)

    def steps(self) -> list[int]:
        if not self._path.is_dir():
            return []
        return sorted(int(path.name) for path in self._path.iterdir() if path.name.isdecimal())

    def free_bytes(self) -> float:
        return shutil.disk_usage(self._path).free

    def make_way(self, step: int) -> None:
        self._path.mkdir(parents=True, exist_ok=True)

    def clean_up(self) -> None:
        self._remove(f"*{UNFINISHED}*", f"*{REMOVED}")

    def remove_unfinished(self, step: int) -> None:
        self._remove(f"{step}{UNFINISHED}*")

    def remove(self, steps: Sequence[int]) -> threading.Thread:
        renamed = [(self._path / str(step)).rename(self._path / f"{step}{REMOVED}") for step in steps]
        return _in_thread(lambda: [shutil.rmtree(path, ignore_errors=True) for path in renamed])

    def set_aside(self, step: int, suffix: str) -> None:
        target = self._path / f"{step}{suffix}"
        shutil.rmtree(target, ignore_errors=True)
        (self._path / str(step)).rename(target)

    def sizes(self, step: int) -> dict[str, int]:
        folder = self._path / str(step)
        return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}

    def read(self, step: int, names: Sequence[str]) -> Mapping[str, bytes]:
        return {name: (self._path / str(step) / name).read_bytes() for name in names}

    def write(self, step: int, name: str, data: bytes) -> None:
        new = self._path / str(step) / f"{name}.new"
        new.write_bytes(data)
        new.replace(new.with_name(name))

    def _remove(self, *patterns: str) -> None:
        for path in [path for pattern in patterns for path in self._path.glob(pattern)]:
            shutil.rmtree(path, ignore_errors=True)


class InBucket:
    """A prefix in an object store."""

    commits_by = ocp.path.atomicity.CommitFileTemporaryPath

    def __init__(self, url: str):
        self._url, self.path, self._store = url, epath.Path(url), filesystem(url)
        if url.startswith("s3:"):
            teach_orbax_s3()

    def steps(self) -> list[int]:
        with as_os_error():
            return [step for step in self._all_steps() if any(map(self._store.exists, self._marks(step)))]

    def free_bytes(self) -> float:
        return float("inf")

    def make_way(self, step: int) -> None:
        self.remove_unfinished(step)

    def clean_up(self) -> None:
        whole = self.steps()
        for step in self._all_steps():
            if step not in whole:
                self._remove(str(step))

    def remove_unfinished(self, step: int) -> None:
        if step not in self.steps():
            self._remove(str(step))

    def remove(self, steps: Sequence[int]) -> threading.Thread:
        with as_os_error():
            for mark in [mark for step in steps for mark in self._marks(step)]:
                with contextlib.suppress(FileNotFoundError):
                    self._store.rm_file(mark)

        def remove() -> None:
            for step in steps:
                with contextlib.suppress(OSError):  # the next start of the run finds it
                    self._remove(str(step))

        return _in_thread(remove)

    def set_aside(self, step: int, suffix: str) -> None:
        self._remove(f"{step}{suffix}")
        with as_os_error():
            for name in self.sizes(step):
                self._store.cp_file(f"{self._url}/{step}/{name}", f"{self._url}/{step}{suffix}/{name}")
        self.remove([step]).join()

    def sizes(self, step: int) -> dict[str, int]:
        with as_os_error():
            found = self._store.find(f"{self._url}/{step}", detail=True)
        return {self._name(step, path): int(entry["size"]) for path, entry in found.items()}

    def read(self, step: int, names: Sequence[str]) -> Mapping[str, bytes]:
        with as_os_error():
            found = self._store.cat([f"{self._url}/{step}/{name}" for name in names]) if names else {}
        return {self._name(step, path): data for path, data in found.items()}

    def write(self, step: int, name: str, data: bytes) -> None:
        with as_os_error():
            self._store.pipe_file(f"{self._url}/{step}/{name}", data)

    def _name(self, step: int, path: str) -> str:
        """That of a file of a checkpoint: fsspec gives a path from its bucket on."""
        return path.removeprefix(f"{self._url.partition('://')[2]}/{step}/")

    def _marks(self, step: int) -> list[str]:
        """Files one of which only a whole checkpoint has."""
        return [f"{self._url}/{step}/{name}" for name in (COMMITTED, FILES)]

    def _all_steps(self) -> list[int]:
        """Whole or not."""
        with as_os_error(), contextlib.suppress(FileNotFoundError):
            names = (name.rstrip("/").rpartition("/")[2] for name in self._store.ls(self._url, detail=False))
            return sorted({int(name) for name in names if name.isdecimal()})
        return []

    def _remove(self, name: str) -> None:
        with as_os_error(), contextlib.suppress(FileNotFoundError):
            self._store.rm(f"{self._url}/{name}", recursive=True)


def _in_thread(remove: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=remove, name="checkpoint_removal")
    thread.start()
    return thread
