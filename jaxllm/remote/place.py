"""Addresses in a bucket, and the folder here that stands for each: gs://bucket/run is COPIES/gs/bucket/run.

A run in a bucket is held twice: its checkpoints are there alone, its small files here too. So all that reads and writes
files works as it does for a local run, and from a folder its address is known.
"""

import atexit
import functools
import re
import shutil
import tempfile
from os import PathLike, fspath
from pathlib import Path

SCHEMES = ("gs", "s3")


def address(path: str | PathLike[str]) -> str | None:
    """The address that `path` is, without a slash at its end; None of a local path.

    A `Path` has lost one of the two slashes: that is mended.
    """
    found = re.match(rf"({'|'.join(SCHEMES)}):/+", fspath(path))
    return f"{found[1]}://{fspath(path)[found.end() :].rstrip('/')}" if found else None


def folder_of(address: str) -> Path:
    """The folder here that stands for an address. It goes with the process."""
    return _copies() / address.replace("://", "/")


def address_of(folder: Path) -> str | None:
    """The address for which a folder here stands; None of any other folder."""
    if not _copies.cache_info().currsize or not folder.absolute().is_relative_to(_copies()):
        return None
    scheme, *rest = folder.absolute().relative_to(_copies()).parts
    return f"{scheme}://{'/'.join(rest)}"


def with_addresses(text: str) -> str:
    """A message in which folders here are called by the addresses for which they stand."""
    if not _copies.cache_info().currsize:
        return text
    return re.sub(rf"{re.escape(str(_copies()))}/(\w+)/", r"\1://", text)


@functools.cache
def _copies() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="jaxllm-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
