"""Rewards by functions of the user's: FILE.py:NAME, called as TRL calls them.

    def is_right(prompts, completions, answer, **columns):  # a list for each field of the prompts' records
        return [float(text.strip() == right) for text, right in zip(completions, answer)]

`prompts` and `completions` are lists of texts; a function takes the fields that it names, or all by `**columns`. It
returns a number for each answer.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.errors import UserError
from jaxllm.layout.named import call_named, load_named

FIELD = "config.rollout.rewards"


class RewardFunction(NamedTuple):
    """A function of the user's and what its rewards count."""

    reference: str  # FILE.py:NAME
    weight: float

    @property
    def name(self) -> str:
        return self.reference.rpartition(":")[2]


class Answered(NamedTuple):
    """Answers that are to be judged."""

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list[Any]]  # the other fields of the prompts' records

    def take(self, rows: Sequence[int]) -> "Answered":
        pick = lambda values: [values[row] for row in rows]  # noqa: E731
        return Answered(
            pick(self.prompts), pick(self.completions), {name: pick(values) for name, values in self.columns.items()}
        )


def parse_rewards(value: str) -> list[RewardFunction]:
    """The functions of `config.rollout.rewards`, "rewards.py:is_right=1.0,rewards.py:is_short=0.2"; no weight is 1.

    Raises:
      UserError: an entry that is no FILE.py:NAME, a weight that is no number, no such file or function.
    """
    functions = []
    for entry in filter(None, map(str.strip, value.split(","))):
        reference, _, weight = entry.partition("=")
        if ".py:" not in reference:
            raise UserError(f"{FIELD}: {entry!r} must be FILE.py:NAME, or FILE.py:NAME=WEIGHT.")
        try:
            number = float(weight or 1)
        except ValueError:
            raise UserError(f"{FIELD}: the weight of {reference} must be a number, not {weight!r}.") from None
        load_named(FIELD, reference)
        functions.append(RewardFunction(reference, number))
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise UserError(f"{FIELD}={value}: two functions have one name. Metrics are named by it: rename one.")
    return functions


def call_reward(function: RewardFunction, answered: Answered) -> np.ndarray:
    """What the function says of each answer: float32 [answers].

    Raises:
      UserError: it raises, returns as many numbers as there are not answers, or one that is no finite number; with the
        prompt and the answer.
    """
    call = functools.partial(_call, function)
    try:
        returned = call(answered)
    except UserError as error:
        raise UserError(f"{error}{_first_that_fails(call, answered)}") from error
    rewards = list(returned) if np.ndim(returned) == 1 or isinstance(returned, (list, tuple)) else returned
    if not isinstance(rewards, list) or len(rewards) != len(answered.completions):
        found = f"{len(rewards)} rewards" if isinstance(rewards, list) else f"{returned!r}"
        raise UserError(
            f"{FIELD}: {function.reference} returned {found} for {len(answered.completions)} answers. It must return a "
            f"list with a number for each.{_told(answered, 0)}"
        )
    for row, reward in enumerate(rewards):
        if not _is_number(reward):
            raise UserError(
                f"{FIELD}: {function.reference} returned {reward!r}, which is no finite number.{_told(answered, row)}"
            )
    return np.array(rewards, np.float32)


def _call(function: RewardFunction, answered: Answered) -> Any:
    """Calls it with the lists that it names, by name."""
    given = {"prompts": answered.prompts, "completions": answered.completions, **answered.columns}
    takes = inspect.signature(load_named(FIELD, function.reference)).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        given = {parameter.name: given[parameter.name] for parameter in takes if parameter.name in given}
    missing = [p.name for p in takes if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [name for name in missing if name not in given]:
        raise UserError(
            f"{FIELD}: {function.reference} takes {missing[0]!r}, which the prompts do not have. There are "
            f"{', '.join(['prompts', 'completions', *answered.columns])}."
        )
    return call_named(FIELD, function.reference, **given)


def _first_that_fails(call: Callable[[Answered], Any], answered: Answered) -> str:
    """The first answer that the function fails on alone; nothing where it fails on none."""
    for row in range(len(answered.completions)):
        try:
            call(answered.take([row]))
        except UserError:
            return _told(answered, row)
    return ""


def _told(answered: Answered, row: int) -> str:
    """The answer of a row, in one line."""
    prompt, completion = (_short(text) for text in (answered.prompts[row], answered.completions[row]))
    return f"\nAnswer {row + 1} of {len(answered.completions)}: prompt {prompt}, answer {completion}"


def _short(text: str, width: int = 120) -> str:
    return repr(text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}")


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, (str, bytes)) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
