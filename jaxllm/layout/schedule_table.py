"""A pipeline schedule as data: which stage does what at which tick, and two ways to write one down.

A tick is one action on each stage, followed by an exchange: what a stage sends at the end of tick t can be used by its
neighbour from tick t+1 on. With virtual stages (Narayanan et al. 2021) a stage holds several pieces of the model; the
*position* of a piece, `virtual_stage * num_stages + stage`, is its place in the chain that a microbatch runs through.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxllm.errors import UserError


class Action(enum.IntEnum):
    """What a stage does in a tick. BACKWARD is BACKWARD_INPUT and BACKWARD_WEIGHT (Qi et al. 2023) in one."""

    IDLE = 0
    FORWARD = 1
    BACKWARD = 2
    BACKWARD_INPUT = 3
    BACKWARD_WEIGHT = 4


LETTERS = {"F": Action.FORWARD, "B": Action.BACKWARD, "I": Action.BACKWARD_INPUT, "W": Action.BACKWARD_WEIGHT}
FORWARD_ONLY = "forward_only"  # the name of the one schedule without backwards, for evaluation
SENDS_GRADIENT = (Action.BACKWARD, Action.BACKWARD_INPUT)


class Task(NamedTuple):
    """One action on one microbatch, by one virtual stage of a stage."""

    action: Action
    microbatch: int
    virtual_stage: int = 0

    def __str__(self) -> str:
        return f"{Action(self.action).name.lower().replace('_', ' ')} of microbatch {self.microbatch}"


@dataclass(frozen=True, eq=False)
class Schedule:
    """A table [tick, stage] of actions, and the microbatch and virtual stage that each is for (0 where idle).

    `num_slots` says where a stage keeps the inputs that wait for their backward: 0 finds slots for them, as few as
    possible; K keeps microbatch m of each virtual stage in slot m % K, a ring buffer.
    """

    name: str
    action: Int[np.ndarray, "tick stage"]
    microbatch: Int[np.ndarray, "tick stage"]
    virtual_stage: Int[np.ndarray, "tick stage"]
    num_microbatches: int
    num_virtual_stages: int = 1
    num_slots: int = 0

    @property
    def num_ticks(self) -> int:
        return self.action.shape[0]

    @property
    def num_stages(self) -> int:
        return self.action.shape[1]

    @property
    def last_position(self) -> int:
        return self.num_stages * self.num_virtual_stages - 1

    def position(self, stage: int, task: Task) -> int:
        """Where in the chain `task` is when `stage` does it."""
        return task.virtual_stage * self.num_stages + stage

    def tasks(self) -> list[tuple[int, int, Task]]:
        """(tick, stage, task) of everything that is not idle, by tick, then stage."""
        return [
            (tick, stage, self.task(tick, stage)) for tick, stage in np.argwhere(self.action != Action.IDLE).tolist()
        ]

    def task(self, tick: int, stage: int) -> Task:
        return Task(
            Action(int(self.action[tick, stage])),
            int(self.microbatch[tick, stage]),
            int(self.virtual_stage[tick, stage]),
        )


class Event(NamedTuple):
    """What a task brings about: a stage's output (FORWARD) or the gradient of its input (BACKWARD_INPUT)."""

    action: Action
    microbatch: int
    position: int


def needs(task: Task, position: int, last_position: int) -> list[Event]:
    """The events that `task` waits for."""
    if task.action == Action.IDLE or (task.action == Action.FORWARD and position == 0):
        return []
    if task.action == Action.FORWARD:
        return [Event(Action.FORWARD, task.microbatch, position - 1)]
    if task.action == Action.BACKWARD_WEIGHT:
        return [Event(Action.BACKWARD_INPUT, task.microbatch, position)]
    own = [Event(Action.FORWARD, task.microbatch, position)]
    return own if position == last_position else [*own, Event(Action.BACKWARD_INPUT, task.microbatch, position + 1)]


def brings(task: Task, position: int) -> list[Event]:
    """The events that other tasks may wait for when `task` is done."""
    if task.action == Action.FORWARD:
        return [Event(Action.FORWARD, task.microbatch, position)]
    return [Event(Action.BACKWARD_INPUT, task.microbatch, position)] if task.action in SENDS_GRADIENT else []


def place(
    name: str, orders: Sequence[Sequence[Task]], num_microbatches: int, num_virtual_stages: int = 1, num_slots: int = 0
) -> Schedule:
    """The table in which each stage does the tasks of `orders[stage]` in that order, each as early as it can.

    Args:
      orders: for each stage its tasks, such as `(Action.FORWARD, microbatch)` or `(Action.FORWARD, microbatch,
        virtual_stage)`; `(Action.IDLE, 0)` waits for a tick.

    Raises:
      UserError: a deadlock: no stage can go on, since each waits for a task that comes later.
    """
    orders = [[Task(*task) for task in order] for order in orders]
    num_stages, last_position = len(orders), len(orders) * num_virtual_stages - 1
    rows, done, at = [], set(), [0] * num_stages  # at: how far each stage has come
    while any(at[stage] < len(order) for stage, order in enumerate(orders)):
        row = [Task(Action.IDLE, 0)] * num_stages
        ready = [
            stage
            for stage, order in enumerate(orders)
            if at[stage] < len(order) and not _missing(order[at[stage]], stage, num_stages, last_position, done)
        ]
        if not ready:
            raise UserError(_deadlock(name, orders, at, len(rows), last_position, done))
        for stage in ready:
            row[stage] = task = orders[stage][at[stage]]
            at[stage] += 1
            done.update(brings(task, task.virtual_stage * num_stages + stage))
        rows.append(row)
    return _schedule(name, rows, num_stages, num_microbatches, num_virtual_stages, num_slots)


def _missing(task: Task, stage: int, num_stages: int, last_position: int, done: set[Event]) -> list[Event]:
    """What `task` still waits for."""
    return [event for event in needs(task, task.virtual_stage * num_stages + stage, last_position) if event not in done]


def _deadlock(
    name: str, orders: list[list[Task]], at: list[int], tick: int, last_position: int, done: set[Event]
) -> str:
    """The first stage that cannot go on, and what it waits for."""
    stage = next(stage for stage, order in enumerate(orders) if at[stage] < len(order))
    task = orders[stage][at[stage]]
    missing = _missing(task, stage, len(orders), last_position, done)[0]
    return (
        f"schedule '{name}', tick {tick}, stage {stage}: deadlock. The {task} waits for the "
        f"{Task(missing.action, missing.microbatch)} on stage {missing.position % len(orders)}, which never comes: "
        "put it earlier in the order of that stage."
    )


def from_rows(
    name: str, rows: Sequence[str], num_microbatches: int, num_virtual_stages: int = 1, num_slots: int = 0
) -> Schedule:
    """The table drawn as one text a stage, a column a tick: "F0 F1 . B0 B1" or, in two halves, "F0 I0 W0".

    F is a forward, B a backward, I and W its halves for the input and the weights, "." an idle tick; "F0.1" is for
    microbatch 0 of virtual stage 1. Rows that are shorter end idle.

    Raises:
      UserError: a word that is none of these, with its stage and tick.
    """
    tasks = [
        [_read(name, stage, tick, word) for tick, word in enumerate(row.split())] for stage, row in enumerate(rows)
    ]
    ticks = max(map(len, tasks), default=0)
    idle = Task(Action.IDLE, 0)
    table = [[row[tick] if tick < len(row) else idle for row in tasks] for tick in range(ticks)]
    return _schedule(name, table, len(rows), num_microbatches, num_virtual_stages, num_slots)


def _read(name: str, stage: int, tick: int, word: str) -> Task:
    microbatch, dot, virtual_stage = word[1:].partition(".")
    if word == ".":
        return Task(Action.IDLE, 0)
    if word[0] not in LETTERS or not microbatch.isdecimal() or (dot and not virtual_stage.isdecimal()):
        raise UserError(
            f"schedule '{name}', tick {tick}, stage {stage}: '{word}' is no task. "
            "Write F0, B0, I0 or W0 (microbatch 0), F0.1 (of virtual stage 1) or '.' (idle)."
        )
    return Task(LETTERS[word[0]], int(microbatch), int(virtual_stage or 0))


def _schedule(name: str, rows: list[list[Task]], num_stages: int, *rest: int) -> Schedule:
    table = np.array(rows, np.int32).reshape(len(rows), num_stages, len(Task._fields))
    return Schedule(name, *np.moveaxis(table, 2, 0), *rest)
