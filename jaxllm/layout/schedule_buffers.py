"""Where each stage of a pipeline keeps what its neighbours send: slots of two buffers, inputs and gradients.

What arrives at the end of a tick is held until it is read for the last time; what arrives at the end of that very tick
may take its slot. Handing out the lowest free slot in the order of arrival needs as many slots as there are values held
at once, and no colouring of intervals needs fewer.
"""

import heapq
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxllm.layout.schedule_table import SENDS_GRADIENT, Action, Schedule

Value = tuple[int, int]  # microbatch, position
NONE = -1


class Buffers(NamedTuple):
    """Slots [tick, stage], -1 where there is none. The executor, at tick t on stage s:

    - FORWARD and every kind of backward read the stage's input from `inputs[input_slot]`; at position 0 there is none,
      since it comes from the tokens;
    - BACKWARD and BACKWARD_INPUT read the gradient of their output from `gradients[gradient_slot]`, as BACKWARD_WEIGHT
      does after them. At the last position that gradient comes from the loss: BACKWARD has no slot there, and
      BACKWARD_INPUT *writes* it into `gradients[gradient_slot]` for BACKWARD_WEIGHT;
    - at the end of the tick, what the neighbours sent is stored in `inputs[input_arrival]` and
      `gradients[gradient_arrival]`.
    """

    input_slot: Int[np.ndarray, "tick stage"]
    input_arrival: Int[np.ndarray, "tick stage"]
    gradient_slot: Int[np.ndarray, "tick stage"]
    gradient_arrival: Int[np.ndarray, "tick stage"]
    num_inputs: int
    num_gradients: int


class _Held(NamedTuple):
    """A value in a buffer of a stage, from the end of the tick `arrival` to the tick of its last read."""

    arrival: int
    last_read: int
    value: Value


def assign_buffers(schedule: Schedule) -> Buffers:
    """The slots of a schedule that is otherwise right (`check_schedule`)."""
    tasks = [(tick, stage, task, schedule.position(stage, task)) for tick, stage, task in schedule.tasks()]
    reads, outputs, gradients = {}, {}, {}
    for tick, _, task, position in tasks:
        value = (task.microbatch, position)
        reads[value] = tick
        if task.action == Action.FORWARD:
            outputs[value] = tick
        elif task.action in SENDS_GRADIENT:
            gradients[value] = tick
    split = {(task.microbatch, p) for _, _, task, p in tasks if task.action == Action.BACKWARD_WEIGHT}
    last = schedule.last_position
    input_arrivals = {(m, p + 1): tick for (m, p), tick in outputs.items() if p < last}
    gradient_arrivals = {(m, p - 1): tick for (m, p), tick in gradients.items() if p > 0}
    made_here = {(m, p): tick for (m, p), tick in gradients.items() if p == last and (m, p) in split}
    input_slots, num_inputs = _slots(schedule, input_arrivals, reads)
    gradient_slots, num_gradients = _slots(schedule, gradient_arrivals | made_here, reads)
    if schedule.num_slots:
        size = schedule.num_slots
        input_slots = {(m, p): p // schedule.num_stages * size + m % size for m, p in input_arrivals}
        num_inputs = schedule.num_virtual_stages * size

    input_slot, input_arrival, gradient_slot, gradient_arrival = np.full((4, *schedule.action.shape), NONE, np.int32)
    for tick, stage, task, position in tasks:
        value = (task.microbatch, position)
        input_slot[tick, stage] = input_slots.get(value, NONE)
        if task.action != Action.FORWARD:
            gradient_slot[tick, stage] = gradient_slots.get(value, NONE)
    _store(input_arrival, input_arrivals, input_slots)
    _store(gradient_arrival, gradient_arrivals, gradient_slots)
    return Buffers(input_slot, input_arrival, gradient_slot, gradient_arrival, num_inputs, num_gradients)


def _slots(schedule: Schedule, arrivals: dict[Value, int], reads: dict[Value, int]) -> tuple[dict[Value, int], int]:
    """The slot of each value, and how many slots the fullest stage needs."""
    held = [[] for _ in range(schedule.num_stages)]
    for value, tick in arrivals.items():
        held[value[1] % schedule.num_stages].append(_Held(tick, reads[value], value))
    coloured = [_colour(of_stage) for of_stage in held]
    slots = {value: slot for of_stage in coloured for value, slot in of_stage.items()}
    return slots, max(slots.values(), default=NONE) + 1


def _colour(held: Iterable[_Held]) -> dict[Value, int]:
    """The lowest slot that is free for each value, in the order of arrival."""
    slots, free, busy, size = {}, [], [], 0
    for arrival, last_read, value in sorted(held):
        while busy and busy[0][0] <= arrival:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            slot = heapq.heappop(free)
        else:
            slot, size = size, size + 1
        slots[value] = slot
        heapq.heappush(busy, (last_read, slot))
    return slots


def _store(table: Int[np.ndarray, "tick stage"], arrivals: dict[Value, int], slots: dict[Value, int]) -> None:
    num_stages = table.shape[1]
    for value, tick in arrivals.items():
        table[tick, value[1] % num_stages] = slots[value]
