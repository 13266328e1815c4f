"""The two kinds of mistakes: the user's gets one or two clear lines and exit code 2, ours gets a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend. The message names the value, the rule and the nearest way out."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest choice, or else all of them."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Choose from: {', '.join(choices)}."
