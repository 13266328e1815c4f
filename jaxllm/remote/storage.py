"""Object stores, through fsspec: gs:// by gcsfs, s3:// by s3fs, with the credentials that those find."""

import contextlib
import errno
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from jaxllm.errors import UserError
from jaxllm.remote.place import SCHEMES, address

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
CREDENTIALS = {
    "gs": "Log in (gcloud auth application-default login) or set GOOGLE_APPLICATION_CREDENTIALS.",
    "s3": "Log in (aws configure) or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
}
_LIBRARIES = ("gcsfs", "s3fs", "botocore", "aiobotocore", "aiohttp", "google", "requests", "urllib3", "fsspec")
_REFUSED = (
    "credential",
    "access denied",
    "accessdenied",
    "forbidden",
    "unauthorized",
    "anonymous caller",
    "permission",
)


def filesystem(url: str) -> "AbstractFileSystem":
    """The file system of an address in a bucket.

    Raises:
      UserError: the package that reaches it is not installed.
    """
    import fsspec

    scheme = url.partition("://")[0]
    for protocol in ("gs", "gcs", "s3"):  # TensorStore writes beside it: what was listed before may be out of date
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    try:
        return fsspec.filesystem(scheme)
    except ImportError:
        raise UserError(
            f"{url}: {scheme}:// needs the package {PACKAGES[scheme]}, which is not installed: "
            "pip install 'jaxllm[remote]'."
        ) from None


def is_remote(path: str, what: str = "") -> bool:
    """Whether `path` is an address in a bucket, and not local.

    Raises:
      UserError: it has a scheme of another kind.
    """
    if address(path):
        return True
    scheme, separator, _ = path.partition("://")
    if separator and scheme.isidentifier():
        known = " and ".join(f"{name}://" for name in SCHEMES)
        raise UserError(
            f"{what + ' ' if what else ''}{path}: {scheme}:// cannot be read or written; {known} can, and local paths."
        )
    return False


def refuse_remote(path: str, what: str, way_out: str = "Give a local path.") -> None:
    """Raises a UserError where `path` is not local."""
    if is_remote(path, what):
        raise UserError(f"{what} {path} is in a bucket. {way_out}")


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Whatever the library of an object store raises comes out as a UserError: no access, no bucket, no network.

    A FileNotFoundError comes out as it is where the bucket is there.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        _refuse_missing_bucket(url)
        raise
    except Exception as error:
        raise _explained(url, error) from error


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """Whatever the library of an object store raises comes out as an OSError with a number, as a disk's would."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(errno.EIO, _first_line(error)) from error
    except Exception as error:
        if not of_storage(error):
            raise
        raise OSError(errno.EIO, _first_line(error)) from error


def of_storage(error: BaseException) -> bool:
    """Whether a library that reaches an object store raised this, of a kind of its own."""
    return type(error).__module__.partition(".")[0] in _LIBRARIES


def check_writable(url: str) -> None:
    """Writes a small object and removes it.

    Raises:
      UserError: no such bucket, or no right to write there.
    """
    store, probe = filesystem(url), f"{url}/.write_check"
    with contextlib.suppress(FileNotFoundError), reaching(url):  # another process may have removed it
        store.pipe_file(probe, b"")
        store.rm_file(probe)


@dataclass(frozen=True)
class RemoteFile:
    """A file in a bucket as it was listed, read as a `Path` is."""

    url: str
    size: int
    version: str  # changes when the content does

    @classmethod
    def listed(cls, scheme: str, entry: dict[str, Any]) -> "RemoteFile":
        """Of an entry of a listing with details."""
        version = next((str(entry[key]) for key in ("ETag", "etag", "generation") if entry.get(key)), "")
        return cls(f"{scheme}://{entry['name']}", int(entry["size"]), version)

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix

    def open(self, mode: str = "rb") -> BinaryIO:
        """For reading from any place.

        Raises:
          OSError: it cannot be read.
        """
        assert mode == "rb"
        with as_os_error():
            return io.BufferedReader(_Numbered(filesystem(self.url).open(self.url, "rb")), 1 << 20)

    def __str__(self) -> str:
        return self.url


class _Numbered(io.RawIOBase):
    """A file of fsspec whose failures are OSErrors."""

    def __init__(self, file: Any):
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        with as_os_error():
            return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _refuse_missing_bucket(url: str) -> None:
    bucket = "/".join(url.split("/")[:3])
    try:
        filesystem(url).ls(bucket)
    except FileNotFoundError:
        raise UserError(f"{url}: there is no bucket {bucket}. Make it, or mend the name.") from None
    except Exception as error:
        raise _explained(url, error) from error


def _explained(url: str, error: Exception) -> UserError:
    line, scheme = _first_line(error), url.partition("://")[0]
    if isinstance(error, PermissionError) or any(word in line.lower() for word in _REFUSED):
        return UserError(f"{url}: no access ({line}). {CREDENTIALS[scheme]}")
    return UserError(f"{url} cannot be reached: {line}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}"
