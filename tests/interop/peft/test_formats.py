"""What PEFT has written over the years, and what it writes today, key for key."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from jaxllm.cli.main import main
from jaxllm.generate.run import read_run_config
from jaxllm.model.adapter_config import AdapterConfig
from tests.interop.peft.adapters import logits_here, made_by_peft, made_here, to_peft, to_run
from tests.interop.peft.test_parity import CAUSAL, EXPERTS, GPT2_ALL, near

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def written(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())


def rewrite(folder: Path, keys: dict | None = None, tensors: dict[str, np.ndarray] | None = None) -> None:
    if keys is not None:
        (folder / CONFIG).write_text(json.dumps(keys))
    if tensors is not None:
        safetensors.numpy.save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", CAUSAL | {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_dropout": 0.1}),
        ("gpt2", CAUSAL | GPT2_ALL | {"use_dora": True}),
        ("mixtral", CAUSAL | EXPERTS | {"target_parameters": ["down_proj", "gate_up_proj"]}),
        ("bert", {"r": 4, "target_modules": ["query"]}),
    ],
)
def test_every_key_of_the_config(name, fields, base_of, tmp_path):
    """In its order too; of a list of modules the order is one of chance there."""
    base = base_of(name)
    made_by_peft(base, tmp_path / "theirs", **fields)
    back = to_peft(to_run(base, tmp_path / "theirs", tmp_path / "run"), tmp_path / "back")
    theirs, ours = written(tmp_path / "theirs"), written(back)
    assert list(ours) == list(theirs)
    for keys in (theirs, ours):
        for key in ("target_modules", "target_parameters"):
            keys[key] = keys[key] and sorted(keys[key])
    if theirs["task_type"]:
        assert theirs.pop("auto_mapping") is ours.pop("auto_mapping")
    assert ours == theirs


def test_the_least_that_a_config_says(base_of, tmp_path):
    base, folder = base_of("llama"), tmp_path / "theirs"
    expected = made_by_peft(base, folder, r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    rewrite(folder, said | {"task_type": "CAUSAL_LM", "inference_mode": True, "novel": 1})
    near(logits_here(to_run(base, folder, tmp_path / "run")), expected)
    rewrite(folder, {key: said[key] for key in ("peft_type", "r", "lora_alpha")})  # the file says where
    near(logits_here(to_run(base, folder, tmp_path / "again")), expected)


def test_names_of_a_model_without_its_head(base_of, tmp_path):
    base, folder = base_of("llama"), tmp_path / "theirs"
    expected = made_by_peft(base, folder, **CAUSAL | {"target_modules": ["q_proj"], "use_dora": True})
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    old = {
        name.replace(".model.model.", ".model.").replace("_vector", "_vector.weight"): tensors[name] for name in tensors
    }
    rewrite(folder, tensors=old)
    near(logits_here(to_run(base, folder, tmp_path / "run")), expected)


def test_half_precision(base_of, tmp_path):
    base, folder = base_of("llama"), tmp_path / "theirs"
    made_by_peft(base, folder, **CAUSAL | {"target_modules": ["q_proj"]})
    half = {name: tensor.astype(np.float16) for name, tensor in safetensors.numpy.load_file(folder / WEIGHTS).items()}
    rewrite(folder, tensors=half)
    back = to_peft(to_run(base, folder, tmp_path / "run"), tmp_path / "back")
    for name, tensor in safetensors.numpy.load_file(back / WEIGHTS).items():
        np.testing.assert_array_equal(tensor, half[name].astype(np.float32))


def test_experts_as_modules_of_their_own(base_of, tmp_path):
    """As transformers 4 had them; ours, whose gate and up have adapters of their own, are written in this form."""
    base = base_of("mixtral")
    run = made_here(base, tmp_path / "ours", AdapterConfig(kind="lora", rank=2))
    folder = to_peft(run, tmp_path / "peft")
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    for stem in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
        old = f"{stem.replace('.mlp', '.block_sparse_moe')}.experts"
        a, b = (tensors.pop(f"{stem}.experts.base_layer.lora_{which}.weight") for which in "AB")
        a, b = (
            a.reshape(4, 2, 2, -1),
            b.reshape(2, 48, 2, 2, 4),
        )  # expert, part, rank, in; part, out, part, rank, expert
        down_a, down_b = (tensors.pop(f"{stem}.experts.lora_{which}.weight") for which in "AB")
        down_a, down_b = down_a.reshape(4, 2, -1), down_b.reshape(-1, 2, 4)
        for expert in range(4):
            for part, name in enumerate(("w1", "w3")):
                tensors[f"{old}.{expert}.{name}.lora_A.weight"] = a[expert, part].copy()
                tensors[f"{old}.{expert}.{name}.lora_B.weight"] = b[part, :, part, :, expert].copy()
            tensors[f"{old}.{expert}.w2.lora_A.weight"] = down_a[expert].copy()
            tensors[f"{old}.{expert}.w2.lora_B.weight"] = down_b[..., expert].copy()
    keys = written(folder)
    modules = [*keys["target_modules"], "w1", "w2", "w3"]
    rewrite(folder, keys | {"target_modules": modules, "target_parameters": None, "rank_pattern": {}}, tensors)
    np.testing.assert_array_equal(logits_here(to_run(base, folder, tmp_path / "again")), logits_here(run))


def test_the_name_of_the_base(base_of, tmp_path, capsys):
    """Where its parameters came from, as long as it has those."""
    base = base_of("llama")
    run = made_here(base, tmp_path / "adapter", AdapterConfig(kind="lora", rank=1))
    assert written(to_peft(run, tmp_path / "first"))["base_model_name_or_path"] == str(base.directory)
    config = json.loads((run / "huggingface" / "config.json").read_text())
    (run / "huggingface" / "config.json").write_text(json.dumps(config | {"_name_or_path": "some/llama"}))
    assert written(to_peft(run, tmp_path / "second"))["base_model_name_or_path"] == "some/llama"
    assert main(["convert", f"--from={run}", f"--to={tmp_path / 'merged'}"]) == 0
    of_merged = base._replace(run=tmp_path / "merged")
    other = made_here(of_merged, tmp_path / "other", AdapterConfig(kind="lora", rank=1))
    capsys.readouterr()
    assert main(["convert", f"--from={other}", f"--to=peft:{tmp_path / 'third'}"]) == 0
    assert written(tmp_path / "third")["base_model_name_or_path"] == ""
    assert re.search(r"base_model_name_or_path is empty.*--from \S*merged --to hf:DIR", capsys.readouterr().err)


def test_an_imported_adapter_is_a_run(base_of, tmp_path, capsys):
    """Found by name beside a base that moved, on several devices."""
    base = base_of("llama")
    made_by_peft(base, tmp_path / "theirs", **CAUSAL | {"target_modules": ["q_proj", "v_proj"]})
    moved = tmp_path / "base"
    shutil.copytree(base.run, moved)
    argv = ["convert", f"--from=peft:{tmp_path / 'theirs'}", f"--base={base.run}", "--config.mesh.data=4"]
    argv += ["--config.mesh.model=2"]
    assert main([*argv, f"--to={moved / 'adapters' / 'theirs'}"]) == 0
    stored = read_run_config(moved / "adapters" / "theirs")
    assert stored.adapter == AdapterConfig(kind="lora", rank=4, alpha=6.0, targets="attention.query,attention.value")
    assert stored.train.init_from == str(base.run) and stored.train_step == "lora"
    assert "names its base" not in capsys.readouterr().err
    rewrite(tmp_path / "theirs", written(tmp_path / "theirs") | {"base_model_name_or_path": "some/other"})
    assert main([*argv, f"--to={moved / 'adapters' / 'again'}"]) == 0
    assert f"names its base some/other, and {base.run} came from {base.directory}" in capsys.readouterr().err
    generate = ["generate", f"--workdir={moved}", "--prompt=the quick", "--max_new_tokens=4", "--temperature=0"]
    assert main([*generate, "--adapter=theirs"]) == 0
    adapted = capsys.readouterr().out
    assert main(generate) == 0
    assert capsys.readouterr().out != adapted
