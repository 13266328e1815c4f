"""What is read of a run's folder: its state, its numbers; broken files and lines."""

import json
import math
import os

import pytest

from jaxllm.errors import UserError
from jaxllm.report.run import MOST_SAMPLES, read_run
from tests.report.made_up import NOW, event, make_run, records, write_lines

LONG_AGO = 100_000.0
STARTED = event("started", ago=LONG_AGO)
STATES = {
    "done": ([STARTED, event("done", 100)], records(10), "done"),
    "preempted": ([STARTED, event("preempted", 50)], records(5), "preempted"),
    "stopped": ([STARTED, event("stopped", 50)], records(5), "stopped"),
    "crashed": ([STARTED, event("crashed", 50)], records(5), "crashed"),
    "hung": ([STARTED, event("hung", 50)], records(5), "hung"),
    "the last ending counts": ([STARTED, event("crashed", 50), event("resumed", 40), event("done", 100)], [], "done"),
    "what comes after the end changes nothing": ([STARTED, event("done", 100), event("saved", 100)], [], "done"),
    "resumed": ([STARTED, event("preempted", 50), event("resumed", 50)], records(5), "running"),
    "compiling again": ([STARTED, event("preempted", 50), event("planned")], records(5, LONG_AGO), "running"),
    "resumed, and killed": ([STARTED, event("preempted", 9, LONG_AGO), event("resumed", 9, LONG_AGO)], [], "silent"),
    "it was said to hang, and goes on": ([event("hung", 40, 90)], records(5, 60), "running"),
    "crashed before it began again": ([STARTED, event("preempted", 50), event("crashed", 0)], records(5), "crashed"),
    "running": ([STARTED], records(5), "running"),
    "killed": ([STARTED], records(5, LONG_AGO), "silent"),
    "old, done": ([], records(10, LONG_AGO, timed=False), "done"),
    "old, killed": ([], records(5, LONG_AGO, timed=False), "silent"),
    "imported": ([], [], "untrained"),
}


@pytest.mark.parametrize(("events", "metrics", "state"), STATES.values(), ids=STATES.keys())
def test_state(tmp_path, events, metrics, state):
    folder = make_run(tmp_path / "run", metrics, events)
    for file in folder.iterdir():
        os.utime(file, (NOW - LONG_AGO, NOW - LONG_AGO))
    assert read_run(folder, NOW).state == state


def test_a_run_of_slow_steps_may_be_silent_for_longer(tmp_path):
    slow = [record | {"seconds_per_step": 100.0} for record in records(5, 1_900)]
    assert read_run(make_run(tmp_path / "slow", slow, [STARTED]), NOW).state == "running"
    assert read_run(make_run(tmp_path / "fast", records(5, 1_900), [STARTED]), NOW).state == "silent"
    seldom = [record | {"seconds_per_step": 30.0} for record in records(5, 2_900)]
    assert read_run(make_run(tmp_path / "seldom", seldom, [STARTED], log_every=50), NOW).state == "running"


def test_why_it_is_silent(tmp_path):
    run = read_run(make_run(tmp_path / "run", records(5, 7_500), [STARTED]), NOW)
    assert run.why == "killed, or hangs: nothing written for 2 h 5 min"
    assert run.active == NOW - 7_500


def test_of_several_processes_the_first_to_fail_says_why(tmp_path):
    ends = [event("crashed", 40, message=f"of process {process}", process=process) for process in (2, 0, 1)]
    again = [event("crashed", 40, message="again", process=process) for process in (1, 2)]
    for number, (endings, why) in enumerate([(ends, "process 2: of process 2"), (ends + again, "process 1: again")]):
        run = read_run(make_run(tmp_path / str(number), records(4), [STARTED, event("preempted"), *endings]), NOW)
        assert (run.state, run.why) == ("crashed", why)


def test_figures(tmp_path):
    lines = [*records(3), {"step": 40, "loss": None, "eval_loss": 3.5}]
    events = [STARTED, event("preempted", 10), event("resumed", 10), event("resumed", 10)]
    run = read_run(make_run(tmp_path / "run", lines, events), NOW)
    assert (run.step, run.steps, run.restarts, run.name) == (40, 100, 2, "run")
    assert math.isnan(run.last("loss")) and run.last("eval_loss") == 3.5 and run.last("reward") is None
    assert run.last("tokens_per_second") == 530.0
    assert [e.name for e in run.events if e.is_fault] == ["preempted"]


def test_an_adapter_is_called_after_its_base(tmp_path):
    assert read_run(make_run(tmp_path / "base/adapters/qa")).name == "base/adapters/qa"


def test_broken_lines_are_passed_over(tmp_path):
    folder = make_run(tmp_path / "run")
    broken = 'null\n[1]\n"step"\n{"step": "ten"}\n{"step": true}\n{"loss": 1}\n\x00\n{"step": 20, "lo'
    write_lines(folder / "metrics.jsonl", records(1), broken)
    write_lines(folder / "events.jsonl", [{"event": "odd", "time": "noon", "step": -1}, {"event": 5}], broken)
    (folder / "samples").mkdir()
    (folder / "samples" / "00000001.jsonl").write_bytes(b'\xff\xfe\n{"prompt": "a", "answer": "b", "reward": "x"}\n')
    for name in ("newest.jsonl", "00000002.txt"):
        (folder / "samples" / name).write_text('{"prompt": "of no step"}\n')
    run = read_run(folder, NOW)
    assert [record["step"] for record in run.metrics] == [10]
    assert [(e.name, e.time, e.step, e.is_fault) for e in run.events] == [("odd", None, None, True)]
    assert [tuple(sample) for sample in run.samples] == [(1, "a", "b", None)]


def test_the_samples_of_the_newest_steps_come_first(tmp_path):
    answers = lambda step: [{"prompt": f"{step}?", "answer": f"{n}!", "reward": n / 4} for n in range(3)]  # noqa: E731
    made = make_run(tmp_path / "run", records(9), samples={step: answers(step) for step in range(1, 90, 2)})
    samples = read_run(made, NOW).samples
    assert len(samples) == MOST_SAMPLES
    assert [tuple(sample) for sample in samples[:4]] == [
        (89, "89?", "0!", 0.0),
        (89, "89?", "1!", 0.25),
        (89, "89?", "2!", 0.5),
        (87, "87?", "0!", 0.0),
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"architectures": []}', '{"model": {}, "train": 3}', "\x00"], ids=repr)
def test_a_config_of_no_run(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is (broken|not that of a run)") as error:
        read_run(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_no_config(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="no run is there"):
            read_run(folder)


def test_a_config_of_another_version_is_read(tmp_path):
    folder = make_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    del config["train"]["steps"]
    (folder / "config.json").write_text(json.dumps(config | {"novel": 1}))
    assert read_run(folder).steps is None
