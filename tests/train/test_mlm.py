"""A run of masked language modelling: what it logs, its held-out loss, and resuming."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import kill_campaign
import tiny_run

from jaxllm.cli.main import main
from jaxllm.data.dataset import prepare
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError
from jaxllm.generate.engine import Engine
from jaxllm.generate.run import open_run
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.steps import STEPS
from jaxllm.train import loop
from jaxllm.train.metrics import read_metrics
from tests.train.test_loop import preempted_at

STEPS_TAKEN = 12


def mlm_config(text: Path, **changes):
    fields = {"model.causal": False, "train.steps": STEPS_TAKEN, "model.norm_position": "post"}
    config = tiny_run.tiny_config(text, text.parent / "cache", **(fields | changes))
    return dataclasses.replace(config, train_step="mlm")


def train(text, workdir, devices=1, **changes) -> int:
    return loop.train(mlm_config(text, **changes), workdir, devices=jax.devices()[:devices], quiet=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    tiny_run.write_text(path)
    return path


@pytest.fixture(scope="module")
def straight(text):
    assert train(text, text.parent / "straight") == 0
    return text.parent / "straight"


def test_what_a_run_says(straight):
    """The held-out loss, and no bits a character: most of the text costs nothing, it is shown."""
    records = read_metrics(straight / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS_TAKEN + 1))
    assert [record["step"] for record in records if "eval_loss" in record] == [10, 12]
    assert not any("eval_bits_per_char" in record for record in records)
    assert all(8 < record["counted_tokens"] < 0.25 * 8 * 16 for record in records)
    assert load_tokenizer(straight / "tokenizer").mask_id is not None


def test_the_held_out_loss_is_that_of_the_masked_tokens(text, straight):
    """Against a loop over the held-out rows, from the logits of the last checkpoint."""
    config = mlm_config(text)
    run = open_run(straight)
    data = prepare(config.data, length=16, kind=STEPS["mlm"].batch, progress=False)
    layout = make_layout(MeshConfig(data=1), LayoutConfig(), devices=jax.devices()[:1])
    batches = data.eval_batches(layout.sharding("batch", None), batch_size=8)
    nats = []
    model = run.spec.merge(jax.device_put(jax.device_get(run.weights)))
    for _, batch in zip(range(config.train.eval_batches), batches, strict=False):
        logits = model.head.logits(model(batch.tokens, batch.positions, batch.segment_ids))
        scores = np.asarray(logits, np.float64)
        for place in zip(*np.nonzero(np.asarray(batch.loss_mask)), strict=True):
            nats.append(np.log(np.exp(scores[place]).sum()) - scores[place][int(batch.targets[place])])
    assert read_metrics(straight / "metrics.jsonl")[-1]["eval_loss"] == pytest.approx(np.mean(nats), rel=1e-5)


def test_resumed_bit_for_bit(text, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        preempted_at(patch, 5)
        assert train(text, tmp_path) == 75
    assert train(text, tmp_path) == 0
    assert kill_campaign.records(tmp_path) == kill_campaign.records(straight)
    assert kill_campaign.last_hashes(tmp_path) == kill_campaign.last_hashes(straight)


def test_another_layout_reads_the_same_and_learns_the_same(text, straight, tmp_path):
    changes = {"mesh.data": 2, "mesh.context": 2, "layout.num_microbatches": 2, "layout.zero_stage": 2}
    assert train(text, tmp_path, devices=4, **changes) == 0
    got, want = kill_campaign.records(tmp_path), kill_campaign.records(straight)
    assert [record["tokens_hash"] for record in got] == [record["tokens_hash"] for record in want]
    for name in ("loss", "grad_norm", "eval_loss"):
        assert [r.get(name, 0) for r in got] == pytest.approx([r.get(name, 0) for r in want], rel=1e-5), name


def mistake(argv, capsys) -> str:
    code, said = main([str(argument) for argument in argv]), capsys.readouterr().err.strip().splitlines()
    assert code == 2 and not any("Traceback" in line for line in said)
    return said[-1]


def test_it_fills_masks(straight, capsys):
    prompts = ["--prompt", "the <mask> sat on", "--prompt", "a<mask>"]
    assert main(["generate", f"--workdir={straight}", *prompts, "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"].startswith("the") and first["text"].endswith(" sat on") and len(first["tokens"]) == 1
    assert second["prompt"] == "a<mask>" and second["text"] != "a"


def test_it_does_not_continue_texts(straight, text, capsys):
    """generate without a mask, chat, and evaluation, which would take what it sees for what it knows."""
    with pytest.raises(UserError, match="does not continue a text"):
        Engine(open_run(straight))
    run = f"--workdir={straight}"
    assert "Write <mask> where a token is missing." in mistake(["generate", run, "--prompt=the cat"], capsys)
    assert "sees what comes next does not continue a text." in mistake(["chat", run], capsys)
    assert "sees what comes next gives texts no prob" in mistake(["evaluate", run, f"--input={text}"], capsys)


@pytest.mark.parametrize("name", ["mlm", "pretrain"])
def test_a_step_and_a_model_that_do_not_fit(text, tmp_path, name):
    config = mlm_config(text, **{"model.causal": name == "mlm"})
    other = {"mlm": "pretrain or sft or lora or prompt or reward or dpo or ppo or grpo", "pretrain": "mlm"}[name]
    message = (
        f"train_step={name} does not go with config.model.causal={name == 'mlm'}: .* "
        f"Use --config.train_step={other}, or --config.model.causal={name == 'pretrain'}."
    )
    with pytest.raises(UserError, match=message):
        loop.train(dataclasses.replace(config, train_step=name), tmp_path)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_is_none(text, tmp_path, fraction):
    with pytest.raises(UserError, match=r"config.data.mask_fraction=.* must be between 0 and 1\."):
        train(text, tmp_path, **{"data.mask_fraction": fraction})
