"""Log-likelihoods against log-softmax of the whole logits of each sequence alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.generate import likelihood
from jaxllm.generate.decode import bucket
from jaxllm.generate.engine import Engine
from jaxllm.generate.likelihood import SHORTEST, Pair, Scorer, positions_at_once
from jaxllm.generate.sampling import Sampling
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.layout.zero import compute_spec
from jaxllm.model.spec import model_spec

TEXTS = [
    ("却说曹操", "引兵追赶，玄德大惊。"),
    ("the quick brown", " fox"),
    ("the quick brown ", "fox"),
    ("", "dog; User:"),
    ("玄德", "曹" * 30),
]
LAYOUTS = {
    "data 2 model 4": (MeshConfig(data=2, model=4), LayoutConfig(zero_stage=0)),
    "data 4 model 2, zero 3, sequence parallel": (
        MeshConfig(data=4, model=2),
        LayoutConfig(zero_stage=3, sequence_parallel=True, scan_layers=False),
    ),
    "replica 2 data 2 model 2": (MeshConfig(replica=2, data=2, model=2), LayoutConfig(zero_stage=0)),
}


@pytest.fixture(scope="module")
def pairs(run) -> list[Pair]:
    """Of texts, and of random tokens: one target, many, as many as fit, and contexts that are too long."""
    scorer, random = Scorer(run), np.random.default_rng(0)
    drawn = [(1, 1), (5, 3), (40, 2), (63, 1), (64, 1), (100, 5), (3, 40), (1, 64), (90, 64)]
    ids = lambda count: random.integers(0, run.tokenizer.vocab_size, count).tolist()  # noqa: E731
    return [scorer.pair(*texts) for texts in TEXTS] + [Pair(ids(before), ids(after)) for before, after in drawn]


@functools.cache
def logits_of(config):
    spec = model_spec(config)

    def logits(weights, tokens):
        model = spec.merge(weights)
        return model.head.logits(model(tokens))

    return jax.jit(logits)


def definition(run, pairs) -> list[tuple[float, bool]]:
    """Each pair alone, the whole vocabulary at every position, log-softmax in float64."""
    results = []
    for context, targets in pairs:
        whole = [*context, *targets][-run.spec.config.max_length - 1 :]
        padded = np.zeros((1, run.spec.config.max_length), np.int32)  # what comes later is no matter: one program
        padded[0, : len(whole) - 1] = whole[:-1]
        scores = np.asarray(logits_of(run.spec.config)(run.weights, padded), np.float64)[0, : len(whole) - 1][
            -len(targets) :
        ]
        log_p = scores - np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_p -= scores.max(-1, keepdims=True)
        nats = log_p[np.arange(len(targets)), targets].sum()
        results.append((nats, bool((scores[:, : run.tokenizer.vocab_size].argmax(-1) == targets).all())))
    return results


def assert_equal(results, expected):
    np.testing.assert_allclose([r.nats for r in results], [nats for nats, _ in expected], rtol=1e-5)
    assert [r.is_greedy for r in results] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_likelihood_is_the_definition_however_it_is_batched(run, pairs, batch_size):
    done = []
    assert_equal(Scorer(run, batch_size).likelihoods(pairs, done.append), definition(run, pairs))
    assert sum(done) == len(pairs) and max(done) <= batch_size


@pytest.mark.parametrize(("mesh", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_likelihood_is_the_same_on_any_layout(run, pairs, mesh, layout):
    placed = make_layout(mesh, layout)
    shardings = jax.tree.map(
        lambda leaf, axes: jax.sharding.NamedSharding(placed.mesh, compute_spec(placed, axes, leaf.shape)),
        run.spec.shapes,
        run.spec.axes,
    )
    there = run._replace(layout=placed, weights=jax.device_put(run.weights, shardings))
    assert_equal(Scorer(there, 5).likelihoods(pairs), definition(run, pairs))


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": "learned", "norm": "layernorm", "head_bias": True},
        {"positions": "alibi", "sliding_window": 24},
    ],
    ids=str,
)
def test_a_likelihood_is_the_definition_for_any_positions(run, pairs, fields):
    spec = model_spec(dataclasses.replace(run.spec.config, **fields))
    weights = jax.jit(lambda: jax.tree.map(lambda w: 10 * w if w.ndim > 2 else w, spec.init(0)))()
    if "head_bias" in fields:
        weights["head_bias"]["bias"] = jax.random.normal(jax.random.key(1), (run.tokenizer.vocab_size,))
    other = run._replace(spec=spec, weights=weights)
    assert_equal(Scorer(other).likelihoods(pairs), definition(other, pairs))


def test_logits_are_made_a_few_columns_at_a_time(run, pairs, monkeypatch):
    bytes_a_column = 4 * 4 * run.spec.config.vocab_size
    monkeypatch.setattr(likelihood, "LOGITS_BYTES", 3 * bytes_a_column)
    assert positions_at_once(run.layout, 4, 64, run.spec.config.vocab_size) == 2
    scorer = Scorer(run, 4)
    assert_equal(scorer.likelihoods(pairs), definition(run, pairs))
    tokens = jnp.zeros((4, 64), jnp.int32)
    program = scorer._score.lower(run.weights, tokens, tokens, tokens, tokens).as_text()
    vocab = run.spec.config.vocab_size
    assert f"tensor<4x2x{vocab}xf32>" in program and f"tensor<4x64x{vocab}xf32>" not in program


def test_what_greedy_decoding_writes_is_greedy(run):
    """With more rows in the table than there are tokens, each larger than any token's: they are never written."""
    table = run.weights["embedding"]["table"]
    wide = run._replace(
        spec=model_spec(dataclasses.replace(run.spec.config, vocab_size=2 * len(table))),
        weights=run.weights | {"embedding": {"table": jnp.concatenate([table, 30 * table])}},
    )
    engine, scorer = Engine(wide), Scorer(wide)
    written = engine.generate(["却说曹操", "dog"], 8, Sampling(temperature=0))
    pairs = [Pair(engine.encode(done.prompt), done.tokens) for done in written]
    others = [Pair(context, [*targets[:-1], (targets[-1] + 1) % len(table)]) for context, targets in pairs]
    results = scorer.likelihoods([*pairs, *others])
    assert [result.is_greedy for result in results] == [True, True, False, False]
    assert_equal(results, definition(wide, [*pairs, *others]))


def test_a_pair_is_cut_after_the_context_alone(run):
    """tests/interop compares it with the harness itself."""
    scorer, tokenizer = Scorer(run), run.tokenizer
    for context, continuation in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
        border = 1 + len(tokenizer.encode(context.rstrip()))
        assert scorer.pair(context, continuation) == Pair(ids[:border], ids[border:])
    assert scorer.pair("the quick brown ", "fox") == scorer.pair("the quick brown", " fox")
    assert scorer.pair(" \n", "fox").context == [tokenizer.bos_id]


def test_a_token_over_the_border_is_the_target(run):
    (token,) = run.tokenizer.encode("the")
    assert Scorer(run).pair("th", "e") == Pair([run.tokenizer.bos_id], [token])


def test_without_bos_a_text_follows_eos(run, monkeypatch):
    scorer, tokenizer = Scorer(run), run.tokenizer
    monkeypatch.setattr(tokenizer, "bos_id", None)
    assert scorer.pair("", "dog") == Pair([tokenizer.eos_id], tokenizer.encode("dog"))
    assert scorer.pair("the", " dog").context == tokenizer.encode("the")
    assert scorer.pair("th", "e").context == [tokenizer.eos_id]
    monkeypatch.setattr(tokenizer, "eos_id", None)
    with pytest.raises(UserError, match="neither bos nor eos"):
        scorer.rolling("dog")


@pytest.mark.parametrize("repeats", [0, 1, 6, 20])
def test_rolling_predicts_every_token_once(run, repeats):
    text = "曹操x玄德 the dog;" * repeats
    tokens = run.tokenizer.encode(text)
    pairs = Scorer(run).rolling(text)
    assert [token for pair in pairs for token in pair.targets] == tokens
    whole, done = [run.tokenizer.bos_id, *tokens], 1
    for context, targets in pairs:
        assert whole[done - len(context) : done] == context
        done += len(targets)
        assert len(context) + len(targets) - 1 == min(len(tokens), run.spec.config.max_length)
    if repeats == 20:
        assert len(pairs) > 2


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (("the", ""), "an empty continuation"),
        (("the", "x" * 70), "the continuation has 70 tokens, more than the model's context of 64"),
    ],
)
def test_what_has_no_likelihood(run, texts, says):
    with pytest.raises(UserError, match=says):
        Scorer(run).pair(*texts)


def test_a_model_that_sees_ahead_is_refused(run):
    spec = model_spec(dataclasses.replace(run.spec.config, causal=False))
    with pytest.raises(UserError, match=r"config\.model\.causal=False"):
        Scorer(run._replace(spec=spec))


def test_more_targets_than_the_context_are_refused(run):
    with pytest.raises(UserError, match="65 tokens to predict"):
        Scorer(run).likelihoods([Pair([1], [2] * 65)])


@pytest.mark.parametrize(("length", "columns"), [(1, 16), (17, 32), (1024, 1024), (1025, 2048), (2049, 3072)])
def test_buckets(length, columns):
    assert bucket(length, SHORTEST) == columns
