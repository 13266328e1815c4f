"""Losses of policies and critics, and advantages, against TRL's functions; where it has none, formulas in float64."""

import dataclasses
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.steps.advantages import gae, group_advantages, kl_estimate, next_kl_weight, token_rewards, whiten
from jaxllm.steps.alignment_config import GRPOConfig, PPOConfig
from jaxllm.steps.check_alignment import check_options
from jaxllm.steps.policy_losses import explained_variance, grpo_loss, policy_loss, value_loss

ROWS, LENGTH = 6, 10
RANDOM = np.random.default_rng(0)
STARTS, ENDS = RANDOM.integers(0, 4, (ROWS, 1)), RANDOM.integers(5, LENGTH + 1, (ROWS, 1))
MASK = (np.arange(LENGTH) >= STARTS) & (np.arange(LENGTH) < ENDS)
OLD, NEW, REFERENCE = (np.where(MASK, -RANDOM.exponential(1.0, MASK.shape), 0).astype(np.float32) for _ in range(3))
ADVANTAGES, VALUES, OLD_VALUES, RETURNS = RANDOM.normal(size=(4, ROWS, LENGTH)).astype(np.float32)
NO_ENTROPY = np.zeros((ROWS, LENGTH), np.float32)


@pytest.fixture(scope="session")
def trl_ppo(tmp_path_factory):
    """TRL's PPO, which later versions do not have: its module from the wheel of 1.12.0, without what it depends on."""
    pytest.importorskip("trl", reason="parity with TRL needs the extra hf")
    folder = tmp_path_factory.mktemp("trl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "trl==1.12.0"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"trl 1.12.0 cannot be installed: {done.stderr.strip()[-200:]}")
    path = folder / "trl" / "experimental" / "ppo" / "ppo_trainer.py"
    functions = path.read_text(encoding="utf-8")
    # Its functions alone: the module as a whole imports what is no longer there.
    start, end = functions.index("def masked_mean("), functions.index("class PolicyAndValueWrapper")
    spec = importlib.util.spec_from_loader("trl_ppo_functions", loader=None)
    module = importlib.util.module_from_spec(spec)
    module.torch = pytest.importorskip("torch")
    exec(compile(functions[start:end], str(path), "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_as_trl(trl_ppo, shift_mean):
    torch = trl_ppo.torch
    expected = trl_ppo.masked_whiten(torch.tensor(ADVANTAGES), torch.tensor(MASK), shift_mean).numpy()
    found = whiten(ADVANTAGES, MASK, shift_mean)
    np.testing.assert_allclose(np.where(MASK, found, 0), np.where(MASK, expected, 0), atol=1e-5)


def test_policy_and_value_loss_as_trl(trl_ppo):
    """The formulas of its training loop, with its masked mean: values and gradients."""
    torch, mask = trl_ppo.torch, trl_ppo.torch.tensor(MASK)
    new, values = (torch.tensor(x, requires_grad=True) for x in (NEW, VALUES))
    ratio, advantages = torch.exp(new - torch.tensor(OLD)), torch.tensor(ADVANTAGES)
    policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    trl_ppo.masked_mean(policy, mask).backward()
    near = torch.clamp(values, torch.tensor(OLD_VALUES) - 0.3, torch.tensor(OLD_VALUES) + 0.3)
    squares = [torch.square(v - torch.tensor(RETURNS)) for v in (values, near)]
    (0.5 * trl_ppo.masked_mean(torch.max(*squares), mask)).backward()
    options = PPOConfig(clip=0.2, value_clip=0.3)

    def mean(loss):
        return loss.total / loss.weight

    found = jax.grad(lambda x: mean(policy_loss(x, OLD, ADVANTAGES, MASK, NO_ENTROPY, options)))(NEW)
    np.testing.assert_allclose(found, new.grad.numpy(), atol=1e-6)
    found = jax.grad(lambda x: mean(value_loss(x, OLD_VALUES, RETURNS, MASK, options)))(VALUES)
    np.testing.assert_allclose(found, values.grad.numpy(), atol=1e-6)
    total = float(mean(policy_loss(NEW, OLD, ADVANTAGES, MASK, NO_ENTROPY, options)))
    assert total == pytest.approx(float(trl_ppo.masked_mean(policy, mask)), rel=1e-5)


@pytest.mark.parametrize("discount, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_advantages_by_the_formula(discount, gae_lambda):
    """Schulman et al. 2016, equation 16, as a sum over what follows, in float64."""
    rewards = RANDOM.normal(size=MASK.shape).astype(np.float32)
    advantages, returns = gae(rewards, VALUES, MASK, discount, gae_lambda)
    for row in range(ROWS):
        r, v = np.float64(rewards[row][MASK[row]]), np.append(np.float64(VALUES[row][MASK[row]]), 0)
        deltas = r + discount * v[1:] - v[:-1]
        powers = (discount * gae_lambda) ** np.arange(len(r))
        expected = [(powers[: len(r) - t] * deltas[t:]).sum() for t in range(len(r))]
        np.testing.assert_allclose(np.asarray(advantages)[row][MASK[row]], expected, atol=1e-5)
        np.testing.assert_allclose(np.asarray(returns)[row][MASK[row]], expected + v[:-1], atol=1e-5)


def test_what_stands_outside_the_mask_changes_nothing():
    """Neither advantages, nor rewards, nor losses, nor gradients."""
    poisoned = lambda x: np.where(MASK, x, np.nan).astype(np.float32)  # noqa: E731
    scores = np.arange(ROWS, dtype=np.float32)

    def everything(of):
        rewards = token_rewards(scores, of(NEW), of(REFERENCE), MASK, 0.1, "k3")
        advantages, returns = gae(of(np.asarray(rewards)), of(VALUES), MASK, 0.9, 0.8)
        policy = lambda x: policy_loss(x, of(OLD), whiten(advantages, MASK), MASK, of(NO_ENTROPY), PPOConfig()).total  # noqa: E731
        critic = lambda x: value_loss(x, of(OLD_VALUES), returns, MASK, PPOConfig()).total  # noqa: E731
        grpo = GRPOConfig(kl_weight=0.1)
        group = lambda x: grpo_loss(x, of(OLD), of(REFERENCE), of(ADVANTAGES), MASK, of(NO_ENTROPY), 9, grpo).total  # noqa: E731
        found = [f(of(x)) for f, x in ((policy, NEW), (critic, VALUES), (group, NEW))]
        found += [jax.grad(f)(of(x)) for f, x in ((policy, NEW), (critic, VALUES), (group, NEW))]
        return [rewards, advantages, returns, *found]

    for one, other in zip(everything(poisoned), everything(lambda x: x), strict=True):
        np.testing.assert_array_equal(np.nan_to_num(one, nan=1e9), other)


def test_rewards_of_tokens():
    rewards = token_rewards(np.full(ROWS, 2.0, np.float32), NEW, REFERENCE, MASK, 0.5, "k1")
    expected = np.where(MASK, -0.5 * (NEW - REFERENCE), 0)
    expected[np.arange(ROWS), ENDS[:, 0] - 1] += 2
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
        loss = grpo_loss(x, OLD, REFERENCE, per_answer[:, None], MASK, NO_ENTROPY, 12, options)
        return loss.total / loss.weight

    found, slopes = jax.value_and_grad(mean)(NEW)
    assert found == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(slopes, gradient, rtol=1e-5, atol=1e-7)


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


def test_explained_variance():
    metrics = value_loss(VALUES, OLD_VALUES, RETURNS, MASK, PPOConfig()).metrics
    told = explained_variance({name: mean.total / mean.count for name, mean in metrics.items()})
    errors, returns = np.float64(VALUES - RETURNS)[MASK], np.float64(RETURNS)[MASK]
    assert float(told["explained_variance"]) == pytest.approx(1 - errors.var() / returns.var(), rel=1e-4)
    assert "error_squared" not in told


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
    far = jnp.where(MASK, 500.0, 0.0)
    loss, slopes = jax.value_and_grad(
        lambda x: policy_loss(x, NEW, -np.abs(ADVANTAGES), MASK, NO_ENTROPY, PPOConfig()).total
    )(NEW + far)
    assert np.isfinite(loss) and np.isfinite(slopes).all()
