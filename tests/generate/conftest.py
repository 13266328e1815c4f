"""A small model with random weights and a real tokenizer."""

import pytest

from jaxllm.generate.run import Run


@pytest.fixture(scope="session")
def run() -> Run:
    """A Llama of 64 tokens of context on one device; its tokenizer writes Chinese and English."""
    import jax

    from jaxllm.data.tokenizer_training import train_tokenizer
    from jaxllm.generate.run import cast_for_use
    from jaxllm.layout.config import LayoutConfig, MeshConfig
    from jaxllm.layout.layout import make_layout
    from jaxllm.model.config import ModelConfig
    from jaxllm.model.spec import model_spec
    from jaxllm.train.config import Config

    text = ["却说曹操引兵追赶，玄德大惊。the quick brown fox jumps over the lazy dog; User: Assistant:\n"] * 20
    tokenizer = train_tokenizer(text, vocab_size=320)
    model = ModelConfig(
        num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, max_length=64, positions="rope", norm="rmsnorm"
    )
    spec = model_spec(model.resolved(tokenizer.vocab_size))
    layout = make_layout(MeshConfig(data=1), LayoutConfig(zero_stage=0), devices=jax.devices()[:1])
    params = jax.jit(lambda: jax.tree.map(lambda w: 10 * w if w.ndim > 2 else w, spec.init(0)))()
    config = Config(model=model)
    return Run(config, spec, cast_for_use(params, spec, layout, "float32"), layout, tokenizer, step=0)
