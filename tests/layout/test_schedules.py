"""Pipeline schedules: the papers' formulas hold exactly, the tables and their buffers compute the right gradients.

P stages, M microbatches, v virtual stages; F, B, W: times of a forward, an input gradient, a weight gradient.
"""

import dataclasses
import itertools
import random
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import UserError
from jaxllm.layout.named import load_named
from jaxllm.layout.schedule_buffers import Buffers, assign_buffers
from jaxllm.layout.schedule_check import check_schedule, draw, makespan, report
from jaxllm.layout.schedules import (
    SCHEDULES,
    Action,
    Schedule,
    Task,
    forward_only,
    from_rows,
    gpipe,
    interleaved,
    make_schedule,
    one_f_one_b,
    one_f_one_b_aligned,
    place,
    zero_bubble,
)

SIZES = list(itertools.product((1, 2, 3, 4, 7), (1, 2, 4, 5, 8, 14)))
COSTS = [tuple(map(Fraction, costs)) for costs in ((1, 1, 1), (5, 6, 4), ("1/3", "7/2", "1/5"), (1, 2, 1))]  # F, B, W
PLACED = r"tick \d+, stage \d+.*microbatch \d+"
IDLE, FORWARD, BACKWARD, INPUT, WEIGHT = Action


def all_schedules(sizes=SIZES):
    """Every schedule at every size that it takes."""
    for (stages, microbatches), (name, maker) in itertools.product(sizes, {**SCHEDULES, "fwd": forward_only}.items()):
        for v in {"interleaved": (2, 3), "fwd": (1, 2)}.get(name, (1,)):
            if name != "interleaved" or microbatches % stages == 0:
                yield maker(stages, microbatches, v)


def costs_of(schedule, costs):
    return report(schedule, forward=costs[0], backward_input=costs[1], backward_weight=costs[2])


@pytest.mark.parametrize("costs", COSTS)
def test_bubbles_are_those_of_the_papers(costs):
    f, b, w = costs
    for p, m in SIZES:
        for maker in (gpipe, one_f_one_b):
            assert costs_of(maker(p, m), costs).bubble == Fraction(p - 1, m + p - 1)
        for v in (2, 3, 4):
            if m % p == 0:
                assert costs_of(interleaved(p, m, v), costs).bubble == Fraction(p - 1, v * m + p - 1)
        if m >= p:
            assert makespan(zero_bubble(p, m), f, b, w) - m * (f + b + w) == (p - 1) * (f + b - w)
            assert makespan(one_f_one_b(p, m), f, b, w) - m * (f + b + w) == (p - 1) * (f + b + w)
        assert makespan(forward_only(p, m), f, b, w) == (m + p - 1) * f
        assert costs_of(one_f_one_b_aligned(p, m), costs).lock_step == (m + p - 1) * (f + b + w)


def test_a_long_weight_gradient_costs_zero_bubble_more_than_the_formula():
    """The first stage cannot start its second forward round before the first gradient: at least (P-1)B are lost."""
    assert makespan(zero_bubble(4, 8), 1, 2, 3) - 8 * 6 == 3 * 2 > 3 * (1 + 2 - 3)


def test_microbatches_in_flight_are_those_of_the_papers():
    for p, m in SIZES:
        stages = range(p)
        assert report(gpipe(p, m)).peak_live == (m,) * p
        assert report(one_f_one_b(p, m)).peak_live == tuple(min(p - s, m) for s in stages)
        assert report(one_f_one_b_aligned(p, m)).peak_live == tuple(min(2 * (p - s) - 1, m) for s in stages)
        assert report(zero_bubble(p, m)).peak_live == (min(p, m),) * p
        for v in (2, 3):
            if m % p == 0:  # each live piece is 1/v of a stage; 1F1B has P microbatches there
                first = Fraction(report(interleaved(p, m, v)).peak_live[0], v)
                assert first == min(p * (1 + Fraction(p - 1, p * v)), m)


def test_inputs_kept_are_those_of_the_readme():
    """Of the first position none is kept: it comes from the tokens."""
    for p, m in SIZES:
        assert report(gpipe(p, m)).num_inputs == (m if p > 1 else 0)
        assert report(one_f_one_b(p, m)).num_inputs <= p and report(zero_bubble(p, m)).num_inputs <= p
        assert report(zero_bubble(p, m)).num_gradients <= p
        assert report(one_f_one_b_aligned(p, m)).num_inputs <= 2 * p - 1
        for v in (2, 3):
            if m % p == 0:
                kept = report(interleaved(p, m, v)).num_inputs
                assert kept <= p * (v + 1) - 2 and (kept == p * (v + 1) - 2 or m < 2 * p)


def test_ticks():
    for p, m in SIZES:
        for maker in (gpipe, one_f_one_b):
            assert maker(p, m).num_ticks == 2 * (m + p - 1)
        assert one_f_one_b_aligned(p, m).num_ticks == 2 * (m + 2 * p - 2)
        assert forward_only(p, m).num_ticks == m + p - 1
        if m >= p:
            assert zero_bubble(p, m).num_ticks == 3 * m + p - 1
        if m % p == 0:
            assert interleaved(p, m, 3).num_ticks == 2 * (3 * m + p - 1)
    assert report(one_f_one_b(4, 8)).idle == 6


def test_aligned_stages_do_the_same_in_every_tick():
    schedule = one_f_one_b_aligned(4, 9)
    for tick, row in enumerate(schedule.action):
        assert set(row) <= {IDLE, BACKWARD if tick % 2 else FORWARD}
    # A tick costs its dearest action. In plain 1F1B that is nearly always a backward, also where others do forwards.
    assert report(schedule).lock_step == 12 * 3 < report(one_f_one_b(4, 9)).lock_step


def test_tables_drawn_by_hand():
    assert draw(one_f_one_b(4, 8)).splitlines()[1::2] == [
        "stage 1: .  F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 .  B6 .  B7 .",
        "stage 3: .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 .  .  .",
    ]
    assert draw(zero_bubble(4, 8)).splitlines()[::3] == [
        "stage 0: F0 F1 F2 F3 .  .  .  I0 W0 F4 I1 W1 F5 I2 W2 F6 I3 W3 F7 I4 W4 I5 W5 I6 W6 I7 W7",
        "stage 3: .  .  .  F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 F6 I6 W3 F7 I7 W4 W5 W6 W7",
    ]


class Chain:
    """A model of one number a position, y = x + weight * x**2 with x of position 0 from the data; loss = y**3."""

    def __init__(self, schedule: Schedule):
        generator = np.random.default_rng(0)
        self.num_positions = schedule.last_position + 1
        self.weights = generator.normal(size=self.num_positions) / 4
        self.data = generator.normal(size=schedule.num_microbatches)

    def weight_gradients(self):
        """Summed over microbatches, without a schedule."""
        total = np.zeros(self.num_positions)
        for x in self.data:
            inputs = [x]
            for w in self.weights:
                inputs.append(inputs[-1] + w * inputs[-1] ** 2)
            dy = 3 * inputs[-1] ** 2
            for p in reversed(range(self.num_positions)):
                total[p] += dy * inputs[p] ** 2
                dy *= 1 + 2 * self.weights[p] * inputs[p]
        return total

    def run(self, schedule: Schedule, buffers: Buffers):
        """What an executor does that has nothing but the table and the slots: (weight gradients, last outputs)."""
        stages, last = schedule.num_stages, self.num_positions - 1
        inputs = np.full((stages, buffers.num_inputs), np.nan)
        gradients = np.full((stages, buffers.num_gradients), np.nan)
        total, outputs = np.zeros(self.num_positions), {}
        for t in range(schedule.num_ticks):
            sent = []
            for s in range(stages):
                action, m = schedule.action[t, s], schedule.microbatch[t, s]
                p = schedule.virtual_stage[t, s] * stages + s
                if action == IDLE:
                    continue
                x = inputs[s, buffers.input_slot[t, s]] if p else self.data[m]
                y = x + self.weights[p] * x**2
                if action == FORWARD:
                    outputs[p, m] = y
                    if p < last:
                        sent.append((inputs, (s + 1) % stages, buffers.input_arrival, y))
                    continue
                if p == last and action != WEIGHT:
                    dy = 3 * y**2
                    if action == INPUT:
                        gradients[s, buffers.gradient_slot[t, s]] = dy
                else:
                    dy = gradients[s, buffers.gradient_slot[t, s]]
                if action != INPUT:
                    total[p] += dy * x**2
                if action != WEIGHT and p:
                    dx = dy * (1 + 2 * self.weights[p] * x)
                    sent.append((gradients, (s - 1) % stages, buffers.gradient_arrival, dx))
            for buffer, receiver, arrival, value in sent:
                assert arrival[t, receiver] >= 0
                buffer[receiver, arrival[t, receiver]] = value
        return total, [outputs[last, m] for m in range(schedule.num_microbatches)]


def test_every_table_is_right_and_computes_the_gradients():
    for schedule in all_schedules():
        check_schedule(schedule)
        chain = Chain(schedule)
        total, outputs = chain.run(schedule, assign_buffers(schedule))
        expected = 0 if schedule.name == "forward_only" else chain.weight_gradients()
        np.testing.assert_allclose(total, expected, rtol=1e-9, err_msg=schedule.name)
        y = chain.data
        for w in chain.weights:
            y = y + w * y**2
        np.testing.assert_allclose(outputs, y, rtol=1e-12)


def most_held(schedule):
    """(inputs, gradients): the most values of one stage that wait at once, from their arrival to their last read."""
    first, last = {}, {}
    for tick, stage, task in schedule.tasks():
        value = (task.microbatch, task.virtual_stage * schedule.num_stages + stage)
        first[task.action, *value] = last[value] = tick
    held = np.zeros((2, schedule.num_stages, schedule.num_ticks), int)
    for (m, p), read in last.items():
        arrivals = [first.get((FORWARD, m, p - 1)), first.get((BACKWARD, m, p + 1), first.get((INPUT, m, p + 1)))]
        if p + 1 == schedule.num_stages * schedule.num_virtual_stages:
            arrivals[1] = first.get((INPUT, m, p))  # made there, for the weight gradient
        for kind, arrival in enumerate(arrivals):
            if arrival is not None:
                held[kind, p % schedule.num_stages, arrival + 1 : read + 1] += 1
    return tuple(held.max(axis=(1, 2)))


def test_buffers_are_as_few_as_the_values_held_at_once():
    for schedule in all_schedules():
        buffers = assign_buffers(schedule)
        assert (buffers.num_inputs, buffers.num_gradients) == most_held(schedule)


def test_buffers_do_not_grow_with_the_microbatches():
    """Stage 1 of 1F1B gets the P forwards that stage 0 starts with before its first backward."""
    sizes = {"1f1b": (4, 1), "1f1b_aligned": (6, 1), "zero_bubble": (4, 4), "interleaved": (10, 2)}
    for name, expected in sizes.items():
        for m in (8, 64):
            buffers = assign_buffers(make_schedule(name, 4, m, 2 if name == "interleaved" else 1))
            assert (buffers.num_inputs, buffers.num_gradients) == expected, (name, m)
    assert assign_buffers(gpipe(4, 64)).num_inputs == 64


def mutated(schedule, stage, changes):
    """The table with cells of one stage replaced: {tick: task}."""
    table = np.stack([schedule.action, schedule.microbatch, schedule.virtual_stage], axis=2)
    for tick, task in changes.items():
        table[tick, stage] = task
    return dataclasses.replace(schedule, **dict(zip(Task._fields, np.moveaxis(table, 2, 0), strict=True)))


def refused(schedule, match=PLACED):
    with pytest.raises(UserError, match=match) as error:
        check_schedule(schedule)
    assert str(error.value).startswith(f"schedule '{schedule.name}'")


@pytest.mark.parametrize("schedule", list(all_schedules([(3, 6)])), ids=lambda schedule: schedule.name)
def test_mutations_are_refused(schedule):
    idle = Task(IDLE, 0)
    for tick, stage, task in schedule.tasks():
        refused(mutated(schedule, stage, {tick: idle}), f"tick .* stage .* microbatch {task.microbatch}: ")
        other = (task.microbatch + 1) % schedule.num_microbatches
        refused(mutated(schedule, stage, {tick: task._replace(microbatch=other)}))
        before = schedule.task(tick - 1, stage) if tick else None
        if before and before.action == IDLE and schedule.name != "1f1b_aligned":  # elsewhere each is as early as it can
            moved = {tick: idle, tick - 1: task}
            refused(mutated(schedule, stage, moved), f"tick {tick - 1}, stage {stage}.*microbatch {task.microbatch}:")
        for later, column, same in schedule.tasks():
            if column == stage and same[1:] == task[1:] and later > tick:  # a forward and its own backward
                refused(mutated(schedule, stage, {tick: same, later: task}))
        for free in np.flatnonzero(schedule.action[:, stage] == IDLE):
            refused(mutated(schedule, stage, {free: task}))


def test_what_a_refusal_says():
    schedule = one_f_one_b(3, 4)
    # stage 0: F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
    # stage 1: .  F0 F1 .  B0 F2 B1 F3 B2 .  B3
    # stage 2: .  .  F0 B0 F1 B1 F2 B2 F3 B3
    refused(
        mutated(schedule, 1, {3: Task(BACKWARD, 0), 4: Task(IDLE, 0)}),
        re.escape(
            "schedule '1f1b', tick 3, stage 1, microbatch 0: backward, but the input gradient of the microbatch on "
            "stage 2 is expected to come first; it is done at tick 3, so it can be used from tick 4 on."
        ),
    )
    for stage, tick, task, message in (
        (2, 2, Task(IDLE, 0), "tick 3, stage 2, microbatch 0: backward, but the forward .* it is never done"),
        (0, 3, Task(FORWARD, 1), "tick 3, stage 0, microbatch 1: forward after a forward at tick 1, expected one only"),
        (0, 11, Task(IDLE, 0), "tick 11, stage 0, microbatch 3: no backward up to this last tick, expected one"),
        (0, 11, Task(INPUT, 3), "tick 11, stage 0, microbatch 3: no backward weight"),
        (0, 8, Task(WEIGHT, 0), "tick 8, stage 0, microbatch 0: backward weight after a backward at tick 5"),
        (0, 5, Task(WEIGHT, 0), "tick 5, stage 0, microbatch 0: backward weight, but the input gradient .* never done"),
        (0, 3, Task(FORWARD, 4), "tick 3, stage 0: microbatch=4, expected 0 to 3"),
        (0, 3, Task(FORWARD, 0, 1), "tick 3, stage 0: virtual_stage=1, expected 0 to 0"),
        (0, 3, Task(5, 0), "tick 3, stage 0: action=5, expected 0 to 4"),
        (0, 3, Task(IDLE, 1), "tick 3, stage 0: microbatch=1, expected 0 on an idle tick"),
    ):
        refused(mutated(schedule, stage, {tick: task}), message)


def test_what_is_no_table_is_refused():
    schedule = one_f_one_b(3, 4)
    refused(dataclasses.replace(schedule, action=schedule.action * 1.0), r"action is float64\[12, 3\], expected")
    refused(dataclasses.replace(schedule, action=schedule.action.tolist()), "action is a list, expected")
    refused(
        dataclasses.replace(schedule, microbatch=schedule.microbatch[1:]), r"microbatch is int32\[11, 3\], expected"
    )
    refused(dataclasses.replace(schedule, num_slots=-1), "num_slots=-1, expected a whole number from 0 on")
    refused(from_rows("own", [], 1), "the table is empty")
    refused(from_rows("own", ["F0"], 1), "tick 0, stage 0, microbatch 0: no backward up to")


def test_a_ring_buffer_that_is_too_small_is_refused():
    schedule = one_f_one_b(4, 8)
    for k in range(1, 9):
        ring = dataclasses.replace(schedule, num_slots=k)
        if k >= 4:
            check_schedule(ring)
            assert assign_buffers(ring).num_inputs == k
            chain = Chain(ring)
            np.testing.assert_allclose(chain.run(ring, assign_buffers(ring))[0], chain.weight_gradients(), rtol=1e-9)
        else:
            refused(ring)
    refused(
        dataclasses.replace(schedule, num_slots=3),
        "tick 3, stage 1, microbatch 3: its input overwrites that of microbatch 0 in slot 0, which is read until .* 6",
    )
    check_schedule(dataclasses.replace(interleaved(2, 4, 2), num_slots=4))
    refused(dataclasses.replace(interleaved(2, 4, 2), num_slots=1))


@pytest.mark.parametrize("name", ["1f1b", "zero_bubble", "interleaved"])
def test_a_wrong_slot_is_refused(name):
    """Any slot of any buffer, pointed one further or left out."""
    schedule = make_schedule(name, 2, 4, 2 if name == "interleaved" else 1)
    buffers = assign_buffers(schedule)
    for field in Buffers._fields[:4]:
        table, size = getattr(buffers, field), buffers[4 if "input" in field else 5]
        for tick, stage in np.argwhere(table >= 0):
            for wrong in {-1, size, (table[tick, stage] + 1) % size} - {table[tick, stage]}:
                changed = table.copy()
                changed[tick, stage] = wrong
                with pytest.raises(UserError, match=PLACED):
                    check_schedule(schedule, buffers._replace(**{field: changed}))
        unused = np.argwhere(table < 0)
        changed = table.copy()
        changed[tuple(unused[0])] = 0
        with pytest.raises(UserError, match=PLACED):
            check_schedule(schedule, buffers._replace(**{field: changed}))
        with pytest.raises(UserError, match=f"{field} is int32"):
            check_schedule(schedule, buffers._replace(**{field: table[1:]}))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 2), st.sampled_from(["whole", "halves", "mixed"]), st.randoms()
)
def test_place_takes_every_order_that_can_be_run(stages, microbatches, v, backward, choose: random.Random):
    """Orders drawn by running tasks at random, one at a time, as soon as they can be run."""
    last = stages * v - 1
    split = {
        key: backward == "halves" or (backward == "mixed" and choose.random() < 0.5)
        for key in itertools.product(range(microbatches), range(last + 1))
    }
    orders, forward, back, weight = [[] for _ in range(stages)], set(), set(), set()
    while len(weight) < len(split):
        ready = []
        for m, p in split:
            key = (m, p)
            if key not in forward and (p == 0 or (m, p - 1) in forward):
                ready.append((FORWARD, key))
            elif key in forward and key not in back and (p == last or (m, p + 1) in back):
                ready.append((INPUT if split[key] else BACKWARD, key))
            elif key in back and key not in weight:
                ready.append((WEIGHT, key))
        action, (m, p) = choose.choice(ready)
        orders[p % stages].append((action, m, p // stages))
        for done, actions in ((forward, (FORWARD,)), (back, (INPUT, BACKWARD)), (weight, (WEIGHT, BACKWARD))):
            if action in actions:
                done.add((m, p))
    schedule = place("random", orders, microbatches, v)
    check_schedule(schedule)
    assert [[task for _, column, task in schedule.tasks() if column == stage] for stage in range(stages)] == orders
    chain = Chain(schedule)
    np.testing.assert_allclose(chain.run(schedule, assign_buffers(schedule))[0], chain.weight_gradients(), rtol=1e-9)
    if backward == "halves":  # with equal costs, to wait only for what is needed takes as long as the ticks
        assert schedule.num_ticks == makespan(schedule, v, v, v)


def test_a_deadlock_is_named():
    orders = [[Task(FORWARD, 0), Task(BACKWARD, 0)], [Task(BACKWARD, 0), Task(FORWARD, 0)]]
    with pytest.raises(
        UserError, match=r"'own', tick 1, stage 0: deadlock. The backward of microbatch 0 waits for .* 1,"
    ):
        place("own", orders, 1)


def test_an_idle_task_waits_a_tick():
    schedule = place("own", [[(IDLE, 0), (FORWARD, 0), (IDLE, 0), (IDLE, 0), (BACKWARD, 0)]], 1)
    assert schedule.tasks() == from_rows("own", [". F0 . . B0"], 1).tasks()


def test_rows_are_read_as_they_are_drawn():
    for schedule in all_schedules([(3, 3), (2, 12)]):
        rows = [line.partition(": ")[2] for line in draw(schedule).splitlines()]
        again = from_rows(schedule.name, rows, schedule.num_microbatches, schedule.num_virtual_stages)
        assert again.tasks() == schedule.tasks() and again.action.shape == schedule.action.shape
    for word in ("X0", "F", "F0.", "F-1", "F0.x", "0"):
        with pytest.raises(UserError, match=f"schedule 'own', tick 1, stage 1: '{re.escape(word)}' is no task"):
            from_rows("own", ["F0 B0", f". {word}"], 1)


SCHEDULE_FILE = '''"""Two forwards ahead of every backward, whatever the stage."""

from jaxllm.layout.schedules import Action, Task, from_rows, place


def two_ahead(num_stages, num_microbatches, virtual_stages):
    orders = []
    for stage in range(num_stages):
        ahead = min(num_stages - stage + 1, num_microbatches)
        order = [Task(Action.FORWARD, m) for m in range(ahead)]
        for m in range(num_microbatches):
            order.append((Action.BACKWARD, m))
            if m + ahead < num_microbatches:
                order.append((Action.FORWARD, m + ahead))
        orders.append(order)
    return place("two_ahead", orders, num_microbatches)


def drawn(num_stages, num_microbatches, virtual_stages):
    return from_rows("drawn", ["F0 F1 .  B0 .  B1", ".  F0 B0 F1 B1"], 2)
'''

WRONG_FILE = """from jaxllm.layout.schedules import Schedule, from_rows


def early(*sizes):
    return from_rows("early", ["F0 F1 B0 . B1", ". F0 B0 F1 B1"], 2)


def reused(*sizes):
    return from_rows("reused", ["F0 F1 . B0 . B1", ". F0 B0 F1 B1"], 2, num_slots=1)


def broken(*sizes):
    return 1 / 0


def nothing(*sizes):
    pass


def ragged(*sizes):
    return from_rows("ragged", ["F0 B0"], 1)


def one_size(num_stages):
    pass


def listed(*sizes):
    return Schedule("listed", [[1, 0], [0, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 0]], 2)


def reserved(*sizes):
    return from_rows("forward_only", ["F0 F1", ". F0 F1"], 2)
"""


@pytest.fixture
def user_file(tmp_path):
    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_a_schedule_of_the_users_own(user_file):
    file = user_file(SCHEDULE_FILE)
    schedule = make_schedule(f"{file}:two_ahead", 3, 6)
    assert schedule.name == "two_ahead" and report(schedule).peak_live == (4, 3, 2)
    assert make_schedule(f"{file}:two_ahead", 3, 6) is schedule
    assert load_named("field", f"{file}:drawn") is load_named("field", f"{file}:drawn")
    assert make_schedule(f"{file}:drawn", 2, 2).num_ticks == 6
    with pytest.raises(UserError, match=r"mine.py:drawn returned a schedule of num_stages=2, but was asked for 4"):
        make_schedule(f"{file}:drawn", 4, 2)
    with pytest.raises(UserError, match="returned a schedule of num_microbatches=2, but was asked for 3"):
        make_schedule(f"{file}:drawn", 2, 3)
    with pytest.raises(UserError, match="returned a schedule of num_virtual_stages=1, but was asked for 2"):
        make_schedule(f"{file}:drawn", 2, 2, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "early": "'early', tick 2, stage 0, microbatch 0: backward, but the input gradient .* on stage 1 is",
        "reused": "'reused', tick 1, stage 1, microbatch 1: its input overwrites that of microbatch 0 in slot 0",
        "broken": r"config.layout.schedule: .*mine.py:13: ZeroDivisionError: division by zero",
        "nothing": "mine.py:nothing returned None. It must return a Schedule",
        "ragged": "num_stages=1, but was asked for 2",
        "one_size": r"config.layout.schedule: .*mine.py: TypeError: one_size\(\) takes 1 positional argument but 3",
        "listed": "schedule 'listed': action is a list, expected a NumPy array of integers",
        "reserved": "mine.py:reserved returned a schedule named 'forward_only', a name that is for evaluation",
        "erly": r"mine.py has no function 'erly'. Did you mean 'early'\?",
    }.items(),
)
def test_wrong_schedules_of_the_users_own(user_file, name, message):
    with pytest.raises(UserError, match=message):
        make_schedule(f"{user_file(WRONG_FILE)}:{name}", 2, 2)


def test_a_file_with_a_dataclass(user_file):
    """With its annotations as text, a dataclass looks its module up."""
    head = "from __future__ import annotations\nimport dataclasses\nfrom jaxllm.layout.schedules import gpipe\n"
    file = user_file(
        head + "@dataclasses.dataclass\nclass Sizes:\n    stages: int\ndef f(p, m, v): return gpipe(p, m)\n"
    )
    assert make_schedule(f"{file}:f", 2, 2).num_stages == 2


def test_files_that_cannot_be_read(user_file):
    for text, message in (
        (f"{user_file('x = (', 'syntax.py')}:f", r"config.layout.schedule: .*syntax.py:1: SyntaxError"),
        (f"{user_file('')}:f".replace("mine", "mien"), r"mien.py:f: no such file. Did you mean 'mine.py'\?"),
        (f"{user_file('x = 1', 'plain.py')}:f", "plain.py has no function 'f'. It defines none at all"),
        (f"{user_file('import nowhere_', 'imports.py')}:f", "imports.py:1: ModuleNotFoundError"),
        (f"{user_file('raise SystemExit(3)', 'leaves.py')}:f", "leaves.py:1: SystemExit: 3"),
        (f"{user_file('def f(*_): exit(3)', 'leaves_later.py')}:f", "leaves_later.py:1: SystemExit: 3"),
    ):
        with pytest.raises(UserError, match=message):
            make_schedule(text, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1", 2, 2, 1), r"config.layout.schedule='1f1' is no schedule. Did you mean '1f1b'\?.*FILE.py:NAME"),
        (("mine.py", 2, 2, 1), "config.layout.schedule='mine.py' is no schedule. .*FILE.py:NAME"),
        (("1f1b", 2, 2, 2), "virtual_stages=2: the schedule '1f1b' has no virtual stages. Set .*=1 or .*=interleaved"),
        (("zero_bubble", 2, 2, 0), "virtual_stages=0: the schedule 'zero_bubble' has no virtual"),
        (("interleaved", 2, 2, 1), "virtual_stages=1: the schedule 'interleaved' needs 2 or more. Set .*=2 or .*=1f1b"),
        (("interleaved", 4, 6, 2), "num_microbatches=6: .* needs a multiple of the 4 pipeline stages. Nearest: 4 or 8"),
        (("interleaved", 4, 3, 2), r"Nearest: 4\."),
        (("gpipe", 2, 0, 1), "num_microbatches=0"),
    ],
)
def test_what_cannot_be_made(arguments, message):
    with pytest.raises(UserError, match=message):
        make_schedule(*arguments)
