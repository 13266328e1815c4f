"""Losses of pairs against TRL's own functions, values and gradients; and against the papers' formulas in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.steps.alignment_config import DPOConfig, RewardConfig
from jaxllm.steps.check_alignment import check_options
from jaxllm.steps.preference_losses import bradley_terry, preference_loss

PAIRS, LENGTH = 6, 9
RANDOM = np.random.default_rng(0)
COUNTS = RANDOM.integers(1, LENGTH + 1, (2 * PAIRS, 1))
MASK = np.arange(LENGTH) < COUNTS
TOKEN_LOG_PROBS = np.where(MASK, -RANDOM.exponential(1.0, MASK.shape), 0).astype(np.float32)
REFERENCE = (TOKEN_LOG_PROBS.sum(1) + RANDOM.normal(size=2 * PAIRS)).astype(np.float32)


def ours(token_log_probs: np.ndarray, options: DPOConfig):
    """The mean loss of pairs, rows with the chosen first, as a function of token log-probabilities."""
    totals, counts = token_log_probs.sum(1), COUNTS[:, 0].astype(np.float32)
    of = lambda x: (x[None, :PAIRS], x[None, PAIRS:])  # noqa: E731
    references = (None, None) if options.loss in ("orpo", "simpo") else of(REFERENCE)
    loss = preference_loss(*of(totals), *references, *of(counts), jnp.ones((1, PAIRS), bool), options)
    return loss.total / loss.weight, loss.metrics


@pytest.mark.parametrize("loss, theirs, smoothing", [
    ("sigmoid", "sigmoid", 0.0),
    ("hinge", "hinge", 0.0),
    ("ipo_mean", "ipo", 0.0),
    ("robust", "robust", 0.2),
])  # fmt: skip
def test_losses_against_a_reference_as_trl(loss, theirs, smoothing):
    from tests.steps import trl

    options = DPOConfig(loss=loss, beta=0.3, label_smoothing=smoothing)
    value, (gradient,) = trl.dpo(
        theirs, TOKEN_LOG_PROBS, MASK, REFERENCE[:PAIRS], REFERENCE[PAIRS:], beta=0.3, smoothing=smoothing
    )
    found, slopes = jax.value_and_grad(lambda x: ours(x, options)[0])(TOKEN_LOG_PROBS)
    assert found == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(np.where(MASK, slopes, 0), np.where(MASK, gradient, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss, theirs, smoothing", [("conservative", "sigmoid", 0.2), ("ipo_sum", "ipo", 0.0)])
def test_losses_of_gains_as_trl(loss, theirs, smoothing):
    """What its DPO trainer does not have: its CPO trainer's function of two numbers, given gains on the reference."""
    from tests.steps import trl

    options = DPOConfig(loss=loss, beta=0.3, label_smoothing=smoothing)
    gains = TOKEN_LOG_PROBS.sum(1) - REFERENCE
    value, gradients = trl.cpo(theirs, gains[:PAIRS], gains[PAIRS:], beta=0.3, smoothing=smoothing)
    found, slopes = jax.value_and_grad(lambda x: ours(x, options)[0])(TOKEN_LOG_PROBS)
    assert found == pytest.approx(value, rel=1e-5)
    expected = np.where(MASK, np.concatenate(gradients)[:, None], 0)
    np.testing.assert_allclose(np.where(MASK, slopes, 0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_reference_free_losses_as_trl(loss):
    from tests.steps import trl

    options = DPOConfig(loss=loss, beta=2.0, margin=0.7, odds_weight=0.25)
    means = (TOKEN_LOG_PROBS.sum(1) / COUNTS[:, 0]).astype(np.float32)
    both = means[:PAIRS], means[PAIRS:]
    theirs = trl.orpo(*both, weight=0.25) if loss == "orpo" else trl.cpo("simpo", *both, beta=2.0, margin=0.7)
    value, gradients = theirs
    found, slopes = jax.value_and_grad(lambda x: ours(x, options)[0])(TOKEN_LOG_PROBS)
    assert found == pytest.approx(value, rel=1e-5)
    expected = np.where(MASK, np.concatenate(gradients)[:, None] / COUNTS, 0)
    np.testing.assert_allclose(np.where(MASK, slopes, 0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("centring", [0.0, 0.05])
def test_bradley_terry_as_trl(centring):
    from tests.steps import trl

    scores, margins = RANDOM.normal(size=(2, PAIRS)).astype(np.float32), np.linspace(0, 1, PAIRS, dtype=np.float32)
    value, gradients = trl.reward(*scores, margins, centring=centring)

    def mean(scores):
        shown = (x[None] for x in (*scores, margins))
        loss = bradley_terry(*shown, jnp.ones((1, PAIRS), bool), RewardConfig(centring=centring))
        return loss.total / loss.weight

    found, slopes = jax.value_and_grad(mean)(scores)
    assert found == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(slopes, np.stack(gradients), rtol=1e-5, atol=1e-6)


def test_losses_by_the_formula():
    """In float64: cDPO (Mitchell 2023, equation 3), IPO of sums (Azar et al. 2023, equation 17), the chosen's NLL."""
    totals, counts = np.float64(TOKEN_LOG_PROBS).sum(1), np.float64(COUNTS[:, 0])
    h = (totals - REFERENCE)[:PAIRS] - (totals - REFERENCE)[PAIRS:]
    log_sigmoid = lambda x: -np.logaddexp(0, -x)  # noqa: E731
    expected = {
        DPOConfig(loss="conservative", beta=0.3, label_smoothing=0.1): (
            -0.9 * log_sigmoid(0.3 * h) - 0.1 * log_sigmoid(-0.3 * h)
        ),
        DPOConfig(loss="ipo_sum", beta=0.3): (h - 1 / 0.6) ** 2,
        DPOConfig(beta=0.3, nll_weight=0.2): -log_sigmoid(0.3 * h) - 0.2 * (totals / counts)[:PAIRS],
    }
    for options, losses in expected.items():
        assert ours(TOKEN_LOG_PROBS, options)[0] == pytest.approx(losses.mean(), rel=1e-5), options


def test_the_variants_differ():
    """Averages are not sums, smoothing that is conservative is not robust."""
    names = ("sigmoid", "conservative", "robust", "hinge", "ipo_mean", "ipo_sum", "orpo", "simpo")
    smoothed = {name: 0.1 for name in ("conservative", "robust")}
    found = [float(ours(TOKEN_LOG_PROBS, DPOConfig(name, label_smoothing=smoothed.get(name, 0)))[0]) for name in names]
    assert len({round(value, 4) for value in found}) == len(names)


def test_the_first_loss_is_ln_2():
    totals = np.float32([[-3.0, -700.0]])
    ones, both = np.ones((1, 2), np.float32), np.ones((1, 2), bool)
    loss = preference_loss(totals, totals - 5, totals, totals - 5, ones, ones, both, DPOConfig())
    assert loss.total / loss.weight == pytest.approx(math.log(2))
    assert loss.metrics["reward_accuracy"].total == 0


@pytest.mark.parametrize("name", ["sigmoid", "ipo_mean", "orpo", "simpo"])
def test_places_without_a_pair_add_nothing(name):
    """Neither to the sum nor to gradients, whatever stands there; and parts of a batch add up to the whole."""
    is_pair = np.array([[True, True, False], [True, False, False]])
    random = np.random.default_rng(1)
    said = [-random.exponential(3.0, (2, 3)).astype(np.float32) for _ in range(4)]
    counts = [random.integers(1, 9, (2, 3)).astype(np.float32) for _ in range(2)]
    options = DPOConfig(loss=name, nll_weight=0.0 if name == "orpo" else 0.1)

    def total(said, rows=slice(None)):
        arrays = [x[rows] for x in (*said, *counts)]
        return preference_loss(*arrays, is_pair[rows], options)

    poisoned = [np.where(is_pair, x, [[np.nan], [np.inf]]).astype(np.float32) for x in said]
    whole, parts = total(said), [total(said, slice(row, row + 1)) for row in range(2)]
    assert total(poisoned).total == whole.total and whole.weight == 3
    gradients = jax.grad(lambda x: total([*x, *poisoned[2:]]).total)(poisoned[:2])
    assert all(np.isfinite(g).all() and not np.asarray(g)[~is_pair].any() for g in gradients)
    summed = jax.tree.map(lambda *x: sum(x), *parts)
    for one, other in zip(jax.tree.leaves(summed), jax.tree.leaves(whole), strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-6)


def test_of_pairs_that_are_told_apart_without_doubt():
    """No overflow, and a slope that has gone."""
    far = np.float32([[1e4]])
    one, true = np.ones((1, 1), np.float32), np.ones((1, 1), bool)
    for name in ("sigmoid", "hinge"):
        loss = preference_loss(far - 2e4, -far - 2e4, far * 0, far * 0, one, one, true, DPOConfig(loss=name))
        assert loss.total == 0
    grad = jax.grad(lambda x: preference_loss(x, x - 1, None, None, one, one, true, DPOConfig(loss="orpo")).total)
    assert np.isfinite(grad(np.float32([[-1e-9]]))).all()


@pytest.mark.parametrize("changes, says", [
    ({"loss": "simgoid"}, "Did you mean 'sigmoid'"),
    ({"label_smoothing": 0.1}, "loss=sigmoid has none. Use --config.dpo.loss=conservative"),
    ({"loss": "robust", "label_smoothing": 0.5}, "from 0 to below 0.5"),
    ({"beta": 0.0}, "config.dpo.beta=0.0 must be above 0"),
    ({"loss": "orpo", "nll_weight": 1.0}, "weight of 1 already"),
    ({"loss": "simpo", "reference": "precomputed"}, "has no reference"),
    ({"margin": 1.0}, "config.dpo.margin=1 is of loss=simpo alone; loss=sigmoid has none"),
    ({"loss": "orpo", "beta": 0.2}, "Its lambda, which some call beta, is config.dpo.odds_weight"),
])  # fmt: skip
def test_what_does_not_go_together(changes, says):
    with pytest.raises(UserError, match=says):
        check_options("dpo", dataclasses.replace(DPOConfig(), **changes))
