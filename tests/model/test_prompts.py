"""Virtual tokens: where they stand, what they change, how many are trained, and where they start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layout.scope import joined
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.lora_trees import started
from jaxllm.model.prompts import filled
from jaxllm.model.spec import model_spec
from tests.layout.runs import GPT2, LLAMA

NUMBER, HIDDEN = 3, 10
PROMPT = AdapterConfig(kind="prompt", num_virtual_tokens=NUMBER, encoder_dim=HIDDEN)
KINDS = {
    "prompt": PROMPT,
    "p_tuning": dataclasses.replace(PROMPT, kind="p_tuning"),
    "p_tuning_lstm": dataclasses.replace(PROMPT, kind="p_tuning", encoder="lstm"),
    "prefix": dataclasses.replace(PROMPT, kind="prefix"),
    "prefix_projected": dataclasses.replace(PROMPT, kind="prefix", prefix_projection=True),
}


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_how_many_are_trained(model):
    embed, keys, layers = model.embed_dim, model.num_kv_heads * model.head_dim, model.num_layers
    linear = lambda inputs, outputs: (inputs + 1) * outputs  # noqa: E731
    lstm = lambda inputs: 2 * 4 * HIDDEN * (inputs + HIDDEN + 2)  # noqa: E731
    expected = {
        "prompt": NUMBER * embed,
        "p_tuning": NUMBER * embed + linear(embed, HIDDEN) + linear(HIDDEN, HIDDEN) + linear(HIDDEN, embed),
        "p_tuning_lstm": NUMBER * embed
        + lstm(embed)
        + lstm(2 * HIDDEN)
        + linear(2 * HIDDEN, 2 * HIDDEN)
        + linear(2 * HIDDEN, embed),
        "prefix": NUMBER * layers * 2 * keys,
        "prefix_projected": NUMBER * keys + linear(keys, HIDDEN) + linear(HIDDEN, layers * 2 * keys),
    }
    found = {kind: model_spec(model, adapter).num_trained_parameters for kind, adapter in KINDS.items()}
    assert found == expected
    base = model_spec(model).num_parameters
    assert all(model_spec(model, a).num_parameters == base + found[kind] for kind, a in KINDS.items())


def test_no_encoder_dim_is_the_width_of_the_model():
    wide = dataclasses.replace(KINDS["p_tuning"], encoder_dim=0)
    assert model_spec(LLAMA, wide).parameters["virtual.encoder.second.kernel"].shape == (LLAMA.embed_dim,) * 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_in_the_places_do_not_matter(kind):
    """Only what follows is asked: a prefix lets go of what layers make of its places."""
    spec = model_spec(LLAMA, KINDS[kind])
    params = jax.tree.map(lambda w: 5 * w, spec.init(0))
    tokens = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (2, 12))
    others = tokens.copy()
    others[:, :NUMBER] = (tokens[:, :NUMBER] + 7) % LLAMA.vocab_size
    run = jax.jit(lambda params, tokens: spec.merge(params)(tokens)[:, NUMBER:])
    np.testing.assert_array_equal(run(params, tokens), run(params, others))
    noise = lambda w: w + jax.random.normal(jax.random.key(1), w.shape)  # noqa: E731
    moved = joined(spec.base(params), jax.tree.map(noise, spec.own(params)))
    assert np.abs(run(params, tokens) - run(moved, tokens)).max() > 1e-2


def test_filled():
    x = jnp.arange(24.0).reshape(1, 6, 4)
    positions = jnp.array([[0, 1, 2, 0, 1, 2]])
    virtual = -1.0 - jnp.arange(8.0).reshape(2, 4)
    expected = x.at[0, jnp.array([0, 1, 3, 4])].set(jnp.concatenate([virtual, virtual]))
    np.testing.assert_array_equal(filled(x, 2, lambda: virtual, positions), expected)
    for at in range(6):  # token by token
        one = filled(x[:, at : at + 1], 2, lambda: virtual, positions[:, at : at + 1])
        np.testing.assert_array_equal(one, expected[:, at : at + 1])


def test_an_adapter_changes_nothing_of_what_a_model_starts_from():
    base = model_spec(LLAMA).init(3)
    for adapter in KINDS.values():
        spec = model_spec(LLAMA, adapter)
        for one, other in zip(*map(jax.tree.leaves, (base, spec.base(spec.init(3)))), strict=True):
            np.testing.assert_array_equal(one, other)


def test_where_a_prompt_starts():
    base = model_spec(LLAMA).init(0)
    table = np.asarray(base["embedding"]["table"])

    def start(init: str, text=()) -> np.ndarray:
        spec = model_spec(LLAMA, dataclasses.replace(PROMPT, num_virtual_tokens=5, prompt_init=init))
        return np.asarray(started(spec, base, 1, text)["virtual"]["embedding"])

    np.testing.assert_array_equal(start("text", [7, 3]), table[[7, 3, 7, 3, 7]])
    np.testing.assert_array_equal(start("text", [1, 2, 3, 4, 5, 6]), table[[1, 2, 3, 4, 5]])
    found = start("vocabulary")
    rows = [int(np.flatnonzero((table == row).all(1))[0]) for row in found]
    assert len(set(rows)) > 1
    assert 0.5 < start("random").std() < 1.5
