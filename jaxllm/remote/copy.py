"""What is in a bucket, copied here: the small files of a run, or a tokenizer; and back, of a run that trains.

The checkpoints are never copied: they are read and written where they are.
"""

import contextlib
import functools
import shutil
import sys
import threading
from collections.abc import Iterator
from os import PathLike, fspath
from pathlib import Path

from jaxllm.remote.place import address, address_of, folder_of
from jaxllm.remote.storage import as_os_error, filesystem, is_remote, reaching

NOT_FETCHED = ("checkpoints", "tensorboard", "profile")  # folders of a run that nobody reads from here
PUSH_SECONDS = 60.0  # at most so much of metrics and events is lost with a machine

_pushed: dict[Path, tuple[int, int]] = {}  # the files here as they are in the bucket: time of change, size
_pushing = threading.Lock()


def local_copy(path: str | PathLike[str]) -> Path:
    """`path` where it is local. Of a folder or file in a bucket the copy here, fetched when it is first asked for.

    A folder that is not there yet has an empty copy.

    Raises:
      UserError: no such bucket, no access, no network, an unknown scheme or a package that is missing.
    """
    if not is_remote(fspath(path)):
        return Path(path)
    return _fetched(address(path))


def fresh_copy(path: str | PathLike[str]) -> Path:
    """The same, fetched again: what a run goes on from is what is in the bucket now."""
    if is_remote(fspath(path)):
        _fetched.cache_clear()
        shutil.rmtree(folder_of(address(path)), ignore_errors=True)
    return local_copy(path)


def push(folder: Path) -> None:
    """Brings what changed in the copy of a run into its bucket. Of a local run there is nothing to do.

    Raises:
      OSError: the bucket does not take it.
    """
    url = address_of(folder)
    if url is None:
        return
    with _pushing, as_os_error():
        store = filesystem(url)
        for file in sorted(path for path in folder.rglob("*") if path.suffix != ".new"):
            with contextlib.suppress(FileNotFoundError):  # renamed in the meantime
                if file.is_file() and _pushed.get(file) != (state := _state(file)):
                    store.pipe_file(address_of(file), file.read_bytes())
                    _pushed[file] = state


@contextlib.contextmanager
def pushed_now_and_then(folder: Path) -> Iterator[None]:
    """Meanwhile brings what changes in the copy of a run into its bucket, and at the end.

    A bucket that fails for a while hinders nothing: the next time more is brought.
    """
    if address_of(folder) is None:
        yield
        return
    ended = threading.Event()

    def push_on() -> None:
        while not ended.wait(PUSH_SECONDS):
            with contextlib.suppress(OSError):
                push(folder)

    thread = threading.Thread(target=push_on, name="push", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        try:
            push(folder)
        except OSError as error:
            print(f"What was written last did not reach {address_of(folder)}: {error}", file=sys.stderr)


@functools.cache
def _fetched(url: str) -> Path:
    with contextlib.suppress(FileNotFoundError), reaching(url):
        _fetch(url)
    return folder_of(url)


def _fetch(url: str) -> None:
    """Copies a file, or a folder and those in it. What is here stays: it may be newer."""
    store, scheme = filesystem(url), url.partition("://")[0]
    for entry in store.ls(url, detail=True):
        name = f"{scheme}://{entry['name'].rstrip('/')}"
        file = folder_of(name)
        if entry["type"] == "directory":
            if name != url and file.name not in NOT_FETCHED:  # some list an empty object for the folder itself
                _fetch(name)
        elif not entry["name"].endswith("/") and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(store.cat_file(name))
            _pushed[file] = _state(file)


def _state(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size
