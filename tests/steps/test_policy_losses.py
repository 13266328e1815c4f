"""Losses of policies and critics, and advantages, against TRL's functions; where it has none, formulas in float64."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.steps.advantages import gae, group_advantages, kl_estimate, next_kl_weight, token_rewards, whiten
from jaxllm.steps.alignment_config import GRPOConfig, PPOConfig
from jaxllm.steps.check_alignment import check_options
from jaxllm.steps.policy_losses import explained_variance, grpo_loss, policy_loss, value_loss
from tests.steps.trl_source import Source

ROWS, LENGTH = 6, 10
RANDOM = np.random.default_rng(0)
STARTS, ENDS = RANDOM.integers(0, 4, (ROWS, 1)), RANDOM.integers(5, LENGTH + 1, (ROWS, 1))
MASK = (np.arange(LENGTH) >= STARTS) & (np.arange(LENGTH) < ENDS)
OLD, NEW, REFERENCE = (np.where(MASK, -RANDOM.exponential(1.0, MASK.shape), 0).astype(np.float32) for _ in range(3))
ADVANTAGES, VALUES, OLD_VALUES, RETURNS = RANDOM.normal(size=(4, ROWS, LENGTH)).astype(np.float32)
NO_ENTROPY = np.zeros((ROWS, LENGTH), np.float32)
GAPS = MASK & (RANDOM.random(MASK.shape) < 0.7)  # answers with tokens within that are not the model's


@pytest.fixture(scope="session")
def trl_ppo(tmp_path_factory):
    """TRL's PPO, which later versions do not have: its module from the wheel of 1.12.0, without what it depends on."""
    pytest.importorskip("trl", reason="parity with TRL needs the extra hf")
    folder = tmp_path_factory.mktemp("trl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "trl==1.12.0"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"trl 1.12.0 cannot be installed: {done.stderr.strip()[-200:]}")
    source = Source(folder / "trl" / "experimental" / "ppo" / "ppo_trainer.py", torch=pytest.importorskip("torch"))
    source.define("masked_mean", "masked_var", "masked_whiten")
    return source


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_as_trl(trl_ppo, shift_mean):
    torch = trl_ppo.torch
    expected = trl_ppo.masked_whiten(torch.tensor(ADVANTAGES), torch.tensor(MASK), shift_mean).numpy()
    found = whiten(ADVANTAGES, MASK, shift_mean)
    np.testing.assert_allclose(np.where(MASK, found, 0), np.where(MASK, expected, 0), atol=1e-5)


def test_policy_and_value_loss_as_trl(trl_ppo):
    """Its training loop's own statements: values and gradients."""
    tensor, padding = trl_ppo.torch.tensor, trl_ppo.torch.tensor(~MASK)
    new, values = (tensor(x, requires_grad=True) for x in (NEW, VALUES))
    theirs = trl_ppo.run(
        "vpredclipped",
        "loss",
        vpred=values,
        mb_values=tensor(OLD_VALUES),
        mb_return=tensor(RETURNS),
        new_logprobs=new,
        mb_logprobs=tensor(OLD),
        mb_advantage=tensor(ADVANTAGES),
        padding_mask=padding,
        padding_mask_p1=padding,
        micro_batch_inds=slice(None),
        args=SimpleNamespace(cliprange=0.2, cliprange_value=0.3, vf_coef=0.1),
    )
    theirs["loss"].backward()
    options = PPOConfig(clip=0.2, value_clip=0.3)

    def means(new, values):
        policy = policy_loss(new, OLD, ADVANTAGES, MASK, NO_ENTROPY, options)
        critic = value_loss(values, OLD_VALUES, RETURNS, MASK, options)
        return policy.total / policy.weight, critic.total / critic.weight

    policy, critic = means(NEW, VALUES)
    assert policy == pytest.approx(theirs["pg_loss"].item(), rel=1e-5)
    assert critic == pytest.approx(theirs["vf_loss"].item(), rel=1e-5)
    slopes = jax.grad(lambda *x: means(*x)[0] + 0.1 * means(*x)[1], argnums=(0, 1))(NEW, VALUES)
    for found, variable in zip(slopes, (new, values), strict=True):
        np.testing.assert_allclose(found, variable.grad.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator, whitened", [("k1", False), ("k3", True)])
def test_rewards_and_advantages_as_trl(trl_ppo, estimator, whitened):
    """Scores less the divergence, and estimates of them. TRL's arrays are 0 after an answer, not masked."""
    tensor, scores = trl_ppo.torch.tensor, RANDOM.normal(size=ROWS).astype(np.float32)
    ends = tensor(ENDS[:, 0] - 1)
    theirs = trl_ppo.run(
        "logr",
        "rewards",
        ref_logprobs=tensor(REFERENCE),
        logprobs=tensor(NEW),
        scores=tensor(scores),
        sequence_lengths=ends,
        sequence_lengths_p1=ends,
        padding_mask_p1=tensor(~MASK),
        args=SimpleNamespace(kl_estimator=estimator, kl_coef=0.3, whiten_rewards=whitened),
    )
    rewards = token_rewards(scores, NEW, REFERENCE, MASK, 0.3, estimator)
    rewards = whiten(rewards, MASK, shift_mean=False) if whitened else rewards
    np.testing.assert_allclose(rewards, theirs["rewards"].numpy(), rtol=1e-5, atol=1e-6)
    theirs = trl_ppo.run(
        "lastgaelam",
        "returns",
        rewards=theirs["rewards"],
        values=tensor(np.where(MASK, VALUES, 0)),
        responses=tensor(MASK),
        args=SimpleNamespace(gamma=0.9, lam=0.8),
    )
    found = gae(rewards, VALUES, MASK, 0.9, 0.8)
    for ours, name in zip(found, ("advantages", "returns"), strict=True):
        np.testing.assert_allclose(np.asarray(ours)[MASK], theirs[name].numpy()[MASK], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("discount, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_advantages_by_the_formula(discount, gae_lambda):
    """Schulman et al. 2016, equation 16, as a sum over what follows, in float64; gaps are passed over."""
    rewards = RANDOM.normal(size=MASK.shape).astype(np.float32)
    advantages, returns = gae(rewards, VALUES, GAPS, discount, gae_lambda)
    for row in range(ROWS):
        r, v = np.float64(rewards[row][GAPS[row]]), np.append(np.float64(VALUES[row][GAPS[row]]), 0)
        deltas = r + discount * v[1:] - v[:-1]
        powers = (discount * gae_lambda) ** np.arange(len(r))
        expected = [(powers[: len(r) - t] * deltas[t:]).sum() for t in range(len(r))]
        np.testing.assert_allclose(np.asarray(advantages)[row][GAPS[row]], expected, atol=1e-5)
        np.testing.assert_allclose(np.asarray(returns)[row][GAPS[row]], expected + v[:-1], atol=1e-5)


def test_what_stands_outside_the_mask_changes_nothing():
    """Neither advantages, nor rewards, nor losses, nor gradients."""
    poisoned = lambda x: np.where(GAPS, x, np.nan).astype(np.float32)  # noqa: E731
    scores = np.arange(ROWS, dtype=np.float32)

    def everything(of):
        rewards = token_rewards(scores, of(NEW), of(REFERENCE), GAPS, 0.1, "k3")
        advantages, returns = gae(of(np.asarray(rewards)), of(VALUES), GAPS, 0.9, 0.8)
        policy = lambda x: policy_loss(x, of(OLD), whiten(advantages, GAPS), GAPS, of(NO_ENTROPY), PPOConfig()).total  # noqa: E731
        critic = lambda x: value_loss(x, of(OLD_VALUES), returns, GAPS, PPOConfig()).total  # noqa: E731
        grpo = GRPOConfig(kl_weight=0.1)
        group = lambda x: grpo_loss(x, of(OLD), of(REFERENCE), of(ADVANTAGES), GAPS, of(NO_ENTROPY), 9, grpo).total  # noqa: E731
        found = [f(of(x)) for f, x in ((policy, NEW), (critic, VALUES), (group, NEW))]
        found += [jax.grad(f)(of(x)) for f, x in ((policy, NEW), (critic, VALUES), (group, NEW))]
        return [rewards, advantages, returns, *found]

    for one, other in zip(everything(poisoned), everything(lambda x: x), strict=True):
        np.testing.assert_array_equal(np.nan_to_num(one, nan=1e9), other)


def test_a_score_is_given_once():
    """On the last token of an answer, gaps or none; an answer without a token gets nothing."""
    mask = np.vstack([GAPS[:-1], np.zeros((1, LENGTH), bool)])
    rewards = token_rewards(np.full(ROWS, 2.0, np.float32), NEW, REFERENCE, mask, 0.5, "k1")
    expected = np.where(mask, -0.5 * (NEW - REFERENCE), 0)
    for row in range(ROWS - 1):
        expected[row, np.flatnonzero(mask[row])[-1]] += 2
    np.testing.assert_allclose(rewards, expected, atol=1e-6)


def test_whitening_one_token_is_finite():
    alone = np.zeros((2, 3), bool)
    alone[0, 1] = True
    assert np.isfinite(whiten(np.ones((2, 3), np.float32), alone)).all()


@pytest.mark.parametrize("theirs, aggregation", [
    ("grpo", "sequence_mean"), ("bnpo", "token_mean"), ("dapo", "token_mean"), ("dr_grpo", "max_length"),
])  # fmt: skip
def test_grpo_as_trl(theirs, aggregation):
    from tests.steps import trl

    options = GRPOConfig(aggregation=aggregation, kl_weight=0.04, dual_clip=3.0)
    per_answer = ADVANTAGES[:, 0]
    value, (gradient,) = trl.grpo(theirs, NEW, OLD, REFERENCE, per_answer, MASK, max_length=12, options=options)

    def mean(x):
        loss = grpo_loss(x, OLD, REFERENCE, per_answer, MASK, NO_ENTROPY, 12, options)
        return loss.total / loss.weight

    found, slopes = jax.value_and_grad(mean)(NEW)
    assert found == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(slopes, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_as_trl(scale):
    """The statements of its trainer that make them of rewards."""
    from tests.steps import trl

    rewards = RANDOM.normal(size=(4, 5)).astype(np.float32)
    theirs = trl.grpo_source().run(
        "mean_grouped_rewards",
        "advantages",
        rewards=trl.tensor(rewards).flatten(),
        num_generations=5,
        self=SimpleNamespace(scale_rewards=scale),
    )
    np.testing.assert_allclose(group_advantages(rewards, scale).flatten(), theirs["advantages"].numpy(), atol=1e-6)


def test_group_advantages_by_the_formula():
    """Shao et al. 2024, section 4.1.2, with TRL's unbiased deviation and 1e-4; equal rewards are worth nothing."""
    rewards = np.concatenate([RANDOM.normal(size=(4, 5)), np.ones((1, 5))]).astype(np.float32)
    exact = np.float64(rewards)
    centred = exact - exact.mean(1, keepdims=True)
    expected = {
        "group": centred / (exact.std(1, ddof=1, keepdims=True) + 1e-4),
        "batch": centred / (exact.std(ddof=1) + 1e-4),
        "none": centred,
    }
    for scale, values in expected.items():
        np.testing.assert_allclose(group_advantages(rewards, scale), values, atol=1e-5)
        assert not np.asarray(group_advantages(rewards, scale))[-1].any()


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "max_length"])
def test_parts_add_up_to_the_whole(aggregation):
    """Sums, denominators and metrics of any split, unequal lengths and all: divided once."""
    options = GRPOConfig(aggregation=aggregation, kl_weight=0.1, entropy_weight=0.01)
    entropy = np.abs(VALUES)
    of = lambda rows: grpo_loss(*(x[rows] for x in (NEW, OLD, REFERENCE, ADVANTAGES, MASK, entropy)), 9, options)  # noqa: E731
    parts = [of(slice(0, 1)), of(slice(1, 4)), of(slice(4, 6))]
    summed = jax.tree.map(lambda *x: sum(x), *parts)
    for one, other in zip(jax.tree.leaves(summed), jax.tree.leaves(of(slice(None))), strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-5)


def test_estimates_of_the_divergence():
    """Of two distributions the means of k1 and k3 are KL(p, q), exactly; k3 is never negative. In a loss the gradient
    of k1 does not know the reference, which is why none takes it."""
    logits = RANDOM.normal(size=(2, 7))
    p, q = (np.exp(x) / np.exp(x).sum() for x in logits)
    exact = (p * np.log(p / q)).sum()
    for estimator in ("k1", "k3"):
        each = np.asarray(kl_estimate(np.log(p), np.log(q), estimator))
        assert (p * each).sum() == pytest.approx(exact, rel=1e-5)
    assert np.asarray(kl_estimate(np.log(p), np.log(q), "k3")).min() >= 0
    slope = lambda reference, name: jax.grad(lambda x: kl_estimate(x, reference, name))(-1.0)  # noqa: E731
    assert slope(-1.5, "k1") == slope(-0.5, "k1")
    assert slope(-1.5, "k3") != slope(-0.5, "k3")
    with pytest.raises(UserError, match="kl_estimator"):
        check_options("ppo", PPOConfig(kl_estimator="k4"))


def test_metrics_and_the_entropy_by_the_formula():
    """In float64; more entropy is less loss."""
    entropy, ratio = np.abs(VALUES), np.exp(np.float64(NEW) - OLD)
    count = MASK.sum()
    mean = lambda x: x[MASK].sum() / count  # noqa: E731
    low, high = (ratio < 0.8) & (ADVANTAGES < 0), (ratio > 1.28) & (ADVANTAGES > 0)
    expected = {
        "ratio": mean(ratio),
        "policy_kl": mean(ratio - 1 - np.log(ratio)),
        "entropy": mean(entropy),
        "clip_low_fraction": mean(low),
        "clip_high_fraction": mean(high),
        "clip_fraction": mean(low | high),
    }
    group = lambda **how: grpo_loss(NEW, OLD, None, ADVANTAGES, MASK, entropy, 9, GRPOConfig(**how))  # noqa: E731
    actor = lambda **how: policy_loss(NEW, OLD, ADVANTAGES, MASK, entropy, PPOConfig(**how))  # noqa: E731
    for name, value in expected.items():
        metric = group().metrics[name]
        assert float(metric.total / metric.count) == pytest.approx(value, rel=1e-5), name
    for loss in (group, actor):
        gained = float((loss().total - loss(entropy_weight=0.5).total) / count)
        assert gained == pytest.approx(0.5 * mean(entropy), rel=1e-4)


def test_explained_variance():
    metrics = value_loss(VALUES, OLD_VALUES, RETURNS, MASK, PPOConfig()).metrics
    told = explained_variance({name: mean.total / mean.count for name, mean in metrics.items()})
    errors, returns = np.float64(VALUES - RETURNS)[MASK], np.float64(RETURNS)[MASK]
    assert float(told["explained_variance"]) == pytest.approx(1 - errors.var() / returns.var(), rel=1e-4)
    assert "error_squared" not in told


@pytest.mark.parametrize("constant", [0.0, 0.7, 10.0])
def test_of_returns_that_are_all_the_same_nothing_is_explained(constant):
    """Not what rounding leaves of their variance."""
    metrics = value_loss(VALUES, OLD_VALUES, np.full_like(VALUES, constant), MASK, PPOConfig()).metrics
    told = explained_variance({name: mean.total / mean.count for name, mean in metrics.items()})
    assert told["explained_variance"] == 0


def test_the_ratio_is_1_before_the_first_update():
    loss = policy_loss(NEW, NEW, ADVANTAGES, MASK, NO_ENTROPY, PPOConfig())
    assert loss.metrics["ratio"].total == loss.metrics["ratio"].count == MASK.sum()
    assert loss.metrics["clip_fraction"].total == loss.metrics["policy_kl"].total == 0


def test_an_adaptive_weight_goes_where_the_divergence_is_wanted():
    """Ziegler et al. 2019, section 2.2: by at most a fifth of the answers' share of the horizon."""
    assert next_kl_weight(0.1, 12.0, 6.0, 100.0, 10) == pytest.approx(0.1 * 1.02)
    assert next_kl_weight(0.1, 0.0, 6.0, 100.0, 10) == pytest.approx(0.1 * 0.98)
    assert next_kl_weight(0.1, 6.6, 6.0, 100.0, 10) == pytest.approx(0.1 * 1.01)


@pytest.mark.parametrize("changes, says", [
    ({"aggregation": "mean"}, "config.grpo.aggregation='mean' is unknown"),
    ({"dual_clip": 1.1}, "must be above 1 \\+ clip_high"),
    ({"clip_low": 1.0}, "must be below 1"),
    ({"epochs": 0}, "1 or more"),
])  # fmt: skip
def test_what_does_not_go_together(changes, says):
    with pytest.raises(UserError, match=says):
        check_options("grpo", dataclasses.replace(GRPOConfig(), **changes))


def test_huge_ratios_do_not_overflow():
    """Neither losses, gradients nor metrics; nor rewards that no divergence is taken from."""
    far = NEW + np.where(MASK, 500.0, 0.0).astype(np.float32)
    group = GRPOConfig(kl_weight=0.1)
    losses = [
        (lambda x: policy_loss(x, NEW, -np.abs(ADVANTAGES), MASK, NO_ENTROPY, PPOConfig()), far),
        (lambda x: grpo_loss(x, NEW, far, -np.abs(ADVANTAGES), MASK, NO_ENTROPY, 9, group), NEW),
    ]
    for loss, at in losses:
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(loss(at)))
        assert np.isfinite(jax.grad(lambda x, loss=loss: loss(x).total)(at)).all()
    assert np.isfinite(token_rewards(np.ones(ROWS, np.float32), NEW, far, MASK, 0.0, "k3")).all()
