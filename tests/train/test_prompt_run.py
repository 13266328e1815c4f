"""Prompts and prefixes as runs: resuming, what a checkpoint holds, being used by name, and bad input."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxllm.cli.main import main
from jaxllm.errors import UserError
from jaxllm.generate.run import open_run
from jaxllm.model.adapter_config import AdapterConfig
from tests.train import test_adapter_run
from tests.train.test_adapter_run import base, examples, kill_campaign, train  # noqa: F401  (two are fixtures)
from tests.train.test_loop import preempted_at

SMALL = AdapterConfig(kind="prompt", num_virtual_tokens=4, encoder_dim=8)
ADAPTERS = {
    "prefix_projected": dataclasses.replace(SMALL, kind="prefix", prefix_projection=True, base_weights="nf4"),
    "text": dataclasses.replace(SMALL, prompt_init="text", prompt_text="the cat"),
}


def prompt_config(examples, base, adapter, layout="one", **changes):  # noqa: F811
    config = test_adapter_run.adapter_config(examples, base, adapter, layout, **changes)
    return dataclasses.replace(config, train_step="prompt")


def test_resumed_bit_for_bit(examples, base, tmp_path, monkeypatch):  # noqa: F811
    layout = "pipeline"
    config = prompt_config(examples, base, ADAPTERS["prefix_projected"], layout)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train(config, straight, layout) == 0
    with monkeypatch.context() as patch:
        preempted_at(patch, 5)
        assert train(config, broken, layout) == 75
    assert train(config, broken, layout) == 0
    assert kill_campaign.records(broken) == kill_campaign.records(straight)
    assert kill_campaign.last_hashes(broken) == kill_campaign.last_hashes(straight)
    losses = [record["loss"] for record in kill_campaign.records(straight)]
    assert len(set(losses)) == len(losses)  # something is trained
    run = open_run(straight)
    metadata = json.loads((straight / "checkpoints" / "12" / "params" / "_METADATA").read_text())
    assert len(metadata["tree_metadata"]) == len(jax.tree.leaves(run.spec.trained(run.spec.shapes)))


def test_a_prompt_that_starts_as_a_text(examples, base, capsys):  # noqa: F811
    """Used by name; after no step but one it lies near the embeddings of its text."""
    changes = {"train.steps": 1, "train.eval_every": 0, "optimizer.learning_rate": 1e-4, "optimizer.warmup_steps": 0}
    assert train(prompt_config(examples, base, ADAPTERS["text"], **changes), base / "adapters" / "text") == 0
    run = open_run(base / "adapters" / "text")
    tokens = np.resize(run.tokenizer.encode("the cat"), 4)
    found, rows = run.weights["virtual"]["embedding"], run.weights["embedding"]["table"][tokens]
    np.testing.assert_allclose(found, rows, atol=2e-4 + 1e-2 * float(np.abs(rows).max()))
    command = ["generate", f"--workdir={base}", "--prompt=the cat", "--temperature=0", "--max_new_tokens=4"]
    assert main([*command, "--adapter=text"]) == 0
    assert capsys.readouterr().out.startswith("the cat")


WRONG = {
    "no virtual token": ({"num_virtual_tokens": 0}, "config.adapter.num_virtual_tokens=0 must be 1 or more"),
    "no room": ({"num_virtual_tokens": 255}, "no room for text in a row of 256 tokens (config.data.length, where"),
    "encoder": ({"kind": "p_tuning", "encoder": "lstn"}, "Did you mean 'lstm'?"),
    "init": ({"prompt_init": "vocabularry"}, "Did you mean 'vocabulary'?"),
    "no text": ({"prompt_init": "text"}, "with prompt_init=text and that text in prompt_text"),
    "a text in vain": ({"prompt_text": "the cat"}, "with prompt_init=text and that text in prompt_text"),
    "another step's": ({"kind": "lora"}, "Use --config.adapter.kind=prompt or p_tuning or prefix"),
    "examples too long": ({"num_virtual_tokens": 250}, "and a row 6 (256 without the 250 virtual ones)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes(case, examples, base, tmp_path):  # noqa: F811
    fields, says = WRONG[case]
    config = prompt_config(examples, base, dataclasses.replace(SMALL, **fields), **{"data.truncation": "refuse"})
    with pytest.raises(UserError) as raised:
        train(config, tmp_path)
    assert says in str(raised.value)
    assert str(raised.value).count("\n") <= 1
    assert not (tmp_path / "config.json").exists()
