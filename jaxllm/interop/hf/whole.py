"""Folders that are there as a whole or not at all."""

import contextlib
import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from jaxllm.errors import UserError
from jaxllm.remote.storage import refuse_remote


@contextlib.contextmanager
def whole_or_nothing(target: Path, flag: str = "--to") -> Iterator[Path]:
    """A folder beside `target` to write into: renamed to it at the end, removed when anything fails before.

    `flag` is how the user gave `target`.

    Raises:
      UserError: `target` exists, or its place cannot be written.
    """
    refuse_remote(str(target), flag)
    if target.exists() or target.is_symlink():
        raise UserError(f"{flag} {target} exists. Give a new folder, or remove it first.")
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    parents = [folder for folder in target.parents if not folder.exists()]
    try:
        with _terminated_is_raised():
            partial.mkdir(parents=True)
            yield partial
            partial.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{flag} {target}: no space left on the disk; nothing was written.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"{flag} {target}: the folder cannot be written ({error.strerror}).") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in parents:
            with contextlib.suppress(OSError):  # not there, or not empty: `target` is in it
                folder.rmdir()


@contextlib.contextmanager
def _terminated_is_raised() -> Iterator[None]:
    """SIGTERM ends the program by an exception, so that what is half written is removed."""

    def stop(number: int, _: Any) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
