"""What ends a command: the user's mistake gets one or two clear lines and exit code 2, ours gets a traceback.

Of a run that ended with a code of 64 or more, starting the same command again may help, and a launcher does.
"""

import difflib
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

from jaxllm.remote.place import with_addresses

DONE = 0
STOPPED = 1  # for a reason that would come again: the gradient stayed non-finite, replicas differ
MISTAKE = 2  # the user's
CRASHED = 70  # a traceback: our mistake, or a device's or a library's failure
PREEMPTED = 75  # a signal came and the run was saved
LOST = 76  # another process is gone, or nothing moves any more
RESTARTABLE = 64
LONGEST_WORD = 400  # characters of a message; a value may be a whole file on one line


class UserError(Exception):
    """A mistake the user can mend. The message names the value, the rule and the nearest way out."""

    def __init__(self, message: str):
        super().__init__(re.sub(rf"\S{{{LONGEST_WORD},}}", _shortened, with_addresses(message)))


def _shortened(word: re.Match[str]) -> str:
    return f"{word[0][: LONGEST_WORD // 2]}…{word[0][-LONGEST_WORD // 4 :]}"


class Lost(Exception):
    """What a run needs is gone by no mistake of its own: another process, a device, a file system."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest choice, or else all of them."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Choose from: {', '.join(choices)}."


def file_line(source: Path, error: BaseException) -> str:
    """file:line of an error raised by a Python file of the user's: the deepest line that is the file's own."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(source)]
    if isinstance(error, SyntaxError) and error.filename == str(source):
        lines = [error.lineno]
    return f"{source}:{lines[-1]}" if lines else str(source)
