"""The pipeline schedules, each a function of stages, microbatches and virtual stages that returns a table.

A schedule of one's own is such a function in a Python file, named in the config: `config.layout.schedule=FILE.py:NAME`.
It builds its table with `place` (an order of tasks for each stage) or `from_rows` (the table, drawn).
"""

import functools
from collections.abc import Callable

from jaxllm.errors import UserError, did_you_mean
from jaxllm.layout.named import call_named, is_named
from jaxllm.layout.schedule_check import check_schedule, check_shape
from jaxllm.layout.schedule_table import FORWARD_ONLY, Action, Schedule, Task, from_rows, place

__all__ = [
    "SCHEDULES",
    "Action",
    "Schedule",
    "Task",
    "check_name",
    "forward_only",
    "from_rows",
    "gpipe",
    "interleaved",
    "make_schedule",
    "one_f_one_b",
    "one_f_one_b_aligned",
    "place",
    "zero_bubble",
]


def gpipe(num_stages: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019): every microbatch is live at the turn.

    Bubble (P-1)/(M+P-1) of the step for P stages and M microbatches.
    """
    _no_virtual_stages("gpipe", virtual_stages)
    order = [Task(Action.FORWARD, m) for m in range(num_microbatches)]
    order += [Task(Action.BACKWARD, m) for m in range(num_microbatches)]
    return place("gpipe", [order] * num_stages, num_microbatches)


def one_f_one_b(num_stages: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
    """A backward as soon as there can be one, then forwards and backwards in turn (PipeDream-flush, DAPPLE).

    The bubble of GPipe, but stage s keeps at most P - s microbatches.
    """
    _no_virtual_stages("1f1b", virtual_stages)
    forwards = [Task(Action.FORWARD, m) for m in range(num_microbatches)]
    backwards = [Task(Action.BACKWARD, m) for m in range(num_microbatches)]
    orders = [_in_turn(forwards, backwards, num_stages - stage - 1) for stage in range(num_stages)]
    return place("1f1b", orders, num_microbatches)


def one_f_one_b_aligned(num_stages: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
    """1F1B for stages that run in lock step: all of them do forwards in even ticks, and backwards in odd ones.

    Every tick ends in an exchange, so it takes as long as its dearest action. In plain 1F1B a tick has forwards on some
    stages and backwards on others, and costs a backward. Here the step takes (M+P-1)(F+B), as 1F1B does when stages
    wait for nothing but their inputs. The price is that up to 2(P-s)-1 microbatches are live on stage s.
    """
    _no_virtual_stages("1f1b_aligned", virtual_stages)
    stages, turn = range(num_stages), 2 * (num_stages - 1)
    rows = [["."] * (2 * (num_microbatches + turn)) for _ in stages]
    for stage in stages:
        for m in range(num_microbatches):
            rows[stage][2 * (m + stage)] = f"F{m}"
            rows[stage][2 * (m + turn - stage) + 1] = f"B{m}"
    return from_rows("1f1b_aligned", [" ".join(row) for row in rows], num_microbatches)


def interleaved(num_stages: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    """1F1B with v virtual stages on each stage, in groups of P microbatches (Narayanan et al. 2021, Megatron-LM).

    Bubble (P-1)/(vM+P-1) of the step. Counted in layers, the first stage keeps 1 + (P-1)/(Pv) times what 1F1B keeps
    there; of inputs, one for each virtual stage, a stage keeps at most P(v+1)-2.
    """
    if virtual_stages < 2:
        raise UserError(
            f"config.layout.virtual_stages={virtual_stages}: the schedule 'interleaved' needs 2 or more. "
            "Set --config.layout.virtual_stages=2 or --config.layout.schedule=1f1b."
        )
    if num_microbatches % num_stages:
        below = num_microbatches // num_stages * num_stages
        nearest = " or ".join(str(n) for n in (below, below + num_stages) if n)
        raise UserError(
            f"config.layout.num_microbatches={num_microbatches}: the schedule 'interleaved' needs a multiple of the "
            f"{num_stages} pipeline stages. Nearest: {nearest}."
        )
    chunks = _in_groups(num_stages, num_microbatches, virtual_stages)
    forwards = [Task(Action.FORWARD, m, v) for m, v in chunks]
    backwards = [Task(Action.BACKWARD, m, virtual_stages - 1 - v) for m, v in chunks]
    ahead = [2 * (num_stages - stage - 1) + (virtual_stages - 1) * num_stages for stage in range(num_stages)]
    orders = [_in_turn(forwards, backwards, n) for n in ahead]
    return place("interleaved", orders, num_microbatches, virtual_stages)


def zero_bubble(num_stages: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
    """ZB-H1 (Qi et al. 2023): 1F1B with the weight gradients put off to fill the bubble, at 1F1B's memory.

    Stage s starts as in 1F1B and puts the weight gradient of a microbatch off until s more input gradients are done, so
    that every stage keeps up to P microbatches. Bubble (P-1)(F+B-W) for M >= P, where F, B and W are the times of a
    forward, an input gradient and a weight gradient, and W is the shortest.
    """
    _no_virtual_stages("zero_bubble", virtual_stages)
    forwards = [Task(Action.FORWARD, m) for m in range(num_microbatches)]
    orders = []
    for stage in range(num_stages):
        backwards = []
        for m in range(num_microbatches + stage):
            halves = [Task(Action.BACKWARD_INPUT, m)] if m < num_microbatches else []
            halves += [Task(Action.BACKWARD_WEIGHT, m - stage)] if m >= stage else []
            backwards.append(halves)
        ahead = num_stages - stage - 1
        in_turn = _in_turn([[task] for task in forwards], backwards, ahead)
        orders.append([task for tasks in in_turn for task in tasks])
    return place("zero_bubble", orders, num_microbatches)


def forward_only(num_stages: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
    """Forwards only, for evaluation."""
    order = [Task(Action.FORWARD, m, v) for m, v in _in_groups(num_stages, num_microbatches, virtual_stages)]
    return place(FORWARD_ONLY, [order] * num_stages, num_microbatches, virtual_stages)


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "1f1b_aligned": one_f_one_b_aligned,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
}


@functools.lru_cache
def make_schedule(name: str, num_stages: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
    """The checked table of a schedule: a name of SCHEDULES, "forward_only", or a user's "FILE.py:NAME".

    Raises:
      UserError: an unknown name, stages or microbatches that the schedule cannot take, an error in the user's file
        (file:line), or a table that is wrong (tick, stage and microbatch).
    """
    arguments = (num_stages, num_microbatches, virtual_stages)
    if is_named(name):
        schedule = call_named("config.layout.schedule", name, *arguments)
        _check_returned(name, schedule, *arguments)
    elif name == FORWARD_ONLY:
        schedule = forward_only(*arguments)
    else:
        check_name(name)
        schedule = SCHEDULES[name](*arguments)
    check_schedule(schedule)
    return schedule


def check_name(name: str) -> None:
    """Whether a config may name this schedule for training. Raises a UserError if not."""
    if not is_named(name) and name not in SCHEDULES:
        raise UserError(
            f"config.layout.schedule={name!r} is no schedule. {did_you_mean(name, SCHEDULES)} "
            "One of your own is FILE.py:NAME."
        )


def _check_returned(name: str, schedule: object, num_stages: int, num_microbatches: int, virtual_stages: int) -> None:
    """Whether a user's function returned a schedule, and for what it was asked for."""
    if not isinstance(schedule, Schedule):
        raise UserError(
            f"config.layout.schedule={name} returned {schedule!r}. It must return a Schedule: "
            "build one with `place` or `from_rows` of jaxllm.layout.schedules."
        )
    check_shape(schedule)
    if schedule.name == FORWARD_ONLY:
        raise UserError(
            f"config.layout.schedule={name} returned a schedule named '{FORWARD_ONLY}', a name that is for evaluation. "
            "Give it another."
        )
    asked = {"num_stages": num_stages, "num_microbatches": num_microbatches, "num_virtual_stages": virtual_stages}
    for field, size in asked.items():
        if getattr(schedule, field) != size:
            raise UserError(
                f"config.layout.schedule={name} returned a schedule of {field}={getattr(schedule, field)}, "
                f"but was asked for {size}."
            )


def _no_virtual_stages(name: str, virtual_stages: int) -> None:
    if virtual_stages != 1:
        raise UserError(
            f"config.layout.virtual_stages={virtual_stages}: the schedule '{name}' has no virtual stages. "
            "Set --config.layout.virtual_stages=1 or --config.layout.schedule=interleaved."
        )


def _in_turn(forwards: list, backwards: list, ahead: int) -> list:
    """`ahead` forwards, then a forward and a backward in turn, then the backwards that are left."""
    ahead = min(ahead, len(forwards))
    order = list(forwards[:ahead])
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - ahead :]


def _in_groups(num_stages: int, num_microbatches: int, virtual_stages: int) -> list[tuple[int, int]]:
    """(microbatch, virtual stage): groups of as many microbatches as stages run through all virtual stages in turn."""
    groups = [range(m, min(m + num_stages, num_microbatches)) for m in range(0, num_microbatches, num_stages)]
    return [(m, v) for group in groups for v in range(virtual_stages) for m in group]
