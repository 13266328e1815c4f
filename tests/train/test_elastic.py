"""A run that goes on with fewer or more devices, each time under another layout: its losses are those of one never
interrupted."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny_run

from jaxllm.train import loop
from jaxllm.train.metrics import read_metrics
from tests.train.test_loop import preempted_at

STEPS = {"train.steps": 12, "train.checkpoint_every": 100, "model.num_layers": 4, "model.num_heads": 4}
# Devices, and what differs from the layout before: steps 1 to 4, 5 to 8, 9 to 12.
JOURNEYS = {
    "pipeline to none and back": [
        (8, {"mesh.pipeline": 2, "mesh.model": 2, "layout.num_microbatches": 2, "layout.zero_stage": 1}),
        (4, {"mesh.model": 2, "layout.zero_stage": 3, "layout.scan_layers": 0}),
        (8, {"mesh.pipeline": 4, "layout.num_microbatches": 4, "layout.zero_stage": 2}),
    ],
    "none to a pipeline and back": [
        (8, {"mesh.model": 4, "layout.zero_stage": 3}),
        (4, {"mesh.pipeline": 2, "layout.num_microbatches": 2, "layout.zero_stage": 0}),
        (8, {"layout.zero_stage": 2, "layout.scan_layers": 0}),
    ],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    tiny_run.write_text(path)
    return path


def train(text, workdir, devices, **changes):
    config = tiny_run.tiny_config(text, text.parent / "cache", **(STEPS | changes))
    return loop.train(config, workdir, devices=jax.devices()[:devices])


@pytest.fixture(scope="module")
def straight(text):
    assert train(text, text.parent / "straight", 1) == loop.DONE
    return read_metrics(text.parent / "straight" / "metrics.jsonl")


@pytest.mark.parametrize("journey", JOURNEYS)
def test_eight_devices_then_four_then_eight(text, straight, tmp_path, monkeypatch, journey):
    for last, (devices, changes) in zip((4, 8, None), JOURNEYS[journey], strict=True):
        with monkeypatch.context() as patch:
            if last:
                preempted_at(patch, last)
            assert train(text, tmp_path, devices, **changes) == (loop.PREEMPTED if last else loop.DONE)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in records] == pytest.approx([r[name] for r in straight], rel=1e-5)
    assert [r["tokens_hash"] for r in records] == [r["tokens_hash"] for r in straight]
