"""Adapters that PEFT made, here; and ours, loaded by PEFT: the same logits in float32, and every tensor found."""

import dataclasses

import numpy as np
import pytest
import safetensors.numpy

from jaxllm.generate.run import read_run_config
from jaxllm.model.adapter_config import AdapterConfig
from tests.interop.peft.adapters import (
    loaded_by_peft,
    logits_here,
    logits_of,
    made_by_peft,
    made_here,
    to_peft,
    to_run,
)

WEIGHTS = "adapter_model.safetensors"
CAUSAL = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6}
GPT2_ALL = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
# name: (model, fields of PEFT's config)
THEIRS = {
    "llama": ("llama", CAUSAL | {"target_modules": "all-linear", "lora_dropout": 0.1}),
    "llama rslora": ("llama", CAUSAL | {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "llama dora": ("llama", CAUSAL | {"target_modules": r".*\.(o_proj|down_proj)", "use_dora": True}),
    "qwen2": ("qwen2", CAUSAL | {"target_modules": ["k_proj", "up_proj"]}),
    "gpt2": ("gpt2", CAUSAL | {"target_modules": ["c_attn"]}),
    "gpt2 dora": ("gpt2", CAUSAL | GPT2_ALL | {"use_dora": True, "use_rslora": True}),
    "bloom": ("bloom", CAUSAL | {"target_modules": ["query_key_value", "dense"], "use_rslora": True}),
    "bloom dora": ("bloom", {"r": 3, "target_modules": ["query_key_value"], "use_dora": True}),
    "bert": ("bert", {"r": 4, "target_modules": ["query", "attention.output.dense"]}),
    "mixtral": ("mixtral", CAUSAL | EXPERTS),
    "qwen3_moe": ("qwen3_moe", CAUSAL | {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
}


@pytest.mark.parametrize("case", THEIRS)
def test_theirs(case, base_of, tmp_path):
    """And back: the same tensors to the bit, in a file that is the same to the byte."""
    name, fields = THEIRS[case]
    base = base_of(name)
    expected = made_by_peft(base, tmp_path / "theirs", **fields)
    run = to_run(base, tmp_path / "theirs", tmp_path / "run")
    near(logits_here(run), expected)
    assert np.abs(expected - logits_of(base.theirs())).max() > 0.1
    back = to_peft(run, tmp_path / "back")
    assert (back / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    np.testing.assert_array_equal(logits_of(loaded_by_peft(base, back)), expected)


def near(found, expected) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


UNEVEN = {
    # The most common scale is 1.5; others go into B.
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"k_proj": 2, "layers.0.mlp.down_proj": 7},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 5},
    },
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers dora": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1, "use_dora": True},
    "rslora patterns": {"target_modules": ["v_proj", "o_proj"], "rank_pattern": {"v_proj": 5}, "use_rslora": True},
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0\.self_attn\.k_proj"},
}


@pytest.mark.parametrize("case", UNEVEN)
def test_theirs_of_several_ranks_scales_and_layers(case, base_of, tmp_path):
    """Here they have one rank and one scale, and stand in every layer."""
    base = base_of("llama")
    expected = made_by_peft(base, tmp_path / "theirs", **CAUSAL | UNEVEN[case])
    run = to_run(base, tmp_path / "theirs", tmp_path / "run")
    near(logits_here(run), expected)
    near(logits_of(loaded_by_peft(base, to_peft(run, tmp_path / "back"))), expected)


LORA = AdapterConfig(kind="lora", rank=4, alpha=3.0)
KINDS = {
    "lora": LORA,
    "rslora": dataclasses.replace(LORA, rank_stabilized=True),
    "dora": dataclasses.replace(LORA, dora=True),
    "pissa": dataclasses.replace(LORA, init="pissa"),
    "pissa dora": dataclasses.replace(LORA, init="pissa", dora=True, rank_stabilized=True),
    "some": dataclasses.replace(LORA, targets="attention.query,attention.value,mlp.down"),
    "some dora": dataclasses.replace(LORA, targets="attention.query,mlp.down", dora=True),
}
OURS = [(name, kind) for name in ("llama", "gpt2", "bloom") for kind in ("lora", "rslora", "dora", "pissa dora")]
OURS += [("llama", "pissa"), ("gpt2", "some"), ("bloom", "some dora"), ("bert", "some")]
OURS += [("mixtral", "lora"), ("qwen3_moe", "rslora")]


@pytest.mark.parametrize(("name", "kind"), OURS)
def test_ours(name, kind, base_of, tmp_path):
    """And back: the same parameters to the bit, or the same model where another adapter says it.

    That is plain LoRA for PiSSA's, and magnitudes for all that is one matrix there.
    """
    base = base_of(name)
    run = made_here(base, tmp_path / "run", KINDS[kind])
    expected = logits_here(run)
    folder = to_peft(run, tmp_path / "peft")
    near(logits_of(loaded_by_peft(base, folder)), expected)
    assert np.abs(expected - logits_of(base.theirs())).max() > 0.1
    again = to_run(base, folder, tmp_path / "again")
    before, after = read_run_config(run).adapter, read_run_config(again).adapter
    if before.init == "pissa" or kind == "some dora":
        near(logits_here(again), expected)
        return
    assert dataclasses.replace(after, targets=before.targets) == before
    twice = to_peft(again, tmp_path / "twice")
    ours, theirs = (safetensors.numpy.load_file(each / WEIGHTS) for each in (folder, twice))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert parameters(again) == parameters(run)


def parameters(run) -> str:
    """The hash of an adapter's own parameters."""
    from jaxllm.train.checkpoint.checkpoints import Checkpoints

    with Checkpoints(run / "checkpoints") as checkpoints:
        return checkpoints.newest_run()["parameter_hash"]
