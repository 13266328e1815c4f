"""Prompts, P-tuning and prefixes of PEFT's, here; and ours, loaded by PEFT, which keeps what an encoder makes."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from jaxllm.generate.run import read_run_config
from jaxllm.model.adapter_config import AdapterConfig
from tests.interop.peft.adapters import loaded_by_peft, logits_here, logits_of, made_by_peft, made_here, to_peft, to_run
from tests.interop.peft.test_parity import near, parameters
from tests.mistakes import mistake

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OF_ALL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
THEIRS = {
    "prompt": {"kind": "PromptTuningConfig"},
    "p_tuning": {"kind": "PromptEncoderConfig", "encoder_hidden_size": 24},
    "p_tuning lstm": {
        "kind": "PromptEncoderConfig",
        "encoder_hidden_size": 24,
        "encoder_reparameterization_type": "LSTM",
    },
    "prefix": {"kind": "PrefixTuningConfig"},
    "prefix projected": {"kind": "PrefixTuningConfig", "encoder_hidden_size": 24, "prefix_projection": True},
}
PROMPT = AdapterConfig(kind="prompt", num_virtual_tokens=5, encoder_dim=24)
OURS = {
    "prompt": PROMPT,
    "p_tuning": dataclasses.replace(PROMPT, kind="p_tuning"),
    "p_tuning lstm": dataclasses.replace(PROMPT, kind="p_tuning", encoder="lstm"),
    "prefix": dataclasses.replace(PROMPT, kind="prefix"),
    "prefix projected": dataclasses.replace(PROMPT, kind="prefix", prefix_projection=True),
}
# The model computes every kind as PEFT does (tests/interop/test_prompts.py); here it is about files.
CASES = [*(("llama", kind) for kind in THEIRS), ("gpt2", "prefix"), ("bloom", "p_tuning")]
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_theirs(name, kind, base_of, tmp_path):
    """And back: the same tensor to the byte."""
    base = base_of(name)
    expected = made_by_peft(base, tmp_path / "theirs", **OF_ALL | THEIRS[kind])
    run = to_run(base, tmp_path / "theirs", tmp_path / "run")
    near(logits_here(run), expected)
    assert np.abs(expected - logits_of(base.theirs())).max() > 0.1
    back = to_peft(run, tmp_path / "back")
    assert (back / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_ours(name, kind, base_of, tmp_path):
    """Key for key as PEFT would write it, and back."""
    base = base_of(name)
    run = made_here(base, tmp_path / "run", OURS[kind])
    folder = to_peft(run, tmp_path / "peft")
    expected = logits_here(run)
    near(logits_of(loaded_by_peft(base, folder)), expected)
    made_by_peft(base, tmp_path / "theirs", **OF_ALL | THEIRS[kind])
    ours, theirs = (json.loads((each / CONFIG).read_text()) for each in (folder, tmp_path / "theirs"))
    assert list(ours) == list(theirs) and ours == theirs
    again = to_run(base, folder, tmp_path / "again")
    assert read_run_config(again).train_step == "prompt"
    if kind in ("prompt", "prefix"):
        assert parameters(again) == parameters(run)
    else:
        assert (to_peft(again, tmp_path / "twice") / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_the_least_that_a_config_says(base_of, tmp_path):
    base, folder = base_of("llama"), tmp_path / "theirs"
    expected = made_by_peft(base, folder, **OF_ALL | THEIRS["prefix"])
    (folder / CONFIG).write_text(json.dumps({"peft_type": "PREFIX_TUNING", **OF_ALL}))
    near(logits_here(to_run(base, folder, tmp_path / "run")), expected)


def test_an_encoder_stays_here(base_of, tmp_path, capsys):
    from jaxllm.cli.main import main

    run = made_here(base_of("llama"), tmp_path / "run", OURS["p_tuning"])
    assert main(["convert", f"--from={run}", f"--to=peft:{tmp_path / 'peft'}"]) == 0
    assert f"not the encoder: to train on, keep {run}" in capsys.readouterr().err
    for target in (str(tmp_path / "a"), f"hf:{tmp_path / 'a'}"):
        assert "it cannot be merged" in mistake(["convert", f"--from={run}", f"--to={target}"], capsys)


def config(**changes):
    def apply(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))

    return apply


def weights(**tensors):
    return lambda folder: safetensors.numpy.save_file(tensors, folder / WEIGHTS)


BROKEN = {
    "number": (config(num_virtual_tokens="five"), 'num_virtual_tokens="five" must be a whole number'),
    "another number": (config(num_virtual_tokens=6), "prompt_embeddings is [5, 32], but"),
    "as long as the context": (config(num_virtual_tokens=127), "which has a context of 128 tokens"),
    "another kind": (config(peft_type="PREFIX_TUNING"), "make it [5, 64]. Give the adapter's own base"),
    "modules_to_save": (config(modules_to_save=["lm_head"]), "modules that were trained whole"),
    "two tensors": (weights(prompt_embeddings=np.zeros((5, 32)), more=np.zeros(1)), "one tensor is expected"),
    "another type": (weights(prompt_embeddings=np.zeros((5, 32), np.int8)), "is of type I8; F32, F16, BF16 are read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is not there"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case, theirs, base_of, tmp_path, capsys):
    break_it, says = BROKEN[case]
    folder = tmp_path / "adapter"
    shutil.copytree(theirs, folder)
    break_it(folder)
    argv = ["convert", f"--from=peft:{folder}", f"--base={base_of('llama').run}", f"--to={tmp_path / 'run'}"]
    assert says in mistake(argv, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture(scope="module")
def theirs(base_of, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "adapter"
    made_by_peft(base_of("llama"), folder, **OF_ALL | THEIRS["prompt"])
    return folder


def test_a_model_that_reads_both_ways(theirs, base_of, tmp_path, capsys):
    argv = ["convert", f"--from=peft:{theirs}", f"--base={base_of('bert').run}", f"--to={tmp_path / 'run'}"]
    assert "which reads both ways" in mistake(argv, capsys)
