"""What campaigns of mutated input share: bounds of time and memory, and what counts as a clear refusal.

Each input is used as a run uses it. Good outcomes are that it works, or a UserError of a few lines that names a field,
a flag or a file; anything else has failed.
"""

import collections
import contextlib
import io
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.errors import UserError

SECONDS = 45  # that a case may take; a healthy one takes a few
BYTES = 6 << 30  # that a case may allocate; a healthy one takes a few hundred megabytes
LONGEST_MESSAGE = 1500  # characters, in at most LINES
LINES = 8
NAMES_A_FIELD = re.compile(r"config\.|config:|--\w")


class Outcome(NamedTuple):
    """What became of a case."""

    kind: str  # valid | refused | failed
    said: str = ""


class TookTooLong(BaseException):
    """Raised in the middle of whatever takes so long."""


def outcome_of(use: Callable[[], Any], folder: Path) -> Outcome:
    """What becomes of `use`, which reads files of `folder`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), within_bounds():
            use()
        return Outcome("valid")
    except UserError as error:
        fault = fault_of(str(error), folder)
        return Outcome("failed", f"{fault}: {error}") if fault else Outcome("refused", str(error))
    except TookTooLong as error:
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        where = " < ".join(f"{frame.name} {Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        return Outcome("failed", f"took more than {SECONDS} s: {where}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        return Outcome("failed", "".join(traceback.format_exception(error)[-8:]))


def fault_of(message: str, folder: Path) -> str:
    """What is wrong with a message to the user; "" where nothing is."""
    if len(message.splitlines()) > LINES or len(message) > LONGEST_MESSAGE:
        return "a long message"
    if "Traceback" in message or re.search(r'File ".*", line \d', message):
        return "a traceback in the message"
    if not NAMES_A_FIELD.search(message) and str(folder) not in message:
        return "no field, no flag and no file in the message"
    return ""


@contextlib.contextmanager
def within_bounds() -> Iterator[None]:
    """Ends what takes too long, and what allocates too much, by an exception."""

    def too_long(*_: Any) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, too_long)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + BYTES, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def data_bytes() -> int:
    """What of this process's memory counts against RLIMIT_DATA."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))


class Campaign:
    """Counts outcomes, and prints each failure with what shows it again."""

    def __init__(self) -> None:
        self.kinds: collections.Counter[str] = collections.Counter()
        self.told: collections.Counter[str] = collections.Counter()
        self.slowest = (0.0, "")
        self._started = time.perf_counter()
        sys.stdout.reconfigure(errors="backslashreplace")  # half a surrogate pair cannot be printed

    def timed(self, name: str, use: Callable[[], Outcome]) -> Outcome:
        print(f"\r{name} ", end="", file=sys.stderr, flush=True)
        begun = time.perf_counter()
        outcome = use()
        self.slowest = max(self.slowest, (time.perf_counter() - begun, name))
        return outcome

    def add(self, outcome: Outcome, again: str, verbose: bool = False) -> None:
        self.kinds[outcome.kind] += 1
        if outcome.kind == "refused":
            self.told[summary(outcome.said)] += 1
        if outcome.kind == "failed" or verbose:
            print(f"\n--- {outcome.kind}: {again}\n{outcome.said}", flush=True)

    def finish(self) -> int:
        """Prints the table. Returns the exit code."""
        print(f"\n{'times':>5}  what was said")
        for message, times in self.told.most_common():
            print(f"{times:>5}  {message}")
        trained = f" (of them {self.kinds['trained']} trained)" if self.kinds["trained"] else ""
        print(
            f"{sum(self.kinds[kind] for kind in ('valid', 'refused', 'failed'))} cases in "
            f"{time.perf_counter() - self._started:.0f} s: {self.kinds['valid']} valid{trained}, "
            f"{self.kinds['refused']} refused in {len(self.told)} ways, {self.kinds['failed']} failed. "
            f"Slowest: {self.slowest[1]}, {self.slowest[0]:.1f} s."
        )
        return 1 if self.kinds["failed"] else 0


def summary(message: str) -> str:
    """A message without its values, to count by."""
    return re.sub(r"'[^']*'|/\S+|[-\d.]*\d", "…", " ".join(message.split()))[:110]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
