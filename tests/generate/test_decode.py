"""Decoding with the cache against the whole forward pass done again for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.generate.decode import CHUNK, Decoder, bucket, pad_left
from jaxllm.generate.sampling import Sampling, row_keys, sample, stack
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.layout.zero import compute_spec
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import model_spec

GPT2 = ModelConfig(num_layers=2, embed_dim=32, num_heads=4, vocab_size=61, max_length=320).resolved()
LLAMA = ModelConfig(
    num_layers=3,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=48,
    vocab_size=61,
    max_length=320,
    positions="rope",
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    use_bias=False,
    tied_head=False,
).resolved()
PROMPTS = [[5, 17, 3], [8], [2, 2, 9, 40, 11, 60, 7, 1, 30]]
NEW = 12
GREEDY = [Sampling(temperature=0)] * 3
LAYOUTS = {
    "one device": (MeshConfig(data=1), LayoutConfig(zero_stage=0)),
    "data 4 model 2": (MeshConfig(data=4, model=2), LayoutConfig(zero_stage=0)),
    "model 4, zero 3, unrolled": (MeshConfig(data=2, model=4), LayoutConfig(zero_stage=3, scan_layers=False)),
    "sequence parallel": (MeshConfig(data=2, model=4), LayoutConfig(zero_stage=0, sequence_parallel=True)),
}


@functools.cache
def sharp(config: ModelConfig):
    """Random weights ten times as wide as at the start of training, so that the most probable token is clear."""
    return jax.jit(lambda: jax.tree.map(lambda w: 10 * w if w.ndim > 2 else w, model_spec(config).init(0)))()


@functools.cache
def decoder(config: ModelConfig, layout: str) -> Decoder:
    mesh, how = LAYOUTS[layout]
    placed = make_layout(mesh, how, devices=jax.devices()[: mesh.data * mesh.model])
    spec = model_spec(config)
    shardings = jax.tree.map(
        lambda leaf, axes: jax.sharding.NamedSharding(placed.mesh, compute_spec(placed, axes, leaf.shape)),
        spec.shapes,
        spec.axes,
    )
    return Decoder(spec, jax.device_put(sharp(config), shardings), placed)


@functools.cache
def whole_forward(config: ModelConfig):
    """Compiled (tokens, number of them, settings, key) -> the next token of one row, by the whole forward pass."""
    spec = model_spec(config)

    def next_token(weights, tokens, count, settings, key):
        model = spec.merge(weights)
        logits = model.head.logits(model(tokens))[:, count - 1]
        there = jnp.arange(tokens.shape[1]) < count
        seen = jnp.zeros((1, config.vocab_size), bool).at[0, tokens[0]].max(there)
        return sample(logits, seen, settings, key[None])[0]

    return functools.partial(jax.jit(next_token), sharp(config))


def from_scratch(config: ModelConfig, prompts, settings, new=NEW, seed=0) -> list[list[int]]:
    """Each row alone, unpadded, without a cache. Tokens to come are no matter to those before: one shape serves all."""
    width = max(map(len, prompts)) + new
    outputs = []
    for prompt, how, key in zip(prompts, settings, row_keys(seed, len(prompts)), strict=True):
        tokens = list(prompt)
        for drawn in range(new):
            whole = np.array([tokens + [0] * (width - len(tokens))], np.int32)
            next_key = jax.random.fold_in(key, drawn)
            tokens.append(int(whole_forward(config)(whole, len(tokens), stack([how]), next_key)))
        outputs.append(tokens[len(prompt) :])
    return outputs


def decoded(decoder: Decoder, prompts, settings, new=NEW, seed=0) -> list[list[int]]:
    columns = list(decoder.generate(prompts, settings, new, seed))
    assert len(columns) == new
    return np.array(columns).T.tolist()


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        pytest.param(GPT2, "one device", id="gpt2, one device"),
        pytest.param(GPT2, "sequence parallel", id="gpt2, sequence parallel"),
        pytest.param(LLAMA, "data 4 model 2", id="llama, data 4 model 2"),
        pytest.param(LLAMA, "model 4, zero 3, unrolled", id="llama, model 4, zero 3, unrolled"),
    ],
)
def test_greedy_with_the_cache_is_greedy_from_scratch(config, layout):
    expected = from_scratch(config, PROMPTS, GREEDY)
    assert len({token for row in expected for token in row}) > 8  # the model does not repeat one token
    assert decoded(decoder(config, layout), PROMPTS, GREEDY) == expected


def test_a_long_prompt_is_read_in_chunks():
    prompts = [np.random.default_rng(0).integers(0, 61, CHUNK + 20).tolist(), [4, 8]]
    expected = from_scratch(LLAMA, prompts, GREEDY[:2], new=5)
    assert decoded(decoder(LLAMA, "one device"), prompts, GREEDY[:2], new=5) == expected


def test_drawn_tokens_hang_on_prompt_settings_seed_and_row_alone():
    settings = [Sampling(1.0, repetition_penalty=1.5), Sampling(0), Sampling(1.3, top_k=9, top_p=0.9)]
    expected = from_scratch(LLAMA, PROMPTS, settings, seed=4)
    assert decoded(decoder(LLAMA, "data 4 model 2"), PROMPTS, settings, seed=4) == expected
    one = decoder(LLAMA, "one device")
    assert decoded(one, PROMPTS, settings, seed=4) == expected
    assert decoded(one, [PROMPTS[0], [50] * 7], [settings[0], Sampling(2.0)], seed=4)[0] == expected[0]
    assert decoded(one, PROMPTS, settings, seed=5) != expected


def test_the_device_is_asked_for_no_more_than_one_token_ahead():
    columns = decoder(GPT2, "one device").generate(PROMPTS, GREEDY, NEW, 0)
    first = next(columns)
    columns.close()
    assert first.shape == (3,)


def test_padding_is_on_the_left():
    tokens, positions, segment_ids = pad_left([[7, 8], [9]], 3, 4)
    assert tokens.tolist() == [[0, 0, 7, 8], [0, 0, 0, 9], [0, 0, 0, 0]]
    assert positions.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert segment_ids.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize(("slots", "size"), [(1, 64), (65, 128), (1024, 1024), (1025, 2048), (2049, 3072)])
def test_buckets(slots, size):
    assert bucket(slots, 64) == size
