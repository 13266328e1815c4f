"""A run on disk, as `jaxllm train` leaves it: untrained, 32 tokens of context."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_on_disk(tmp_path_factory) -> Path:
    """Not to be written to: copy it first."""
    import jax

    from jaxllm.data.tokenizer_training import train_tokenizer
    from jaxllm.layout.config import LayoutConfig, MeshConfig
    from jaxllm.layout.layout import make_layout
    from jaxllm.model.config import ModelConfig
    from jaxllm.model.spec import model_spec
    from jaxllm.train.checkpoint.checkpoints import Checkpoints
    from jaxllm.train.config import Config, PrecisionConfig, config_dict
    from jaxllm.train.optimizer import make_optimizer
    from jaxllm.train.state import init_state

    workdir = tmp_path_factory.mktemp("run")
    text = ["却说曹操引兵追赶，玄德大惊。the quick brown fox jumps over the lazy dog\n"] * 20
    tokenizer = train_tokenizer(text, vocab_size=320)
    tokenizer.save(workdir / "tokenizer")
    config = Config(
        model=ModelConfig(num_layers=1, embed_dim=16, num_heads=2, max_length=32, positions="rope"),
        mesh=MeshConfig(data=64, model=2),  # trained on a cluster that is not here
        precision=PrecisionConfig(compute="float32"),
    )
    (workdir / "config.json").write_text(json.dumps(config_dict(config)))
    spec = model_spec(config.model.resolved(tokenizer.vocab_size))
    optimizer = make_optimizer(config.optimizer, config.train.steps, spec.axes)
    layout = make_layout(MeshConfig(data=1), LayoutConfig(), devices=jax.devices()[:1])
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(init_state(spec, optimizer, layout, seed=0), {}, config_dict(config), {})
    return workdir
