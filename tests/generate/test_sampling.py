"""Sampling against a float64 transcription of the definitions, token set for token set and probability for probability.

The reference follows transformers' documentation of its logits processors (repetition penalty, temperature, top-k,
top-p, min-p, in this order), written here row by row without sorting tricks.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.generate.sampling import Sampling, keep_probable, penalize_repetition, row_keys, sample, stack

VOCAB = 50
ROWS = 4
sample_jit = jax.jit(sample)


@jax.jit
def distribution(logits, seen, arrays):
    """The probabilities `sample` draws from, in the order of the vocabulary."""
    kept, order = keep_probable(penalize_repetition(logits, seen, arrays.repetition_penalty), arrays)
    return jnp.zeros_like(logits).at[jnp.arange(len(logits))[:, None], order].set(jax.nn.softmax(kept, axis=-1))


def reference(logits: np.ndarray, seen: np.ndarray, how: Sampling) -> np.ndarray:
    """Probabilities of one row, float64."""
    scores = logits.astype(np.float64)
    penalized = np.where(scores < 0, scores * how.repetition_penalty, scores / how.repetition_penalty)
    scores = np.where(seen, penalized, scores)
    if how.temperature == 0:
        return np.eye(len(scores))[np.argmax(scores)]
    scores = scores / how.temperature
    if how.top_k > 0:
        kth_best = np.sort(scores)[-min(how.top_k, len(scores))]
        scores[scores < kth_best] = -np.inf
    if how.top_p < 1:
        probabilities, nucleus = softmax(scores), []
        for token in np.argsort(-scores, kind="stable"):
            nucleus.append(token)
            if probabilities[nucleus].sum() >= how.top_p:
                break
        scores = np.where(np.isin(np.arange(len(scores)), nucleus), scores, -np.inf)
    if how.min_p > 0:
        probabilities = softmax(scores)
        scores = np.where(probabilities < how.min_p * probabilities.max(), -np.inf, scores)
    return softmax(scores)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def random_logits(seed: int, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=3, size=(rows, VOCAB)).astype(np.float32)
    return logits, generator.random((rows, VOCAB)) < 0.3


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.3),
    Sampling(temperature=2.5),
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=VOCAB + 10),
    Sampling(top_p=0.01),
    Sampling(top_p=0.5),
    Sampling(top_p=0.95, temperature=0.7),
    Sampling(min_p=0.05),
    Sampling(min_p=1.0),
    Sampling(repetition_penalty=1.3),
    Sampling(repetition_penalty=0.7),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
    Sampling(temperature=1.7, top_k=5, top_p=0.4, repetition_penalty=2.0),
    Sampling(temperature=1.2, top_k=30, min_p=0.2),
]


@pytest.mark.parametrize("seed", range(3))
def test_distribution_is_that_of_the_definitions(seed):
    """All settings are rows of one batch: one compiled function, and no row minds its neighbours."""
    logits, seen = random_logits(seed, len(SETTINGS))
    got = np.asarray(distribution(logits, seen, stack(SETTINGS)))
    for row, how in enumerate(SETTINGS):
        expected = reference(logits[row], seen[row], how)
        assert np.array_equal(got[row] > 0, expected > 0), how
        np.testing.assert_allclose(got[row], expected, atol=1e-6, err_msg=str(how))


def test_tokens_that_tie_with_the_kth_stay():
    logits = np.array([[2.0, 1.0, 3.0, 1.0, 0.0]], np.float32)
    got = np.asarray(distribution(logits, np.zeros_like(logits, bool), stack([Sampling(top_k=3)])))
    assert (got[0] > 0).tolist() == [True, True, True, True, False]


def test_temperature_0_is_the_most_probable_token_after_the_penalty():
    logits, seen = random_logits(5)
    rows = [Sampling(0), Sampling(0, repetition_penalty=5.0), Sampling(0, top_k=3), Sampling(0)]
    expected = [int(np.argmax(reference(logits[i], seen[i], how))) for i, how in enumerate(rows)]
    assert sample_jit(logits, seen, stack(rows), row_keys(0, ROWS)).tolist() == expected
    mixed = [*rows[:3], Sampling(3.0)]  # a greedy row beside a drawn one
    assert sample_jit(logits, seen, stack(mixed), row_keys(0, ROWS)).tolist()[:3] == expected[:3]


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.8, top_k=10, top_p=0.9), Sampling(1.5, min_p=0.1)])
def test_draws_follow_the_distribution(how):
    draws = 8192
    logits, seen = random_logits(7, 1)
    tokens = sample_jit(
        np.repeat(logits, draws, 0), np.repeat(seen, draws, 0), stack([how] * draws), row_keys(3, draws)
    )
    expected = reference(logits[0], seen[0], how)
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert np.all(np.abs(counts - draws * expected) <= 5 * deviation + 1e-9)


def test_a_row_does_not_depend_on_its_neighbours():
    logits, seen = random_logits(11)
    how = [Sampling(1.0), Sampling(2.0, top_p=0.8), Sampling(0), Sampling(0.5, top_k=9)]
    together = sample_jit(logits, seen, stack(how), row_keys(2, ROWS)).tolist()
    other = np.roll(logits, 1, axis=1)
    for row in range(ROWS):
        neighbours = other.copy()
        neighbours[row] = logits[row]
        changed = [Sampling(3.0)] * ROWS
        changed[row] = how[row]
        assert sample_jit(neighbours, seen, stack(changed), row_keys(2, ROWS)).tolist()[row] == together[row]
    fewer = sample_jit(logits[:2], seen[:2], stack(how[:2]), row_keys(2, 2)).tolist()
    assert fewer == together[:2]


def test_rows_of_one_prompt_differ_and_seeds_differ():
    logits = np.zeros((ROWS, VOCAB), np.float32)
    args = (logits, np.zeros_like(logits, bool), stack([Sampling()] * ROWS))
    first = sample_jit(*args, row_keys(0, ROWS)).tolist()
    assert len(set(first)) > 1
    assert first != sample_jit(*args, row_keys(1, ROWS)).tolist()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"top_k": -3},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"temperature": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    (name,) = bad
    with pytest.raises(UserError, match=rf"^{name}=.* must be "):
        Sampling(**bad)
