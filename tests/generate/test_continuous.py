"""Continuous batching: the tokens and log-probabilities of the whole forward pass, however rows are scheduled."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.generate import continuous
from jaxllm.generate.continuous import ContinuousDecoder, draw
from jaxllm.generate.reshard import Resharding
from jaxllm.generate.run import cast_for_use
from jaxllm.generate.sampling import Sampling
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.layout.scope import joined
from jaxllm.layout.zero import compute_spec, state_spec
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.lora_trees import merged, started
from jaxllm.model.spec import model_spec
from tests.generate import test_prompts
from tests.generate.test_decode import GPT2, LLAMA, decoder, sharp

ALIBI = dataclasses.replace(GPT2, positions="alibi")
WINDOW = dataclasses.replace(LLAMA, sliding_window=7)
EXPERTS = dataclasses.replace(LLAMA, num_experts=4, experts_per_token=2)
PROMPTS = [[5, 17, 3], [8], [2, 2, 9, 40, 11, 60, 7, 1, 30], [12] * 20, [3, 4], [9, 9, 1, 7]]
BUDGETS = [12, 3, 40, 1, 7, 20]
LENGTH, NUM_TOKENS = 64, 55


def make(config=LLAMA, *, mesh=None, **fields):
    """A decoder and its weights where it computes with them."""
    mesh = mesh or {"data": 1}
    devices = jax.devices()[: math.prod(mesh.values())]
    layout, spec = make_layout(MeshConfig(**mesh), LayoutConfig(zero_stage=0), devices=devices), model_spec(config)
    place = lambda leaf, axes: jax.sharding.NamedSharding(layout.mesh, compute_spec(layout, axes, leaf.shape))  # noqa: E731
    weights = jax.device_put(sharp(config), jax.tree.map(place, spec.shapes, spec.axes))
    how = {"num_tokens": NUM_TOKENS, "slots": 2, "length": LENGTH, "temperature": 0.7, "end_ids": (1,)} | fields
    return ContinuousDecoder(spec, layout, **how), weights


@functools.cache
def usual():
    written, weights = make()
    return written.generate(weights, PROMPTS, max_new_tokens=BUDGETS, seed=3)


@functools.cache
def log_probabilities(config):
    def all_of(weights, tokens, temperature):
        model = model_spec(config).merge(weights)
        logits = model.head.logits(model(tokens[None]))[0, :, :NUM_TOKENS] / temperature
        return jax.nn.log_softmax(logits)

    return jax.jit(all_of)


def check_log_probs(config, answers, temperature, tolerance=1e-5):
    """Those of a whole forward pass over prompt and answer."""
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        text = np.zeros(LENGTH + 1, np.int32)
        text[: len(prompt) + len(answer.tokens)] = [*prompt, *answer.tokens]
        expected = log_probabilities(config)(sharp(config), text[:LENGTH], temperature)
        places = np.arange(len(answer.tokens)) + len(prompt) - 1
        np.testing.assert_allclose(answer.log_probs, np.asarray(expected)[places, answer.tokens], atol=tolerance)


@pytest.mark.parametrize("config", [LLAMA, GPT2, ALIBI, WINDOW], ids=["llama", "gpt2", "alibi", "window"])
def test_greedy_text_is_that_of_the_other_decoder(config):
    """More prompts than slots, of unequal lengths and budgets."""
    ours, weights = make(config, temperature=0.0, num_tokens=61, end_ids=())
    answers = ours.generate(weights, PROMPTS, max_new_tokens=BUDGETS, seed=0)
    assert [len(answer.tokens) for answer in answers] == BUDGETS
    columns = decoder(config, "one device").generate(PROMPTS, [Sampling(temperature=0)] * len(PROMPTS), 40, seed=0)
    expected = np.stack(list(columns), axis=1)
    for answer, row in zip(answers, expected, strict=True):
        assert answer.tokens == row[: len(answer.tokens)].tolist()


def test_log_probs_are_those_of_the_distribution_drawn_from():
    """At the temperature, over the tokens that there are; what ends an answer is a part of it, and ends it."""
    check_log_probs(LLAMA, usual(), 0.7)
    for answer, budget in zip(usual(), BUDGETS, strict=True):
        assert max(answer.tokens) < NUM_TOKENS and 1 not in answer.tokens[:-1]
        assert (answer.finish_reason == "stop") == (answer.tokens[-1] == 1)
        assert answer.finish_reason == "stop" or len(answer.tokens) == budget
    assert "length" in {answer.finish_reason for answer in usual()}


@pytest.mark.parametrize("fields", [{"slots": 1}, {"slots": 6}, {"slots": 5, "static": True}], ids=str)
def test_scheduling_changes_no_token(fields, monkeypatch):
    """How many rows there are, and whether they wait for each other; nor how many tokens a call draws."""
    monkeypatch.setattr(continuous, "STEPS", 5)
    ours, weights = make(**fields)
    answers = ours.generate(weights, PROMPTS, max_new_tokens=BUDGETS, seed=3)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in usual()]


def test_seeds_and_numbers_draw_anew():
    ours, weights = make()
    other = ours.generate(weights, PROMPTS, max_new_tokens=BUDGETS, seed=4)
    assert [answer.tokens for answer in other] != [answer.tokens for answer in usual()]
    twice = ours.generate(weights, [PROMPTS[0]] * 2, max_new_tokens=12, seed=3)
    assert twice[0].tokens == usual()[0].tokens != twice[1].tokens


@pytest.mark.parametrize("mesh", [{"data": 2, "model": 2}, {"data": 8}, {"data": 1, "model": 4}], ids=str)
def test_layouts_write_the_same(mesh):
    ours, weights = make(mesh=mesh)
    answers = ours.generate(weights, PROMPTS, max_new_tokens=BUDGETS, seed=3)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in usual()]


def test_experts_on_other_devices():
    ours, weights = make(EXPERTS, mesh={"expert": 2, "model": 2})
    check_log_probs(EXPERTS, ours.generate(weights, PROMPTS, max_new_tokens=BUDGETS, seed=3), 0.7)


def test_prompts_that_fill_the_row_but_for_one_token_or_whole():
    ours, weights = make()
    one, none = ours.generate(weights, [[5] * (LENGTH - 1), [5] * LENGTH], max_new_tokens=9, seed=0)
    assert len(one.tokens) == 1 and none == ([], [], "length")


@pytest.mark.parametrize(("model", "kind", "mesh"), [
    (GPT2, "prompt", {"data": 1}), (LLAMA, "p_tuning_lstm", {"data": 1}),
    (LLAMA, "prefix_projected", {"data": 2, "model": 2}), (test_prompts.WINDOW, "prefix", {"data": 1}),
], ids=["prompt", "p_tuning", "projected", "prefix"])  # fmt: skip
def test_virtual_tokens_stand_before_every_prompt(model, kind, mesh):
    """Greedy text is that of whole forward passes; more prompts than slots, and free rows beside those at work."""
    spec, params = test_prompts.made(model, kind)
    devices = jax.devices()[: math.prod(mesh.values())]
    layout = make_layout(MeshConfig(**mesh), LayoutConfig(zero_stage=0), devices=devices)
    how = {"num_tokens": 61, "slots": 2, "length": spec.context, "temperature": 0.0, "end_ids": ()}
    weights, prompts = cast_for_use(params, spec, layout, "float32"), test_prompts.PROMPTS
    answers = ContinuousDecoder(spec, layout, **how).generate(weights, prompts, max_new_tokens=test_prompts.NEW, seed=0)
    assert [answer.tokens for answer in answers] == [test_prompts.greedy(model, kind, prompt) for prompt in prompts]


def test_tokens_are_drawn_as_often_as_they_are_probable():
    """20,000 draws from a vocabulary of several blocks, some of it impossible."""
    logits = jnp.where(jnp.arange(600) % 7 == 0, jnp.linspace(-3, 3, 600), -20.0)
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens, log_probs = jax.jit(lambda: draw(jnp.tile(logits, (len(keys), 1)), keys, 1.0, 590))()
    p = np.exp(np.float64(logits[:590]))
    p /= p.sum()
    counts = np.bincount(tokens, minlength=590)
    expected = p * len(keys)
    likely = expected > 5
    chi_squared = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_squared < likely.sum() + 5 * np.sqrt(2 * likely.sum())
    np.testing.assert_allclose(np.asarray(log_probs), np.log(p)[np.asarray(tokens)], atol=1e-5)


@pytest.mark.parametrize("source", [
    ({"pipeline": 2, "data": 2, "model": 2}, {"zero_stage": 3}), ({"data": 8}, {"zero_stage": 1}),
], ids=["pipeline", "zero 1"])  # fmt: skip
def test_weights_are_brought_from_any_layout(source):
    """Bit for bit, a LoRA and what it stands beside; the adapted model writes what the merged one does."""
    mesh, fields = source
    train = make_layout(MeshConfig(**mesh), LayoutConfig(**fields))
    config = dataclasses.replace(LLAMA, num_layers=2)
    rollout = make_layout(MeshConfig(data=4, model=2), LayoutConfig(zero_stage=0))
    spec = model_spec(config, AdapterConfig(kind="lora", rank=2))
    base = sharp(config)
    params = jax.jit(lambda base: started(spec, base, 1))(base)
    trained = jax.tree.map(lambda w: w + 0.1, spec.trained(params))
    held = (trained, spec.frozen(params, jnp.dtype("float32")))
    axes = spec.trained_axes, spec.held_axes(jnp.dtype("float32"))
    place = lambda w, a: jax.device_put(w, jax.sharding.NamedSharding(train.mesh, state_spec(train, a, w.shape)))  # noqa: E731
    at_rest = [jax.tree.map(place, *both) for both in zip(held, axes, strict=True)]
    weights = Resharding(*axes, train, rollout, jnp.dtype("float32"))(*at_rest)
    for one, other in zip(jax.tree.leaves(weights), jax.tree.leaves(joined(*held)), strict=True):
        np.testing.assert_array_equal(one, other)
    how = {"num_tokens": 61, "slots": 4, "length": LENGTH, "temperature": 0.7, "end_ids": ()}
    answers = ContinuousDecoder(spec, rollout, **how).generate(weights, PROMPTS, max_new_tokens=5, seed=0)
    whole = jax.jit(lambda params: merged(spec, params))(joined(*held))
    single = make_layout(MeshConfig(data=1), LayoutConfig(zero_stage=0), devices=jax.devices()[:1])
    expected = ContinuousDecoder(model_spec(config), single, **how).generate(whole, PROMPTS, max_new_tokens=5, seed=0)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]


def test_bfloat16_agrees_within_rounding():
    ours, weights = make()
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    # Log-probabilities of about 4, 8 bits of each: 2^-7 x 4 is 0.03. Measured: 0.008 at most.
    check_log_probs(LLAMA, ours.generate(half, PROMPTS, max_new_tokens=BUDGETS, seed=3), 0.7, tolerance=0.03)
