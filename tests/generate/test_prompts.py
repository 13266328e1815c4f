"""Virtual tokens in use: cached decoding, likelihoods and scores against whole forward passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.generate.decode import CHUNK, Decoder
from jaxllm.generate.engine import Engine
from jaxllm.generate.likelihood import Pair, Scorer
from jaxllm.generate.run import cast_for_use
from jaxllm.generate.score import score
from jaxllm.layout.layout import make_layout
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import model_spec
from tests.generate.test_decode import GPT2, LAYOUTS, LLAMA
from tests.model.test_prompts import KINDS, NUMBER

ALIBI = dataclasses.replace(GPT2, positions="alibi")
WINDOW = dataclasses.replace(LLAMA, sliding_window=9)
PROMPTS = [[5, 17, 3], [8], [2, 2, 9, 40, 11, 60, 7, 1, 30]]
NEW = 8


@functools.cache
def made(model: ModelConfig, kind: str):
    spec = model_spec(model, KINDS[kind])
    wide = lambda: jax.tree.map(lambda w: 10 * w if w.ndim > 2 else w, spec.init(0))  # noqa: E731
    return spec, jax.jit(wide)()


@functools.cache
def logits_of(model: ModelConfig, kind: str):
    """Compiled tokens, without places -> logits of each."""
    spec, params = made(model, kind)

    @jax.jit
    def run(params, tokens):
        whole = spec.merge(params)
        return whole.head.logits(whole(jnp.pad(tokens, ((0, 0), (NUMBER, 0)))))[:, NUMBER:]

    return functools.partial(run, params)


def greedy(model: ModelConfig, kind: str, prompt: list[int]) -> list[int]:
    """By the whole forward pass, again for every token; of one shape, since what follows changes nothing."""
    tokens = list(prompt)
    for _ in range(NEW):
        row = np.zeros((1, max(map(len, PROMPTS)) + NEW), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(logits_of(model, kind)(row)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def decoder(model: ModelConfig, kind: str, layout: str) -> Decoder:
    spec, params = made(model, kind)
    mesh, how = LAYOUTS[layout]
    placed = make_layout(mesh, how, devices=jax.devices()[: mesh.data * mesh.model])
    return Decoder(spec, cast_for_use(params, spec, placed, "float32"), placed)


@pytest.mark.parametrize(
    ("model", "kind", "layout"),
    [
        (GPT2, "prompt", "one device"),
        (LLAMA, "p_tuning_lstm", "one device"),
        (WINDOW, "prefix", "one device"),
        (ALIBI, "prefix", "data 4 model 2"),
        (LLAMA, "prefix_projected", "data 4 model 2"),
    ],
)
def test_cached_generation_is_that_of_whole_forward_passes(model, kind, layout):
    from jaxllm.generate.sampling import Sampling

    columns = decoder(model, kind, layout).generate(PROMPTS, [Sampling(temperature=0)] * 3, NEW, seed=0)
    found = np.stack(list(columns), axis=1).tolist()
    assert found == [greedy(model, kind, prompt) for prompt in PROMPTS]
    plain = Decoder(model_spec(model), made(model, kind)[0].base(made(model, kind)[1]), _one_device())
    without = np.stack(list(plain.generate(PROMPTS, [Sampling(temperature=0)] * 3, NEW, seed=0)), axis=1).tolist()
    assert found != without


def _one_device():
    mesh, how = LAYOUTS["one device"]
    return make_layout(mesh, how, devices=jax.devices()[:1])


def test_places_in_another_chunk_than_the_first():
    """A long prompt in the batch: the places of a short one come when the first chunk is in the cache."""
    from jaxllm.generate.sampling import Sampling

    prompts = [[7] * (CHUNK + 10), [5, 17, 3]]
    columns = decoder(LLAMA, "prefix", "one device").generate(prompts, [Sampling(temperature=0)] * 2, NEW, seed=0)
    assert np.stack(list(columns), axis=1)[1].tolist() == greedy(LLAMA, "prefix", prompts[1])


@pytest.fixture(scope="module", params=["prompt", "prefix_projected"])
def adapted(request, run):
    """The run of this folder's tests with an adapter, and how the logits of a text are computed by hand."""
    spec = model_spec(run.spec.config, KINDS[request.param])
    own = cast_for_use(spec.init(1), spec, run.layout, "float32")
    weights = jax.tree.map(lambda leaf: leaf, own) | run.weights
    if request.param != "prompt":
        attention = run.weights["layers"]["attention"] | {"prefix": own["layers"]["attention"]["prefix"]}
        weights["layers"] = run.weights["layers"] | {"attention": attention}

    @jax.jit
    def log_p(tokens):
        whole = spec.merge(weights)
        places = jnp.zeros((1, NUMBER), jnp.int32)
        return jax.nn.log_softmax(whole.head.logits(whole(jnp.concatenate([places, tokens], 1)))[0, NUMBER:])

    return run._replace(spec=spec, weights=weights), log_p


def test_likelihoods(adapted):
    run, log_p = adapted
    pairs = [Pair([3, 9, 200], [7, 8]), Pair([5], [9, 10, 11, 12]), Pair(list(range(3, 73)), [9, 4])]
    for pair, found in zip(pairs, Scorer(run).likelihoods(pairs), strict=True):
        tokens = [*pair.context, *pair.targets][-run.spec.context - 1 :]
        logs = np.asarray(log_p(np.array([tokens[:-1]])))[-len(pair.targets) :]
        expected = sum(logs[i, target] for i, target in enumerate(pair.targets))
        np.testing.assert_allclose(found.nats, expected, rtol=1e-5)


def test_scores(adapted):
    """Several windows, packed, each behind its virtual tokens."""
    run, log_p = adapted
    text = "the quick brown fox jumps over the lazy dog; " * 3
    tokenizer, length, overlap = run.tokenizer, 16, 6
    ids = [*([tokenizer.bos_id] if tokenizer.bos_id is not None else []), *tokenizer.encode(text)]
    ids += [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    nats, done = 0.0, 0
    while done < len(ids):
        start = max(done - overlap, 0)
        window = ids[start : start + length]
        logs = np.asarray(log_p(np.array([window])))
        nats -= sum(logs[i - 1, window[i]] for i in range(max(done - start, 1), len(window)))
        done = start + len(window)
    np.testing.assert_allclose(score(run, [text], length=length, overlap=overlap).nats, nats, rtol=1e-5)


def test_the_context_is_shorter_by_the_virtual_tokens(adapted):
    run, _ = adapted
    engine = Engine(run)
    assert engine.max_length == run.spec.config.max_length - NUMBER == 64 - NUMBER
    (completion,) = engine.generate([[5] * (engine.max_length - 2)], max_new_tokens=9)
    assert (completion.finish_reason, len(completion.tokens)) == ("context", 2)
    with pytest.raises(UserError, match=f"context is {64 - NUMBER}"):
        engine.generate([[5] * engine.max_length])
    with pytest.raises(UserError, match=f"from 2 to the model's context, {64 - NUMBER}"):
        score(run, ["the fox"], length=64)
