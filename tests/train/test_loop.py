"""The loop in this process: what a run leaves behind, other layouts, refusals, preemption, non-finite gradients."""

import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import kill_campaign
import tiny_run

from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.data.tokenizer_training import train_tokenizer
from jaxllm.errors import UserError
from jaxllm.train import loop
from jaxllm.train.metrics import Stopwatch, read_metrics
from jaxllm.train.optimizer import make_schedule
from jaxllm.train.watch.monitor import Monitor

STEPS = {"train.steps": 12, "train.profile_start": 5, "train.profile_steps": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The text; programs compiled once are kept for the module."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    tiny_run.write_text(path)
    options = {
        "jax_compilation_cache_dir": str(path.parent / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield path
    for name, value in before.items():
        jax.config.update(name, value)


def train(text, workdir, devices=1, **changes):
    config = tiny_run.tiny_config(text, text.parent / "cache", **(STEPS | changes))
    return loop.train(config, workdir, devices=jax.devices()[:devices])


@pytest.fixture(scope="module")
def straight(text):
    workdir = text.parent / "straight"
    assert train(text, workdir) == 0
    return workdir


def test_what_a_run_leaves_behind(text, straight):
    config = tiny_run.tiny_config(text, text.parent / "cache", **STEPS)
    records = read_metrics(straight / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    schedule = make_schedule(config.optimizer, 12)
    for record in records:
        assert record["learning_rate"] == pytest.approx(float(schedule(record["step"] - 1)))
        assert record["nonfinite"] == 0 and record["grad_norm"] > 0 and record["counted_tokens"] > 0
    assert [record["step"] for record in records if "eval_loss" in record] == [10, 12]
    timed = [record["step"] for record in records if "tokens_per_second" in record]
    assert timed == [2, 3, 4, 6, 7, 8, 10, 12]  # not the first of all (it compiles), nor the first after a pause
    assert 1.0 < records[-1]["eval_bits_per_char"] < records[9]["eval_bits_per_char"] < records[0]["loss"]
    stored = json.loads((straight / "config.json").read_text())
    assert stored["model"]["embed_dim"] == 16 and stored["train"]["steps"] == 12
    assert load_tokenizer(straight / "tokenizer").vocab_size == 280
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["12", "8"]
    assert any(path.is_file() for path in (straight / "profile").rglob("*"))
    assert any((straight / "tensorboard").iterdir())
    assert gc.get_freeze_count() == 0


def test_a_finished_run_is_finished(text, straight, capsys):
    before = (straight / "metrics.jsonl").read_bytes()
    assert train(text, straight) == 0
    assert (straight / "metrics.jsonl").read_bytes() == before
    shown = capsys.readouterr().err
    assert "resumed at step 12" in shown
    for line in (
        "model: 11,328 parameters, 256 of them only looked up",
        "layers/mlp/up/kernel           decayed  [2, 16, 64]",
        "layers/mlp/up/bias             -        [2, 64]",
        "tokens a step: 128 = 8 sequences x 16",
        "attention: xla",
        "ZeRO 1",
    ):
        assert line in shown, shown


def preempted_at(monkeypatch, step):
    """Sends the scheduler's warning when that step is logged."""
    log = Monitor.log

    def log_and_warn(self, record):
        log(self, record)
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Monitor, "log", log_and_warn)


@pytest.fixture(scope="module")
def preempted(text):
    """The same run, warned after step 5 and so saved at the next."""
    workdir = text.parent / "preempted"
    with pytest.MonkeyPatch.context() as monkeypatch:
        preempted_at(monkeypatch, 5)
        handler = signal.getsignal(signal.SIGUSR1)
        assert train(text, workdir) == 75
        assert signal.getsignal(signal.SIGUSR1) == handler
    assert kill_campaign.records(workdir)[-1]["step"] in (6, 7)
    return workdir


def test_preempted_and_resumed_on_the_same_layout(text, straight, preempted, tmp_path, capsys):
    workdir = shutil.copytree(preempted, tmp_path / "run")
    assert train(text, workdir, **{"optimizer.weight_decay": 0.1, "train.log_every": 1}) == 0
    assert kill_campaign.records(workdir) == kill_campaign.records(straight)
    assert kill_campaign.last_hashes(workdir) == kill_campaign.last_hashes(straight)
    assert "changed since" not in capsys.readouterr().err


def test_resumed_on_another_layout(text, straight, preempted, tmp_path, capsys):
    workdir = shutil.copytree(preempted, tmp_path / "run")
    changes = {"mesh.data": 2, "mesh.model": 2, "layout.zero_stage": 3, "layout.num_microbatches": 2}
    assert train(text, workdir, devices=4, **changes) == 0
    assert "config.mesh.model was 1, is 2" in capsys.readouterr().err
    got, want = kill_campaign.records(workdir), kill_campaign.records(straight)
    assert [record["tokens_hash"] for record in got] == [record["tokens_hash"] for record in want]
    for name in ("loss", "grad_norm", "eval_loss", "learning_rate"):
        assert [r.get(name, 0) for r in got] == pytest.approx([r.get(name, 0) for r in want], rel=1e-5), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.num_layers": 3}, "config.model.num_layers: 2 in the checkpoint, 3 now"),
        ({"model.num_layers": 3, "data.length": 8}, r"num_layers.*\n.*config.data.length: 0 in the checkpoint, 8 now"),
        ({"data.packing": "best_fit"}, "config.data.packing: 'concat' in the checkpoint, 'best_fit' now"),
        ({"data.tokenizer": "bpe:290"}, "config.data.tokenizer: 'bpe:280' in the checkpoint, 'bpe:290' now"),
        ({"optimizer.name": "lion"}, "config.optimizer.name: 'adamw' in the checkpoint, 'lion' now"),
        ({"data.held_out": "0.2"}, "of other data"),
    ],
)
def test_changes_that_would_break_a_run_are_refused(text, straight, changes, message):
    with pytest.raises(UserError, match=message):
        train(text, straight, **changes)


def test_a_run_without_a_checkpoint_leaves_no_tokenizer_to_the_next(text, straight, tmp_path, tokenizer_of_another_run):
    """Killed before its first save, even while it wrote the tokenizer; then started with another."""
    workdir = tmp_path / "run"
    tokenizer_of_another_run(workdir / "tokenizer")
    assert train(text, workdir) == 0
    want = load_tokenizer(straight / "tokenizer").fingerprint
    assert load_tokenizer(workdir / "tokenizer").fingerprint == want


@pytest.fixture(params=["whole", "folder"])
def tokenizer_of_another_run(request):
    def leave(folder):
        folder.mkdir(parents=True)
        if request.param == "whole":
            train_tokenizer(["another text\n"] * 20, vocab_size=270).save(folder)

    return leave


def test_the_tokenizer_must_fit_the_model(text, tmp_path):
    with pytest.raises(UserError, match="vocab_size=100 is below the 280 pieces"):
        train(text, tmp_path, **{"model.vocab_size": 100})
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("every", [4, 1], ids=["read a step later", "read at each save"])
def test_a_gradient_that_stays_non_finite_ends_the_run(text, tmp_path, capsys, every):
    changes = {"optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0, "train.max_nonfinite": 3}
    assert train(text, tmp_path, **changes, **{"train.checkpoint_every": every}) == 1
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[-1]["nonfinite"] == 4 and records[-1]["loss"] is None
    assert "the gradient was not finite for 4 steps on end" in capsys.readouterr().err


def test_a_step_is_timed_before_the_next_is_waited_for(text, tmp_path, monkeypatch):
    """Else two steps would seem to end at once, and the last lap would be too short."""
    fields = {"train.steps": 3, "optimizer.warmup_steps": 1, "data.held_out": ""}
    seen, done = [], Stopwatch.step_done
    monkeypatch.setattr(Stopwatch, "step_done", lambda watch: (seen.append("timed"), done(watch)))
    monkeypatch.setattr(loop, "in_order", lambda state: (seen.append("waited"), state)[1])
    assert train(text, tmp_path, **fields) == 0
    assert seen == ["waited", "timed", "waited", "timed", "waited", "timed"]
