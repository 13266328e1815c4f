"""Broken and foreign adapters: each is refused in one or two lines, exit code 2, and nothing is left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from jaxllm.model.adapter_config import AdapterConfig
from tests.interop.peft.adapters import made_by_peft, made_here
from tests.mistakes import mistake

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STEM = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(base_of, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "adapter"
    made_by_peft(base_of("llama"), folder, r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    (folder / "README.md").unlink()
    return folder


def config(**changes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        keys = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(keys | changes))

    return apply


def tensors(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = safetensors.numpy.load_file(folder / WEIGHTS)
        edit(found)
        safetensors.numpy.save_file(found, folder / WEIGHTS)

    return apply


def added(name: str, shape: tuple[int, ...] = (2, 32)) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({name: np.zeros(shape, np.float32)}))


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def truncate(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-50])


BROKEN = {
    "no config": (lambda f: (f / CONFIG).unlink(), f"there is no {CONFIG} in it"),
    "broken config": (lambda f: (f / CONFIG).write_text('{"r": 1,\n oh}'), f"{CONFIG}:2: not JSON"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is not there"),
    "a pickle": (only_a_pickle, "adapter_model.bin is not opened: a pickle can run code"),
    "truncated": (truncate, "is not a whole safetensors file"),
    "another kind": (config(peft_type="IA3"), 'peft_type="IA3" is not read here; LORA, PROMPT_TUNING'),
    "no kind": (config(peft_type=None), "peft_type=null is not read here"),
    "modules_to_save": (config(modules_to_save=["lm_head"]), 'modules_to_save=["lm_head"]: modules that were trained'),
    "trainable tokens": (config(trainable_token_indices=[1, 2]), "embeddings of tokens that were trained"),
    "biases": (config(bias="lora_only"), 'bias="lora_only": biases that were trained'),
    "a bias of B": (config(lora_bias=True), "lora_bias=true: biases of adapters"),
    "aLoRA": (config(alora_invocation_tokens=[5]), "alora_invocation_tokens=[5]"),
    "replicated layers": (config(layer_replication=[[0, 2], [1, 2]]), "layers that are used several times"),
    "pissa": (config(init_lora_weights="pissa_niter_4"), "is for a base that it changed. Save a plain LoRA"),
    "a rank of no number": (config(r="two"), 'r="two" must be a whole number'),
    "rank 0": (config(r=0), "r=0 must be a whole number, 1 or more"),
    "a rank of a pattern": (config(rank_pattern={"q_proj": 1.5}), "rank_pattern of q_proj=1.5 must be a whole number"),
    "an alpha of a pattern": (config(alpha_pattern={"q_proj": None}), "alpha_pattern of q_proj=null must be a number"),
    "a list for a text": (
        config(target_modules={"q_proj": 1}),
        'target_modules={"q_proj": 1} must be a list or a text',
    ),
    "a regular expression": (config(target_modules="(q_proj"), "'(q_proj' is no regular expression: "),
    "a text for a switch": (config(use_dora="yes"), 'use_dora="yes" must be true or false'),
    "another rank": (config(r=3), f"{STEM.replace('1', '0')}.lora_A.weight is [2, 32], but"),
    "a module without tensors": (config(target_modules=["q_proj", "v_proj", "o_proj"]), "but there is no such tensor"),
    "tensors without a module": (config(target_modules=["q_proj"]), f"is not what {CONFIG} asks for"),
    "no module": (lambda f: [config(target_modules=["nothing"])(f), tensors(dict.clear)(f)], "names no linear layer"),
    "a layer too many": (config(layers_to_transform=[1]), f"is not what {CONFIG} asks for"),
    "no magnitudes": (config(use_dora=True), "lora_magnitude_vector and 3 more, but there is no such tensor"),
    "a missing tensor": (tensors(lambda t: t.pop(f"{STEM}.lora_B.weight")), f"asks for {STEM}.lora_B.weight, but"),
    "a third layer": (added(f"{STEM.replace('1', '2')}.lora_A.weight"), "a LlamaForCausalLM of 2 layers"),
    "another family": (added("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"), "has no place for"),
    "the head": (added("base_model.model.lm_head.lora_A.weight"), "an adapter of lm_head is not read here"),
    "an embedding": (added("base_model.model.model.embed_tokens.lora_embedding_A"), "is LoRA of an embedding"),
    "a whole head": (added("base_model.model.lm_head.weight"), "is a module that was trained whole"),
    "a bias": (added(f"{STEM}.bias", (32,)), "is a bias that was trained"),
    "misshapen": (
        tensors(lambda t: t.update({f"{STEM}.lora_A.weight": np.zeros((2, 31), np.float32)})),
        f"{STEM}.lora_A.weight is [2, 31], but {CONFIG} and the model of",
    ),
    "another type": (
        tensors(lambda t: t.update({f"{STEM}.lora_A.weight": np.zeros((2, 32), np.int32)})),
        f"{STEM}.lora_A.weight is of type I32; F32, F16, BF16 are read",
    ),
}


def refused(folder: Path, base: Path, capsys) -> str:
    """What is said about an import; nothing may be left beside the folder."""
    there = sorted(path.name for path in folder.parent.iterdir())
    said = mistake(["convert", f"--from=peft:{folder}", f"--base={base}", f"--to={folder.parent / 'run'}"], capsys)
    assert sorted(path.name for path in folder.parent.iterdir()) == there
    return said


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case, good, base_of, tmp_path, capsys):
    break_it, says = BROKEN[case]
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    break_it(folder)
    assert says in refused(folder, base_of("llama").run, capsys)


def test_another_base(good, base_of, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    assert "a GPT2LMHeadModel of 2 layers and has no place for base_model.model.model" in refused(
        folder, base_of("gpt2").run, capsys
    )
    assert "is [2, 32], but" in refused(folder, wider(base_of, tmp_path), capsys)
    adapter = made_here(base_of("llama"), tmp_path / "ours", AdapterConfig(kind="lora", rank=1))
    assert "is an adapter itself. Give the model that it is beside" in refused(folder, adapter, capsys)
    assert "Import it first" in refused(folder, base_of("llama").directory, capsys)


def wider(base_of, folder: Path) -> Path:
    """A run whose config says that the model is wider; its weights are not looked at."""
    run = folder / "wider"
    shutil.copytree(base_of("llama").run, run, ignore=shutil.ignore_patterns("huggingface"))
    stored = json.loads((run / "config.json").read_text())
    stored["model"] |= {"embed_dim": 64, "head_dim": 16}
    (run / "config.json").write_text(json.dumps(stored))
    return run


def test_what_cannot_go_out(base_of, tmp_path, capsys):
    base = base_of("mixtral")
    dora = made_here(base, tmp_path / "dora", AdapterConfig(kind="lora", rank=2, dora=True))
    there = sorted(path.name for path in tmp_path.iterdir())
    for argv, says in (
        ([f"--from={dora}", f"--to=peft:{tmp_path / 'a'}"], "PEFT has no DoRA of experts"),
        ([f"--from={base.run}", f"--to=peft:{tmp_path / 'a'}"], "is a whole model and no adapter"),
        ([f"--from={base.run}", f"--to={tmp_path / 'a'}"], "This one holds a whole model: --to hf:DIR"),
        ([f"--from={dora}", f"--to=peft:{base.run}"], "exists. Give a new folder"),
        ([f"--from={dora}", f"--to=peft:{tmp_path / 'a'}", "--dtype=bfloat16"], "--dtype bfloat16 is for --to hf:DIR"),
        ([f"--from={tmp_path}", f"--to=peft:{tmp_path / 'a'}"], "holds no run"),
    ):
        assert says in mistake(["convert", *argv], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_a_directory_of_peft_for_a_run(good, tmp_path, capsys):
    said = mistake(["convert", f"--from={good}", f"--to=hf:{tmp_path / 'a'}"], capsys)
    assert f"is an adapter as PEFT writes them. Write --from peft:{good}" in said
