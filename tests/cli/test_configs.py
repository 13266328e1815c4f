"""Every config that comes with jaxllm can be read, and fits the machines it names."""

import json
from pathlib import Path

import pytest

from jaxllm.cli.config_file import load_config
from jaxllm.errors import UserError
from jaxllm.model.spec import model_spec
from jaxllm.train.checks import check

CONFIGS = Path(__file__).parents[2] / "configs"
DEVICES = {
    "quickstart.py": 1,
    "sanguo.py": 1,
    "shakespeare.py": 1,
    "shakespeare.py:tfds": 1,
    "gpt2_small.py": 8,
    "bert_base.py": 8,
    "bert_wikitext.py": 1,
    "sft.py": 1,
    "reward.py": 1,
    "dpo.py": 1,
    "bloom_176b.py": 384,
    "llama3_8b.py": 64,
    "moe_1t.py": 2048,
}

OF_A_BASE = ("lora.py", "qlora.py", "p_tuning.py", "prefix_tuning.py")
WITH_ROLLOUTS = ("ppo.py", "grpo.py")


@pytest.mark.parametrize(("name", "devices"), DEVICES.items())
def test_config_fits_its_machine(name, devices):
    check(load_config(str(CONFIGS / name), {}), devices)


def test_the_large_mixture_has_the_parameters_it_says():
    spec = model_spec(load_config(str(CONFIGS / "moe_1t.py"), {}).model.resolved())
    assert spec.num_parameters == pytest.approx(1.75e12, rel=2e-3)
    assert spec.num_active_parameters == pytest.approx(38e9, rel=2e-2)


def test_every_config_is_tested():
    named = {name.partition(":")[0] for name in DEVICES} | {*OF_A_BASE, *WITH_ROLLOUTS}
    assert {file.name for file in CONFIGS.glob("*.py")} == named


@pytest.mark.parametrize("name", WITH_ROLLOUTS)
def test_configs_whose_model_writes(name, tmp_path):
    """They want a reward, and fields of the mesh that they write under can be set."""
    model = {"num_layers": 2, "embed_dim": 64, "vocab_size": 300, "positions": "rope", "max_length": 4096}
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    rewarded = {"rollout.reward_model": "runs/reward", "rollout.mesh.model": "4"}
    config = load_config(f"{CONFIGS / name}:{tmp_path}", rewarded)
    check(config, 8)
    assert config.rollout.mesh.model == 4 and config.train.init_from == str(tmp_path)
    with pytest.raises(UserError, match=r"needs a reward: a function, --config\.rollout\.rewards=FILE\.py:NAME"):
        check(load_config(f"{CONFIGS / name}:{tmp_path}", {}), 8)


@pytest.mark.parametrize("name", OF_A_BASE)
def test_configs_beside_a_base(name, tmp_path):
    """For any run; without one they say what is missing."""
    model = {"num_layers": 2, "embed_dim": 64, "vocab_size": 300, "positions": "rope", "max_length": 4096}
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    config = load_config(f"{CONFIGS / name}:{tmp_path}", {})
    check(config, 1)
    assert config.train.init_from == str(tmp_path) and config.model.embed_dim == 64 and config.data.length == 2048
    stretched = {"model.rope_scaling": "yarn", "model.rope_factor": "2.0", "model.max_length": "8192"}
    check(load_config(f"{CONFIGS / name}:{tmp_path}", stretched | {"data.length": "8192"}), 1)
    with pytest.raises(UserError, match=r"say which one, --config\.train\.init_from=WORKDIR"):
        check(load_config(str(CONFIGS / name), {}), 1)


def test_what_the_help_of_a_config_says_can_be_set():
    """The layouts that llama3_8b.py and the help texts offer."""
    hsdp = {"mesh.replica": "8", "mesh.data": "8"}
    check(load_config(str(CONFIGS / "llama3_8b.py"), hsdp), 64)
    long = {"mesh.model": "8", "layout.sequence_parallel": "true"}
    check(load_config(str(CONFIGS / "llama3_8b.py"), long), 64)
    check(load_config(str(CONFIGS / "llama3_8b.py"), {"mesh.data": "8", "mesh.model": "4"}), 32)
    check(load_config(str(CONFIGS / "shakespeare.py"), {"mesh.data": "4", "mesh.model": "2"}), 8)


def test_a_preset_by_flag():
    config = load_config(str(CONFIGS / "quickstart.py"), {"model": "gpt2", "model.num_layers": "6"})
    assert (config.model.num_layers, config.model.embed_dim, config.model.positions) == (6, 768, "learned")
