"""What Orbax says where reading or writing fails, sorted: a full disk, damage, and what need not be told."""

import errno
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from jaxllm.remote.storage import of_storage

# What TensorStore and object stores say of a storage that fails for a while.
_OUT_OF_REACH = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED")
_STORAGE = (*_OUT_OF_REACH, "Input/output error", "Stale file handle")


def write_failure(error: BaseException) -> str | None:
    """Why the storage took no more, where that was the reason."""
    for seen in _causes(error):
        number = getattr(seen, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(seen):
            return "no space left on the disk"
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"the folder is not writable: {seen}"
        words = any(word in str(seen) for word in _STORAGE)
        if number is not None or isinstance(seen, TimeoutError) or words or of_storage(seen):
            return first_line(seen)
    return None


def out_of_reach(error: BaseException) -> bool:
    """Whether reading failed for a storage that does not answer now: what is there may be whole."""
    causes = list(_causes(error))
    if any(isinstance(cause, FileNotFoundError) for cause in causes):
        return False
    return any(of_storage(cause) or any(word in str(cause) for word in _OUT_OF_REACH) for cause in causes)


def tells_damage(error: Exception) -> bool:
    """Whether reading failed for what is on the disk. Orbax wraps what TensorStore says of a shard in an Exception."""
    cause = error.__cause__ if type(error) is Exception else error
    return isinstance(cause, (OSError, ValueError, KeyError))


def hush_orbax() -> None:
    """Keeps Orbax's own log off the terminal: what fails is raised, once.

    It logs through absl, with tracebacks; after one failed read or write asyncio tells of every task beside it, Python
    of those never begun, and TensorStore reports to an event loop that is closed.
    """
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if _is_news not in logger.filters:
            logger.addFilter(_is_news)
    warnings.filterwarnings("ignore", message=r"coroutine '.*' was never awaited", category=RuntimeWarning)
    previous = sys.unraisablehook
    if getattr(previous, "__name__", "") == "without_closed_loops":
        return

    def without_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = without_closed_loops


def _is_news(record: logging.LogRecord) -> bool:
    of_orbax = "orbax" in record.pathname if record.name == "absl" else "orbax" in record.getMessage()
    return not of_orbax


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what led to it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:160]}"
