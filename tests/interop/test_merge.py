"""An adapter and its base as one model: it computes what the two did, and is a run and a directory like others."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxllm.cli.main import main
from jaxllm.errors import UserError
from jaxllm.generate.run import read_run_config
from jaxllm.interop.merge import merged_params
from jaxllm.model.adapter_config import AdapterConfig
from tests.interop.peft.adapters import logits_here, logits_of, made_here
from tests.interop.peft.test_parity import near
from tests.mistakes import mistake

LORA = AdapterConfig(kind="lora", rank=2, alpha=3.0)
KINDS = {
    "lora": LORA,
    "rslora dora pissa": dataclasses.replace(LORA, rank_stabilized=True, dora=True, init="pissa"),
    "4 bits": dataclasses.replace(LORA, base_weights="nf4", dora=True, targets="query,mlp.down"),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*(("llama", kind) for kind in KINDS), ("gpt2", "4 bits"), ("mixtral", "lora")]
)
def test_merged_is_unmerged(name, kind, base_of, tmp_path, capsys):
    run = made_here(base_of(name), tmp_path / "adapter", KINDS[kind])
    expected = logits_here(run)
    argv = ["convert", f"--from={run}", "--config.mesh.data=4", "--config.mesh.model=2"]
    assert main([*argv, f"--to={tmp_path / 'merged'}"]) == 0
    assert ("as its 4 bits give it back" in capsys.readouterr().err) == (kind == "4 bits")
    near(logits_here(tmp_path / "merged"), expected)
    assert main([*argv, f"--to=hf:{tmp_path / 'directory'}"]) == 0
    near(logits_of(theirs(base_of(name), tmp_path / "directory")), expected)


def theirs(base, directory: Path):
    return base._replace(directory=directory).theirs()


def test_a_merged_run_is_used_like_any_other(base_of, tmp_path, capsys):
    base = base_of("llama")
    run = made_here(base, tmp_path / "adapter", LORA)
    merged = tmp_path / "merged"
    assert main(["convert", f"--from={run}", f"--to={merged}"]) == 0
    generate = ["generate", "--prompt=the quick", "--max_new_tokens=8", "--temperature=0", "--config.mesh.data=8"]
    capsys.readouterr()
    texts = []
    for workdir in (run, merged):
        assert main([*generate, f"--workdir={workdir}", "--config.precision.compute=float32"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    config = read_run_config(merged)
    assert config.adapter.kind == "none" and not config.train.init_from and (merged / "huggingface").is_dir()
    said = mistake(["train", f"--config={Path('configs/sft.py')}", f"--workdir={merged}"], capsys)
    assert f"--config.train.init_from={merged}" in said
    exported = json.loads((exported_config(merged, tmp_path / "out")).read_text())
    assert exported["architectures"] == ["LlamaForCausalLM"]


def exported_config(workdir: Path, folder: Path) -> Path:
    assert main(["convert", f"--from={workdir}", f"--to=hf:{folder}"]) == 0
    return folder / "config.json"


def test_a_dtype_for_the_merged_model(base_of, tmp_path):
    run = made_here(base_of("llama"), tmp_path / "adapter", LORA)
    assert main(["convert", f"--from={run}", f"--to=hf:{tmp_path / 'out'}", "--dtype=bfloat16"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_merged(base_of, tmp_path, capsys):
    """A base that is gone, and prompts."""
    run = made_here(base_of("llama"), tmp_path / "adapter", LORA)
    stored = json.loads((run / "config.json").read_text())
    stored["train"]["init_from"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(stored))
    for target in (str(tmp_path / "a"), f"hf:{tmp_path / 'a'}"):
        assert "Give its base: --config.train.init_from" in mistake(
            ["convert", f"--from={run}", f"--to={target}"], capsys
        )
    config = read_run_config(run)
    prompts = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, kind="prefix"))
    with pytest.raises(UserError, match=r"it cannot be merged.*--to peft:DIR"):
        merged_params(run, prompts, print)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
