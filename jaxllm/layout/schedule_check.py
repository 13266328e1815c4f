"""Proves a pipeline schedule right without a device, and tells what it costs.

The proof plays the table tick by tick and looks at the *contents* of every slot of the buffers: each task must find the
value it needs, and nothing may be overwritten that is still to be read.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from jaxllm.errors import UserError
from jaxllm.layout.schedule_buffers import NONE, Buffers, Value, assign_buffers
from jaxllm.layout.schedule_table import (
    FORWARD_ONLY,
    LETTERS,
    SENDS_GRADIENT,
    Action,
    Event,
    Schedule,
    Task,
    brings,
    needs,
)


def check_schedule(schedule: Schedule, buffers: Buffers | None = None) -> None:
    """Proves the table, and its buffers (default: those of `assign_buffers`), right.

    Raises:
      UserError: what is wrong first, with the schedule, tick, stage, microbatch and what was expected: a task on a
        microbatch or virtual stage that there is not; a task done twice or never; one done before what it needs has
        arrived; a slot that holds something else or that is overwritten while it is needed.
    """
    check_shape(schedule)
    _check_order(schedule)
    _check_complete(schedule)
    _check_buffers(schedule, assign_buffers(schedule) if buffers is None else buffers)


def check_shape(schedule: Schedule) -> None:
    """Whether the table is three arrays of integers [tick, stage] with values in range."""
    tables = {"action": len(Action), "microbatch": schedule.num_microbatches}
    tables["virtual_stage"] = schedule.num_virtual_stages
    for name in ("num_microbatches", "num_virtual_stages", "num_slots"):
        size, least = getattr(schedule, name), 0 if name == "num_slots" else 1
        if not isinstance(size, int | np.integer) or size < least:
            raise UserError(f"schedule '{schedule.name}': {name}={size!r}, expected a whole number from {least} on.")
    shape = np.shape(schedule.action)
    if 0 in shape:
        raise UserError(f"schedule '{schedule.name}': the table is empty, expected ticks and stages.")
    for name, size in tables.items():
        table = getattr(schedule, name)
        if not isinstance(table, np.ndarray) or table.dtype.kind not in "iu" or table.ndim != 2 or table.shape != shape:
            raise UserError(
                f"schedule '{schedule.name}': {name} is {_described(table)}, expected a NumPy array of integers "
                "[tick, stage], of the same shape as action."
            )
        limit = np.where(schedule.action == Action.IDLE, 1, size)
        for tick, stage in np.argwhere((table < 0) | (table >= limit)).tolist():
            raise UserError(
                f"schedule '{schedule.name}', tick {tick}, stage {stage}: {name}={table[tick, stage]}, "
                + ("expected 0 on an idle tick." if limit[tick, stage] == 1 < size else f"expected 0 to {size - 1}.")
            )


def _described(table: object) -> str:
    return f"{table.dtype}{list(table.shape)}" if isinstance(table, np.ndarray) else f"a {type(table).__name__}"


def _wrong(schedule: Schedule, tick: int, stage: int, task: Task | Value, text: str) -> UserError:
    """The error of one task, or of one value (microbatch, position)."""
    virtual_stage = task.virtual_stage if isinstance(task, Task) else task[1] // schedule.num_stages
    microbatch = task.microbatch if isinstance(task, Task) else task[0]
    piece = f" (virtual stage {virtual_stage})" if schedule.num_virtual_stages > 1 else ""
    return UserError(f"schedule '{schedule.name}', tick {tick}, stage {stage}{piece}, microbatch {microbatch}: {text}")


def _check_order(schedule: Schedule) -> None:
    """No task twice, and what each needs was done in an earlier tick."""
    first = {}
    for tick, stage, task in schedule.tasks():
        for event in brings(task, schedule.position(stage, task)):
            first.setdefault(event, tick)
    seen = {}
    for tick, stage, task in schedule.tasks():
        position = schedule.position(stage, task)
        for action in _excluded(task.action):
            if (action, task.microbatch, position) in seen:
                earlier = seen[action, task.microbatch, position]
                text = f"{_words(task.action)} after a {_words(action)} at tick {earlier}, expected one only."
                raise _wrong(schedule, tick, stage, task, text)
        seen[task.action, task.microbatch, position] = tick
        for event in needs(task, position, schedule.last_position):
            if first.get(event, tick) >= tick:
                raise _wrong(schedule, tick, stage, task, _too_early(schedule, task, event, first.get(event)))


def _excluded(action: Action) -> tuple[Action, ...]:
    """The actions that must not come before `action` on the same microbatch: itself, and a whole backward or a half."""
    if action == Action.FORWARD:
        return (action,)
    halves = (Action.BACKWARD_INPUT, Action.BACKWARD_WEIGHT)
    return (action, *halves) if action == Action.BACKWARD else (action, Action.BACKWARD)


def _too_early(schedule: Schedule, task: Task, event: Event, done: int | None) -> str:
    what = "forward" if event.action == Action.FORWARD else "input gradient"
    when = "never done" if done is None else f"done at tick {done}, so it can be used from tick {done + 1} on"
    needed = f"the {what} of the microbatch on stage {event.position % schedule.num_stages}"
    return f"{_words(task.action)}, but {needed} is expected to come first; it is {when}."


def _words(action: Action) -> str:
    return action.name.lower().replace("_", " ")


def _check_complete(schedule: Schedule) -> None:
    """Each microbatch forward at each position, and backward too, but for the schedule of evaluation."""
    done = {(task.action, task.microbatch, schedule.position(stage, task)) for _, stage, task in schedule.tasks()}
    for microbatch in range(schedule.num_microbatches):
        for position in range(schedule.last_position + 1):
            missing = _missing({action for action in Action if (action, microbatch, position) in done})
            if missing and not (schedule.name == FORWARD_ONLY and missing == Action.BACKWARD):
                text = f"no {_words(missing)} up to this last tick, expected one."
                stage = position % schedule.num_stages
                raise _wrong(schedule, schedule.num_ticks - 1, stage, (microbatch, position), text)


def _missing(done: set[Action]) -> Action:
    """The first action that a microbatch still needs at a position where `done` were done; IDLE: none."""
    halves = {Action.BACKWARD_INPUT, Action.BACKWARD_WEIGHT}
    if Action.FORWARD not in done:
        return Action.FORWARD
    if Action.BACKWARD in done or halves <= done:
        return Action.IDLE
    return min(halves - done) if halves & done else Action.BACKWARD


class _Slots:
    """One kind of buffer on all stages, with what is in each slot and until when it is read."""

    def __init__(self, schedule: Schedule, kind: str, size: int, last_read: dict[Value, int]):
        self.schedule, self.kind, self.size, self.last_read = schedule, kind, size, last_read
        self.contents = defaultdict(dict)

    def write(self, tick: int, stage: int, slot: int, value: Value) -> None:
        if not 0 <= slot < self.size:
            text = f"its {self.kind} goes to slot {slot}, expected 0 to {self.size - 1}."
            raise _wrong(self.schedule, tick, stage, value, text)
        old = self.contents[stage].get(slot)
        if old is not None and self.last_read[old] > tick:
            text = (
                f"its {self.kind} overwrites that of microbatch {old[0]} in slot {slot}, which is read until tick "
                f"{self.last_read[old]}, expected a free slot. num_slots=0 finds free ones."
            )
            raise _wrong(self.schedule, tick, stage, value, text)
        self.contents[stage][slot] = value

    def read(self, tick: int, stage: int, slot: int, value: Value) -> None:
        found = self.contents[stage].get(slot)
        if found != value:
            held = f"holds that of microbatch {found[0]}" if found else "is empty"
            text = f"its {self.kind} is read from slot {slot}, which {held}, expected that of this microbatch."
            raise _wrong(self.schedule, tick, stage, value, text)

    def unused(self, tick: int, stage: int, slot: int, value: Value) -> None:
        if slot != NONE:
            raise _wrong(self.schedule, tick, stage, value, f"{self.kind} slot {slot}, expected -1: there is none.")


def _check_buffers(schedule: Schedule, buffers: Buffers) -> None:
    for name, table in zip(Buffers._fields[:4], buffers[:4], strict=True):
        if np.shape(table) != schedule.action.shape:
            shape = list(schedule.action.shape)
            raise UserError(f"schedule '{schedule.name}': {name} is {_described(table)}, expected {shape}.")
    last_read = {(task.microbatch, schedule.position(stage, task)): tick for tick, stage, task in schedule.tasks()}
    inputs = _Slots(schedule, "input", buffers.num_inputs, last_read)
    gradients = _Slots(schedule, "gradient", buffers.num_gradients, last_read)
    for tick in range(schedule.num_ticks):
        outputs, input_gradients = {}, {}
        for stage in range(schedule.num_stages):
            task = schedule.task(tick, stage)
            value = (task.microbatch, schedule.position(stage, task))
            _check_input(inputs, tick, stage, int(buffers.input_slot[tick, stage]), task, value)
            _check_gradient(gradients, tick, stage, int(buffers.gradient_slot[tick, stage]), task, value)
            if task.action == Action.FORWARD and value[1] < schedule.last_position:
                outputs[(stage + 1) % schedule.num_stages] = (value[0], value[1] + 1)
            elif task.action in SENDS_GRADIENT and value[1] > 0:
                input_gradients[(stage - 1) % schedule.num_stages] = (value[0], value[1] - 1)
        _check_arrivals(inputs, tick, buffers.input_arrival[tick].tolist(), outputs)
        _check_arrivals(gradients, tick, buffers.gradient_arrival[tick].tolist(), input_gradients)


def _check_input(inputs: _Slots, tick: int, stage: int, slot: int, task: Task, value: Value) -> None:
    none = task.action == Action.IDLE or value[1] == 0
    (inputs.unused if none else inputs.read)(tick, stage, slot, value)


def _check_gradient(gradients: _Slots, tick: int, stage: int, slot: int, task: Task, value: Value) -> None:
    is_last = value[1] == gradients.schedule.last_position
    none = task.action in (Action.IDLE, Action.FORWARD) or (task.action == Action.BACKWARD and is_last)
    makes = task.action == Action.BACKWARD_INPUT and is_last
    (gradients.unused if none else gradients.write if makes else gradients.read)(tick, stage, slot, value)


def _check_arrivals(buffer: _Slots, tick: int, slots: list[int], arriving: dict[int, Value]) -> None:
    for stage, slot in enumerate(slots):
        if stage in arriving:
            buffer.write(tick, stage, slot, arriving[stage])
        else:
            buffer.unused(tick, stage, slot, (0, stage))


class Report(NamedTuple):
    """What a schedule costs. Times are in the unit of the costs that `report` was given."""

    ticks: int
    idle: int  # ticks in which a stage does nothing, on the stage that has the most
    bubble: float  # idle fraction of the step, where each stage waits only for what it needs
    peak_live: tuple[int, ...]  # of each stage: the most (microbatch, virtual stage) between forward and backward's end
    makespan: float  # time of a step where each stage waits only for what it needs
    lock_step: float  # time of a step in which every tick takes as long as its dearest action
    num_inputs: int  # slots that a stage has for inputs, and for gradients
    num_gradients: int


def report(
    schedule: Schedule, *, forward: float = 1.0, backward_input: float = 1.0, backward_weight: float = 1.0
) -> Report:
    """What a right schedule costs.

    Args:
      forward, backward_input, backward_weight: times of one microbatch on one stage (all of its virtual stages); exact
        numbers such as `fractions.Fraction` give exact results.
    """
    costs = _costs(schedule, forward, backward_input, backward_weight)
    span = makespan(schedule, forward, backward_input, backward_weight)
    busy = (schedule.action != Action.IDLE).sum(axis=0)
    work = sum(costs[action] for action in schedule.action[:, 0].tolist())  # that of every stage
    buffers = assign_buffers(schedule)
    return Report(
        ticks=schedule.num_ticks,
        idle=schedule.num_ticks - int(busy.min()),
        bubble=(span - work) / span,
        peak_live=_peak_live(schedule),
        makespan=span,
        lock_step=sum(max(costs[action] for action in row) for row in schedule.action.tolist()),
        num_inputs=buffers.num_inputs,
        num_gradients=buffers.num_gradients,
    )


def makespan(schedule: Schedule, forward: float, backward_input: float, backward_weight: float) -> float:
    """Time of a step when each stage does its tasks in the table's order, and waits only for what a task needs.

    Costs as in `report`; a BACKWARD costs both halves, a virtual stage of v costs 1/v, and sending costs nothing.
    """
    costs = _costs(schedule, forward, backward_input, backward_weight)
    free, done = [0] * schedule.num_stages, {}
    for _, stage, task in schedule.tasks():
        position = schedule.position(stage, task)
        start = max([free[stage], *(done[event] for event in needs(task, position, schedule.last_position))])
        free[stage] = start + costs[task.action]
        done |= dict.fromkeys(brings(task, position), free[stage])
    return max(free)


def _costs(schedule: Schedule, forward: float, backward_input: float, backward_weight: float) -> dict[int, float]:
    """The time of each action, of one virtual stage."""
    whole = {
        Action.IDLE: 0 * forward,
        Action.FORWARD: forward,
        Action.BACKWARD: backward_input + backward_weight,
        Action.BACKWARD_INPUT: backward_input,
        Action.BACKWARD_WEIGHT: backward_weight,
    }
    return {action: cost / schedule.num_virtual_stages for action, cost in whole.items()}


def _peak_live(schedule: Schedule) -> tuple[int, ...]:
    """Of each stage, the most microbatches that are live in one tick; those of each virtual stage count."""
    live, peak = [set() for _ in range(schedule.num_stages)], [0] * schedule.num_stages
    last = {(stage, task[1:]): tick for tick, stage, task in schedule.tasks()}
    for tick, stage, task in schedule.tasks():
        live[stage].add(task[1:])
        peak[stage] = max(peak[stage], len(live[stage]))
        if last[stage, task[1:]] == tick:
            live[stage].remove(task[1:])
    return tuple(peak)


def draw(schedule: Schedule) -> str:
    """The table as text for a terminal: a row a stage, a column a tick, in the notation of `from_rows`."""
    letters = {action: letter for letter, action in LETTERS.items()}
    rows = []
    for stage in range(schedule.num_stages):
        tasks = [schedule.task(tick, stage) for tick in range(schedule.num_ticks)]
        rows.append([_cell(letters, task) for task in tasks])
    width = max(len(cell) for row in rows for cell in row)
    head = len(str(schedule.num_stages - 1))
    lines = [" ".join(cell.ljust(width) for cell in row).rstrip() for row in rows]
    return "\n".join(f"stage {stage:>{head}}: {line}" for stage, line in enumerate(lines))


def _cell(letters: dict[Action, str], task: Task) -> str:
    if task.action == Action.IDLE:
        return "."
    return f"{letters[task.action]}{task.microbatch}" + (f".{task.virtual_stage}" if task.virtual_stage else "")
