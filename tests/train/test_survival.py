"""What watches over a run: spikes, rollbacks, replicas, hangs, slow devices, how often to save, what is told."""

import json
import math
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parent))
import tiny_run

from jaxllm.errors import LOST, UserError
from jaxllm.report import listing
from jaxllm.report.page import page
from jaxllm.report.run import read_run
from jaxllm.train import loop
from jaxllm.train.checkpoint.files import damage_of, list_files
from jaxllm.train.checkpoint.interval import advice, best_interval, failure_seconds
from jaxllm.train.checkpoint.places import OnDisk
from jaxllm.train.metrics import read_metrics
from jaxllm.train.source import DatasetSource
from jaxllm.train.watch.audit import Audit
from jaxllm.train.watch.events import Events
from jaxllm.train.watch.self_test import Tested, findings, self_test
from jaxllm.train.watch.sinks import JsonLines
from jaxllm.train.watch.spikes import Spikes
from jaxllm.train.watch.watchdog import Watchdog

STEPS = {"train.steps": 16, "train.checkpoint_every": 4, "train.spike_window": 4, "train.eval_every": 8}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    tiny_run.write_text(path)
    return path


def train(text, workdir, source=DatasetSource, devices=1, **changes):
    config = tiny_run.tiny_config(text, text.parent / "cache", **(STEPS | changes))
    return loop.train(config, workdir, devices=jax.devices()[:devices], open_source=source)


def events(workdir, kind=None):
    lines = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def test_the_z_score_is_that_of_the_window_before():
    spikes, draw = Spikes(8, 3.0), np.random.default_rng(0)
    losses = draw.normal(2.0, 0.1, 20).tolist()
    for step, loss in enumerate(losses[:-1], 1):
        assert math.isinf(spikes.limits(step)[0]) == (step < 8 + 2)
        spikes.read(step, loss, 1.0)
    past = losses[-9:-1]
    expected = (9.0 - statistics.fmean(past)) / statistics.pstdev(past)
    again = Spikes(8, 3.0)
    again.restore(json.loads(json.dumps(spikes.state())))
    limit = statistics.fmean(losses[-10:-2]) + 3 * statistics.pstdev(losses[-10:-2])
    assert again.limits(20)[0] == pytest.approx(limit)  # of steps up to 18
    assert spikes.read(20, 9.0, 1.0) == again.read(20, 9.0, 1.0) == pytest.approx(expected)
    assert spikes.on_end == 1 and spikes.read(21, float("nan"), 1.0) == 0


class Poisoned(DatasetSource):
    """Some of the batches, by the position of their rows, are of one token over and over."""

    poisoned = range(8 * 8, 10 * 8)  # the batches of steps 9 and 10

    def next(self, state):
        position, batch = self._loader.state()["rows"], super().next(state)
        if position not in self.poisoned:
            return batch
        return batch._replace(tokens=(batch.tokens * 7919 + position) % 280)


def test_a_spike_is_logged_or_skipped(text, tmp_path):
    assert train(text, tmp_path / "log", Poisoned, **{"train.spike_z": 3.0}) == 0
    found = events(tmp_path / "log", "spike")
    assert found and found[0]["step"] == 9
    assert read_metrics(tmp_path / "log" / "metrics.jsonl")[-1]["nonfinite"] == 0
    assert train(text, tmp_path / "skip", Poisoned, **{"train.spike_z": 3.0, "train.spike": "skip"}) == 0
    assert events(tmp_path / "skip", "skipped")[0]["step"] == 10  # what step 9 is held against ends with step 7
    assert read_metrics(tmp_path / "skip" / "metrics.jsonl")[9]["nonfinite"] == 1


def test_a_run_goes_back_and_leaves_out_the_data_that_led_to_a_spike(text, tmp_path):
    """As if those batches had not been there: the steps after it equal those of a run that never had them."""
    policy = {"train.spike_z": 3.0, "train.spike": "rollback", "train.spike_steps": 1}
    assert train(text, tmp_path / "back", Poisoned, **policy) == 0
    told = events(tmp_path / "back", "rolled_back")
    assert len(told) == 1 and told[0]["to"] == 8
    skips = json.loads((tmp_path / "back" / "skips.json").read_text())
    assert [skip["step"] for skip in skips] == [8]
    first = skips[0]["data"]["rows"]

    class Without(DatasetSource):
        def next(self, state):
            if self._loader.state()["rows"] == 8 * 8:
                self._loader.restore(self._loader.state() | {"rows": first})
            return super().next(state)

    assert train(text, tmp_path / "without", Without) == 0
    got, want = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("back", "without"))
    assert [r["step"] for r in got] == list(range(1, 17))
    assert [r["loss"] for r in got] == [r["loss"] for r in want]


def test_replicas_that_drift_apart_end_the_run_by_name(text, tmp_path, monkeypatch):
    dispatch = loop.Run._dispatch

    def flip_a_bit(run):
        dispatch(run)
        if run.step == 6:
            norm = run.state.params["final_norm"]["scale"]
            shards = [np.array(shard.data) for shard in norm.addressable_shards]
            shards[3][1] = np.nextafter(shards[3][1], np.float32(9))
            placed = [jax.device_put(a, s.device) for a, s in zip(shards, norm.addressable_shards, strict=True)]
            run.state.params["final_norm"]["scale"] = jax.make_array_from_single_device_arrays(
                norm.shape, norm.sharding, placed
            )

    monkeypatch.setattr(loop.Run, "_dispatch", flip_a_bit)
    assert train(text, tmp_path, devices=4, **{"train.audit_every": 3, "layout.zero_stage": 0}) == 1
    stopped = events(tmp_path, "stopped")
    assert len(stopped) == 1 and "final_norm/scale on device 3 (process 0)" in stopped[0]["message"]


def test_the_audit_finds_one_bit_and_nothing_where_all_is_equal():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    tree = {"x": (P("a"), jnp.arange(16.0)), "y": (P(), jnp.ones((3, 5), jnp.bfloat16)), "z": (P(), jnp.array(7))}
    placed = {name: jax.device_put(value, NamedSharding(mesh, spec)) for name, (spec, value) in tree.items()}
    abstract = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding), placed)
    audit = Audit(abstract, mesh)
    assert audit.differences(placed) == []
    shards = [np.array(shard.data) for shard in placed["x"].addressable_shards]
    shards[6][3] = np.nextafter(shards[6][3], np.float32(99))
    moved = [jax.device_put(a, s.device) for a, s in zip(shards, placed["x"].addressable_shards, strict=True)]
    placed["x"] = jax.make_array_from_single_device_arrays((16,), placed["x"].sharding, moved)
    (found,) = audit.differences(placed)
    assert found.path == "x" and found.device.id == placed["x"].addressable_shards[6].device.id


def test_a_process_in_which_nothing_moves_ends(capfd):
    left = threading.Event()
    codes, written = [], []
    with Watchdog(0.3, print, written.append, leave=lambda code: (codes.append(code), left.set())) as watchdog:
        for _ in range(6):
            watchdog.alive("computing step 3")
            time.sleep(0.1)
        assert not codes
        assert left.wait(20)
    assert codes[0] == LOST and written[0].startswith("nothing moved for")
    told = capfd.readouterr().err
    assert "nothing moved for" in told and "while computing step 3" in told and "Thread" in told
    with Watchdog(0.05, print, written.append, leave=codes.append) as watchdog:
        watchdog.alive("compiling", starting=True)
        codes.clear()
        watchdog.goes_on("compiling more")
        time.sleep(0.4)
    assert not codes


def test_a_disk_that_does_not_answer_keeps_no_process_from_ending(monkeypatch):
    monkeypatch.setattr("jaxllm.train.watch.watchdog.WRITE_SECONDS", 0.1)
    answers, left = threading.Event(), threading.Event()
    with Watchdog(0.1, print, lambda why: answers.wait(), leave=lambda code: left.set()) as watchdog:
        watchdog.alive("saving")
        assert left.wait(20)
    answers.set()


def test_devices_are_tested_and_the_odd_one_is_named():
    tested = self_test(jax.devices()[:2], size=64)
    assert [test.device for test in tested] == [0, 1] and tested[0].result == tested[1].result
    tests = [Tested(i, i // 4, 1e-3, 5.0) for i in range(8)]
    assert findings(tests)[1] == []
    tests[5] = tests[5]._replace(seconds=1.3e-3)
    tests[2] = tests[2]._replace(result=5.5)
    slow, wrong = findings(tests)[1]
    assert slow.startswith("device 5 (process 1) takes 1.30 times") and wrong.startswith(
        "device 2 (process 0) computes 5.5"
    )


def test_the_interval_of_saves_is_youngs():
    """512 GPUs with saves of 40 s: a failure every 98 h, a save every hour and a half (Llama 3's rate)."""
    assert failure_seconds(512) / 3600 == pytest.approx(97.66, abs=0.01)
    assert best_interval(40, 512) / 3600 == pytest.approx(1.473, abs=0.001)
    assert "one every 88 min = 530 steps" in advice(40, 10.0, 512, 200)


def test_a_line_that_the_disk_does_not_take_is_written_later(tmp_path, monkeypatch):
    lines = JsonLines(tmp_path / "lines")
    lines.write({"step": 1})
    write, full = os.write, [True]
    monkeypatch.setattr(
        "jaxllm.train.watch.sinks.os.write", lambda f, d: _torn(write, f, d) if full[0] else write(f, d)
    )
    lines.write({"step": 2})
    with pytest.raises(OSError):
        lines.sync()
    assert (tmp_path / "lines").read_text() == '{"step": 1}\n'
    full[0] = False
    lines.write({"step": 3})
    lines.sync()
    assert (tmp_path / "lines").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    lines.close()


def _torn(write, file, data):
    """Four bytes go, then no more."""
    if data.startswith(b"{"):
        return write(file, data[:4])
    raise OSError(28, "No space left on device")


def test_files_are_listed_and_held_against_the_list(tmp_path):
    place, file = OnDisk(tmp_path), tmp_path / "7" / "a" / "x"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1234")
    assert damage_of(place, 7) is None
    list_files(place, 7)
    assert damage_of(place, 7) is None
    file.write_bytes(b"1235")
    assert "another checksum" in damage_of(place, 7)
    file.write_bytes(b"12")
    assert "2 bytes, not the 4" in damage_of(place, 7)
    file.unlink()
    assert "a/x is missing" in damage_of(place, 7)


def test_metrics_tell_of_waiting_and_weights_and_biases_gets_them_if_asked(text, tmp_path, monkeypatch):
    class FakeRun:
        logged: ClassVar[list] = []

        def log(self, record, step):
            self.logged.append((step, record["loss"]))

        def finish(self):
            self.logged.append("finished")

    fake = type(sys)("wandb")
    fake.init = lambda **how: FakeRun() if how["project"] == "ours" else pytest.fail(str(how))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert train(text, tmp_path, **{"train.wandb_project": "ours", "train.steps": 6}) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert all({"data_wait", "host_seconds", "time"} <= set(record) for record in records)
    assert FakeRun.logged == [(r["step"], r["loss"]) for r in records] + ["finished"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs the wandb package"):
        train(text, tmp_path / "other", **{"train.wandb_project": "ours", "train.steps": 6})


def test_what_happened_is_written_down(text, tmp_path):
    assert train(text, tmp_path, **{"train.steps": 8}) == 0
    assert [e["event"] for e in events(tmp_path)] == ["started", "saved", "saved", "done"]


class Failing(DatasetSource):
    """Raises for the batch of step 6, whatever is in `raises`."""

    raises: ClassVar[BaseException]

    def next(self, state):
        if self._loader.state()["rows"] == 5 * 8:
            raise self.raises
        return super().next(state)


FAILURES = {
    "crashed": (ValueError("a broken\nbatch"), "crashed", "ValueError: a broken"),
    "a mistake": (UserError("the data are gone.\nPut them back."), "stopped", "the data are gone.\nPut them back."),
    "a full disk": (OSError(28, "No space left on device"), "stopped", "no space left on the disk of"),
    "interrupted": (KeyboardInterrupt(), "stopped", "interrupted"),
}


@pytest.mark.parametrize(("raised", "event", "says"), FAILURES.values(), ids=FAILURES.keys())
def test_how_a_run_fails_is_written_and_shown(text, tmp_path, monkeypatch, raised, event, says):
    monkeypatch.setattr(Failing, "raises", raised, raising=False)
    with pytest.raises(UserError if isinstance(raised, OSError) else type(raised)):
        train(text, tmp_path, Failing)
    last = events(tmp_path)[-1]
    assert (last["event"], last["step"]) == (event, 5) and last["message"].startswith(says)
    run = read_run(tmp_path)
    assert run.state == event and run.why == last["message"]
    assert f" {event} " in list(listing.lines([run], tmp_path.parent))[1] and says in page([run])
    assert train(text, tmp_path) == 0 and read_run(tmp_path).state == "done"


def test_a_mistake_before_a_run_has_begun_is_not_written(text, tmp_path):
    with pytest.raises(UserError):
        train(text, tmp_path / "new", **{"mesh.data": 3, "data.batch_size": 8}, devices=3)
    assert not (tmp_path / "new").exists()
    assert train(text, tmp_path / "done", **{"train.steps": 8}) == 0
    before = events(tmp_path / "done")
    with pytest.raises(UserError):
        train(text, tmp_path / "done", **{"train.steps": 8, "model.embed_dim": 32})
    assert events(tmp_path / "done") == before


def test_the_end_is_on_the_disk_or_nowhere(tmp_path, monkeypatch):
    told = Events(tmp_path / "none", print)
    told.write_end("crashed", "nobody will know")
    assert not (tmp_path / "none").exists()
    told = Events(tmp_path, print)
    told.note("started", 0)
    monkeypatch.setattr("jaxllm.train.watch.sinks.os.write", lambda file, data: _torn(lambda f, d: 4, file, data))
    told.write_end("hung", "the disk is full")
    assert [event["event"] for event in events(tmp_path)] == ["started"]
    monkeypatch.undo()
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    told.note("saved", 7)
    told.write_end("hung", "nothing moved")
    assert [(event["event"], event.get("process")) for event in events(tmp_path)] == [("started", None), ("hung", 3)]
    told.close()
