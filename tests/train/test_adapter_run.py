"""Adapters as runs: what one leaves on disk, resuming, finding its base, and being used by name."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import kill_campaign

from jaxllm.cli.config_file import override
from jaxllm.cli.main import main
from jaxllm.errors import UserError
from jaxllm.generate.run import open_run
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.train import loop
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.config import base_config, config_dict, read_config
from tests.data.conversations import conversations
from tests.mistakes import mistake
from tests.train.test_loop import preempted_at
from tests.train.test_sft import sft_config

ADAPTERS = {
    "lora": AdapterConfig(kind="lora", rank=4, dropout=0.1),
    "pissa": AdapterConfig(kind="lora", rank=2, init="pissa", dora=True, base_weights="nf4"),
}
LAYOUTS = {
    "one": (1, MeshConfig(data=1), LayoutConfig()),
    "pipeline": (4, MeshConfig(pipeline=2, data=1, model=2), LayoutConfig(num_microbatches=2)),
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "a.jsonl"
    records = [{"messages": talk} for talk in conversations(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(examples, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base") / "run"
    config = sft_config(examples, **{"train.steps": 6, "train.eval_every": 0})
    assert loop.train(config, workdir, devices=jax.devices()[:1], quiet=True) == 0
    return workdir


def adapter_config(examples: Path, base: Path, adapter: AdapterConfig, layout: str = "one", **changes):
    names = {"train.init_from": str(base), "data.tokenizer": str(base / "tokenizer"), "data.chat_template": ""}
    config = sft_config(examples, **({"train.eval_every": 4, "train.eval_batches": 1} | names | changes))
    _, mesh, fields = LAYOUTS[layout]
    return dataclasses.replace(config, train_step="lora", adapter=adapter, mesh=mesh, layout=fields)


def train(config, workdir: Path, layout: str = "one") -> int:
    return loop.train(config, workdir, devices=jax.devices()[: LAYOUTS[layout][0]], quiet=True)


@pytest.mark.parametrize(("kind", "layout"), [("lora", "one"), ("pissa", "one"), ("lora", "pipeline")])
def test_resumed_bit_for_bit(kind, layout, examples, base, tmp_path, monkeypatch):
    config = adapter_config(examples, base, ADAPTERS[kind], layout)
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


@pytest.fixture(scope="module")
def adapter(examples, base):
    workdir = base / "adapters" / "tiny"
    assert train(adapter_config(examples, base, ADAPTERS["lora"]), workdir) == 0
    return workdir


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_checkpoint_holds_the_adapter_alone(base, adapter):
    run = open_run(adapter)
    stored = sorted(path.name for path in (adapter / "checkpoints" / "12" / "params").glob("**/_METADATA"))
    assert stored
    metadata = json.loads((adapter / "checkpoints" / "12" / "params" / "_METADATA").read_text())
    paths = {key.replace("'", "").strip("()").replace(", ", ".") for key in metadata["tree_metadata"]}
    assert paths and all(".lora." in path for path in paths)
    assert len(paths) == len(jax.tree.leaves(run.spec.trained(run.spec.shapes)))


def test_what_it_was_trained_beside_has_not_changed(base, adapter):
    ours, theirs = open_run(adapter), open_run(base)
    frozen = ours.spec.base(ours.weights)
    for one, other in zip(jax.tree.leaves(frozen), jax.tree.leaves(theirs.weights), strict=True):
        np.testing.assert_array_equal(one, other)


def test_used_by_name(base, adapter, capsys):
    command = ["generate", f"--workdir={base}", "--prompt=the cat", "--temperature=0", "--max_new_tokens=4"]
    assert main([*command, "--adapter=tiny"]) == 0
    named = capsys.readouterr().out
    assert main([command[0], f"--workdir={adapter}", *command[2:]]) == 0
    assert capsys.readouterr().out == named
    assert "Did you mean 'tiny'?" in mistake([*command, "--adapter=tyni"], capsys)
    assert "There are none" in mistake([command[0], f"--workdir={adapter}", *command[2:], "--adapter=x"], capsys)


def test_a_base_that_moved_and_one_that_trained_on(base, adapter, examples, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    config = json.loads((moved / "adapters" / "tiny" / "config.json").read_text())
    config["train"]["init_from"] = str(tmp_path / "gone")
    (moved / "adapters" / "tiny" / "config.json").write_text(json.dumps(config))
    assert open_run(moved / "adapters" / "tiny").step == 12
    more = sft_config(examples, **{"train.steps": 9, "train.eval_every": 0, "train.keep": 1, "train.keep_best": 0})
    assert loop.train(more, moved, devices=jax.devices()[:1], quiet=True) == 0
    with pytest.raises(
        UserError, match=r"was trained beside the parameters with hash \w+ \(step 6 of its base\)(.|\n)*no other"
    ):
        open_run(moved / "adapters" / "tiny")


def test_what_a_run_says(base, examples, tmp_path, capsys):
    config = adapter_config(examples, base, dataclasses.replace(ADAPTERS["pissa"], dora=False), **{"train.steps": 6})
    assert loop.train(config, tmp_path / "run", devices=jax.devices()[:1]) == 0
    said = " ".join(capsys.readouterr().err.split())
    count = 2 * 2 * (4 * (16 + 16) + 2 * (16 + 64))  # layers x rank x (inputs + outputs)
    assert f"adapter: lora of rank 2, scale 16: {count:,} parameters are trained" in said
    assert f"({4 * count:,} of parameters" in said


WRONG = {
    "another base's tokenizer": ({"data.tokenizer": "bpe:330"}, {}, "would be trained anew"),
    "rank 0": ({}, {"rank": 0}, "config.adapter.rank=0 must be 1 or more"),
    "no such layer": ({}, {"targets": "querry"}, "'querry' fits no linear layer of the model. Did you mean 'query'?"),
    "kind": ({}, {"kind": "lorra"}, "config.adapter.kind='lorra' is unknown. Did you mean 'lora'?"),
    "init": ({}, {"init": "psisa"}, "Did you mean 'pissa'?"),
    "dropout": ({}, {"dropout": 1.0}, "config.adapter.dropout=1.0 must be from 0 up to"),
    "alpha": ({}, {"alpha": 0.0}, "config.adapter.alpha=0.0 must be above 0"),
    "base_weights": ({}, {"base_weights": "nf5"}, "Did you mean 'nf4'?"),
    "no base": ({"train.init_from": ""}, {}, "say which one, --config.train.init_from=WORKDIR"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes(case, base, examples, tmp_path):
    changes, fields, says = WRONG[case]
    adapter = dataclasses.replace(ADAPTERS["lora"], **fields)
    with pytest.raises(UserError) as raised:
        train(adapter_config(examples, base, adapter, **changes), tmp_path)
    assert says in str(raised.value)
    assert str(raised.value).count("\n") <= 1
    assert not (tmp_path / "config.json").exists()


def test_steps_and_kinds(base, examples, tmp_path):
    config = adapter_config(examples, base, ADAPTERS["lora"])
    for step, kind, says in (
        ("sft", "lora", "Use --config.adapter.kind=none, or --config.train_step=lora"),
        ("lora", "none", "Use --config.adapter.kind=lora, or --config.train_step=pretrain or mlm or sft"),
    ):
        with pytest.raises(UserError) as raised:
            wrong = dataclasses.replace(config, train_step=step, adapter=dataclasses.replace(config.adapter, kind=kind))
            train(wrong, tmp_path)
        assert says in str(raised.value)
    whole = dataclasses.replace(config, train_step="sft", adapter=AdapterConfig(base_weights="nf4"))
    with pytest.raises(UserError, match="without an adapter"):
        train(whole, tmp_path)


def test_an_adapter_is_no_base_and_a_base_no_folder_for_one(base, adapter, examples, tmp_path):
    with pytest.raises(UserError, match=r"is an adapter, not a model(.|\n)*jaxllm convert --from"):
        train(adapter_config(examples, adapter, ADAPTERS["lora"]), tmp_path)
    with pytest.raises(UserError, match=r"holds another run(.|\n)*adapters/NAME"):
        train(adapter_config(examples, base, ADAPTERS["lora"]), base)
    with pytest.raises(UserError, match=r"config.adapter.rank: 4 in the checkpoint, 5 now"):
        train(adapter_config(examples, base, dataclasses.replace(ADAPTERS["lora"], rank=5)), adapter)


def test_an_adapter_for_another_model(base, examples, tmp_path):
    with pytest.raises(UserError, match=r"is another model(.|\n)*config.model.embed_dim: 16 there, 32 here"):
        train(adapter_config(examples, base, ADAPTERS["lora"], **{"model.embed_dim": 32}), tmp_path)


def test_a_config_says_what_a_run_was(adapter):
    stored = json.loads((adapter / "config.json").read_text())
    assert stored["adapter"] == config_dict(open_run(adapter).config)["adapter"]


def test_going_on_with_an_adapter(base, adapter, examples, tmp_path):
    """It starts where the other is, to the bit; another dropout and a base in 4 bits are no other adapter."""
    still = {"optimizer.learning_rate": 1e-30, "optimizer.weight_decay": 0.0, "optimizer.warmup_steps": 0}
    still |= {"train.steps": 1, "train.eval_every": 0}
    fields = dataclasses.replace(ADAPTERS["lora"], init_from=str(adapter), dropout=0.0, base_weights="nf4")
    assert train(adapter_config(examples, base, fields, **still), tmp_path / "more") == 0
    assert parameter_hash(tmp_path / "more") == parameter_hash(adapter)
    assert train(adapter_config(examples, base, fields, **still | {"train.steps": 2}), tmp_path / "more") == 0


def parameter_hash(workdir: Path) -> str:
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.newest_run()["parameter_hash"]


def test_going_on_with_something_else(base, adapter, examples, tmp_path):
    """Another adapter, a model, a folder, an adapter for another base."""
    lora, other = ADAPTERS["lora"], tmp_path / "other"
    assert loop.train(sft_config(examples, **{"train.steps": 7}), other, devices=jax.devices()[:1], quiet=True) == 0
    for at, fields, says in (
        (
            base,
            {"init_from": str(adapter), "rank": 5},
            r"(.|\n)*--config.adapter=(.|\n)*config.adapter.rank: 4 there, 5 here",
        ),
        (base, {"init_from": str(base)}, "is a whole model, not an adapter"),
        (base, {"init_from": str(tmp_path)}, "there is no checkpoint in it"),
        (other, {"init_from": str(adapter)}, r"for the parameters with hash(.|\n)*An adapter fits no other model"),
    ):
        with pytest.raises(UserError, match=says):
            train(adapter_config(examples, at, dataclasses.replace(lora, **fields)), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    whole = adapter_config(examples, base, AdapterConfig(init_from=str(adapter)))
    with pytest.raises(UserError, match=f"Take that of the run: --config.adapter={adapter}"):
        train(dataclasses.replace(whole, train_step="sft"), tmp_path / "run")


def test_the_adapter_of_a_run_as_a_flag(adapter, tmp_path):
    config = override(base_config(), {"adapter.dropout": "0.3", "adapter": str(adapter)})
    expected = dataclasses.replace(ADAPTERS["lora"], dropout=0.3, init_from=str(adapter))
    assert read_config(config).adapter == expected
    with pytest.raises(UserError, match="no run is there"):
        override(base_config(), {"adapter": str(tmp_path)})
