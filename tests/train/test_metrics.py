"""metrics.jsonl reads like an uninterrupted run; FLOPs a token against a count by hand; what stderr shows."""

import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import model_spec
from jaxllm.train.flops import flops_per_token, peak_flops
from jaxllm.train.metrics import MetricsWriter, ProgressReport, Stopwatch, describe, duration, read_metrics


def records(steps):
    return [{"step": step, "loss": 1 / 3 + step, "tokens_hash": f"{step:08x}"} for step in steps]


def write(workdir, steps, restored_step=0):
    writer = MetricsWriter(workdir, restored_step)
    for record in records(steps):
        writer.write(record)
    writer.sync()
    writer.close()


def test_a_resumed_file_equals_that_of_an_uninterrupted_run(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for folder in (straight, resumed):
        folder.mkdir()
    write(straight, range(1, 9))
    write(resumed, range(1, 7))
    path = resumed / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 5)  # killed inside a line
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]
    write(resumed, range(5, 9), restored_step=4)
    assert path.read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert read_metrics(path) == records(range(1, 9))
    write(resumed, range(1, 3), restored_step=0)  # no checkpoint: from the start
    assert read_metrics(path) == records(range(1, 3))


def test_what_is_not_finite_becomes_null_and_what_is_absent_stays_out(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "mfu": None})
    writer.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None}


def test_tensorboard_holds_the_same_scalars(tmp_path):
    write(tmp_path, [1, 2])
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert events.count(b"loss") >= 2
    assert np.float32(1 / 3 + 2).tobytes() in events and np.float32(1 / 3 + 1).tobytes() in events


def test_flops_a_token_by_hand():
    sizes = {"num_layers": 2, "embed_dim": 4, "num_heads": 2, "vocab_size": 10, "max_length": 7, "use_bias": False}
    layers = 2 * (4 * 4 * 4 + 2 * 4 * 16 + 2 * 4) + 4  # attention, mlp, two norms; the last norm
    tied = model_spec(ModelConfig(**sizes, tied_head=True).resolved())
    assert flops_per_token(tied, length=5) == 6 * (layers + 10 * 4) + 12 * 2 * 2 * 2 * 5
    untied = model_spec(ModelConfig(**sizes, tied_head=False).resolved())
    assert flops_per_token(untied, length=5) == flops_per_token(tied, length=5)
    assert untied.num_parameters == tied.num_parameters + 40


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("TPU v4", 275),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("cpu", None),
        ("NVIDIA GeForce RTX 3090", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("TPU v4 lite", None),
    ],
)
def test_peak_by_device_kind(kind, tflops):
    peak = peak_flops(SimpleNamespace(device_kind=kind))
    assert peak == (tflops and tflops * 1e12)


def test_the_stopwatch_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch()

    def steps(*seconds):
        for spent in seconds:
            now[0] += spent
            watch.step_done()

    steps(60.0)  # compiles
    assert watch.lap() is None
    steps(1.0, 3.0)
    assert watch.lap() == 2.0
    steps(1.0)
    watch.pause()
    now[0] += 100.0
    assert watch.lap() is None
    steps(9.0, 4.0)
    assert watch.lap() == 4.0


def test_plain_lines_where_stderr_is_no_terminal():
    stream = io.StringIO()
    report = ProgressReport(stream=stream)
    report.start(total_steps=100)
    report.step(9)
    report.logged({"step": 10, "loss": 3.21, "tokens_per_second": 12345.6, "mfu": 0.4123}, seconds_a_step=2.0)
    report.logged({"step": 20, "loss": 3.0, "eval_loss": 3.5, "eval_bits_per_char": 6.71234}, seconds_a_step=None)
    report.say("[checkpoint] saved")
    report.close()
    assert stream.getvalue().splitlines() == [
        "step 10/100  loss 3.2100  12,346 tokens/s  MFU 41.2 %  3 min left",
        "step 20/100  loss 3.0000  eval loss 3.5000  6.712 bits/char",
        "[checkpoint] saved",
    ]


def test_a_bar_where_it_is_one():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    report = ProgressReport(stream=stream)
    report.start(total_steps=100, step=40)
    report.logged({"step": 50, "loss": 3.21}, seconds_a_step=0.1)
    report.close()
    assert "50/100" in stream.getvalue() and "loss 3.2100" in stream.getvalue() and "5 s left" in stream.getvalue()


def test_durations():
    assert [duration(s) for s in (3.4, 89, 300, 89 * 60, 3 * 3600 + 300)] == [
        "3 s",
        "89 s",
        "5 min",
        "89 min",
        "3 h 05 min",
    ]
    assert describe({"step": 1, "nonfinite": 2}, None) == "2 steps skipped"
