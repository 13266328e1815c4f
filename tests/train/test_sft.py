"""A run of supervised fine-tuning: what it says and leaves, its held-out loss, resuming, and a base with a template."""

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
from jaxllm.data.chat_template import named_template
from jaxllm.data.dataset import prepare
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError
from jaxllm.generate.run import open_run
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.steps import STEPS
from jaxllm.train import loop
from jaxllm.train.metrics import read_metrics
from tests.data.conversations import conversations
from tests.train.test_loop import preempted_at

STEPS_TAKEN = 12
FIELDS = {
    "model.max_length": 256,
    "model.neftune_alpha": 5.0,
    "train.steps": STEPS_TAKEN,
    "train.eval_batches": 0,
    "data.source": "jsonl",
    "data.packing": "best_fit",
    "data.chat_template": "chatml",
    "data.truncation": "drop",
    "data.tokenizer": "bpe:330",
    "data.held_out": "0.1",
}


def sft_config(path: Path, **changes):
    config = tiny_run.tiny_config(path, path.parent / "cache", **(FIELDS | changes))
    return dataclasses.replace(config, train_step="sft")


def train(path, workdir, devices=1, **changes) -> int:
    return loop.train(sft_config(path, **changes), workdir, devices=jax.devices()[:devices], quiet=True)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "a.jsonl"
    records = [{"messages": talk} for talk in conversations(120)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def straight(examples):
    assert train(examples, examples.parent / "straight") == 0
    return examples.parent / "straight"


def test_what_a_run_leaves(straight, capfd):
    records = read_metrics(straight / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS_TAKEN + 1))
    assert [record["step"] for record in records if "eval_loss" in record] == [10, 12]
    assert not any("eval_bits_per_char" in record for record in records)
    assert all(50 < record["counted_tokens"] < 0.7 * 8 * 256 for record in records)
    template = (straight / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    assert template == named_template("chatml")
    tokenizer = load_tokenizer(straight / "tokenizer")
    assert tokenizer.end_ids == {tokenizer.eos_id, tokenizer.specials["<|im_end|>"]}


def test_the_held_out_loss_is_that_of_what_is_learned(examples, straight):
    """Against a loop over the held-out rows, from the logits of the last checkpoint."""
    config, run = sft_config(examples), open_run(straight)
    data = prepare(config.data, length=256, kind=STEPS["sft"].batch, progress=False)
    layout = make_layout(MeshConfig(data=1), LayoutConfig(), devices=jax.devices()[:1])
    model = run.spec.merge(jax.device_put(jax.device_get(run.weights)))
    nats = []
    for batch in data.eval_batches(layout.sharding("batch", None), batch_size=8):
        logits = np.asarray(model.head.logits(model(batch.tokens, batch.positions, batch.segment_ids)), np.float64)
        for row, place in zip(*np.nonzero(np.asarray(batch.loss_mask)), strict=True):
            scores = logits[row, place - 1]
            nats.append(np.log(np.exp(scores).sum()) - scores[int(batch.tokens[row, place])])
    assert len(nats) > 300
    assert read_metrics(straight / "metrics.jsonl")[-1]["eval_loss"] == pytest.approx(np.mean(nats), rel=1e-5)


def test_resumed_bit_for_bit(examples, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        preempted_at(patch, 5)
        assert train(examples, tmp_path) == 75
    for name, value in {"chat_template": "llama3", "supervise": "all", "truncation": "cut"}.items():
        with pytest.raises(UserError, match=rf"holds another run(.|\n)*config.data.{name}: .* now"):
            train(examples, tmp_path, **{f"data.{name}": value})
    assert train(examples, tmp_path) == 0
    assert kill_campaign.records(tmp_path) == kill_campaign.records(straight)
    assert kill_campaign.last_hashes(tmp_path) == kill_campaign.last_hashes(straight)


def test_a_base_whose_tokenizer_knows_the_template(straight, tmp_path, examples):
    """Pretraining with a template named trains a tokenizer for it; its fine-tuning needs no name, and chat takes it."""
    texts = tmp_path / "text.txt"
    tiny_run.write_text(texts)
    changes = {"data.chat_template": "chatml", "model.max_length": 256, "train.steps": 10, "data.tokenizer": "bpe:290"}
    base = tiny_run.tiny_config(texts, tmp_path / "cache", **changes)
    assert loop.train(base, tmp_path / "base", devices=jax.devices()[:1], quiet=True) == 0
    names = {"tokenizer": str(tmp_path / "base" / "tokenizer"), "chat_template": "", "packing": "none"}
    fine = {f"data.{name}": value for name, value in names.items()} | {"train.init_from": str(tmp_path / "base")}
    assert (
        train(examples, tmp_path / "fine", **fine, **{"data.length": 128, "data.truncation": "cut", "train.steps": 10})
        == 0
    )
    files = [(tmp_path / run / "tokenizer" / "chat_template.jinja").read_bytes() for run in ("base", "fine")]
    assert files[0] == files[1] == named_template("chatml").encode()


def test_it_talks(straight, capsys, monkeypatch):
    """A system prompt, history, and the words as they come; the end of a turn ends an answer."""
    asked = iter(["hello", "again"])
    monkeypatch.setattr("builtins.input", lambda _: next(asked, None) or (_ for _ in ()).throw(EOFError()))
    run = [f"--workdir={straight}", "--system=Be brief.", "--max_new_tokens=5", "--temperature=0"]
    assert main(["chat", *run]) == 0
    assert "Traceback" not in capsys.readouterr().err
