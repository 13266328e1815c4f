"""The mixture of experts against loops over tokens in float64 NumPy, and its gradients against finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.model.config import ModelConfig
from jaxllm.model.moe import MoE, expert_matmul, router_metrics, top_k

MODEL = ModelConfig(
    num_layers=2,
    embed_dim=12,
    num_heads=2,
    mlp_dim=16,
    num_experts=5,
    experts_per_token=2,
    activation="silu",
    gated_mlp=True,
    use_bias=False,
    router_balance_loss=0.02,
    router_z_loss=1e-3,
    init_std=0.5,
).resolved()
BATCH, LENGTH = 3, 9
SEGMENTS = np.array([[1] * 9, [1] * 4 + [2] * 3 + [0] * 2, [1] * 1 + [0] * 8], np.int32)


def inputs() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((BATCH, LENGTH, MODEL.embed_dim)).astype(np.float32)


def layer(config: ModelConfig) -> MoE:
    return MoE(config, rngs=nnx.Rngs(0))


def weights_of(moe: MoE) -> dict[str, np.ndarray]:
    named = {"router": moe.router, "gate": moe.gate, "up": moe.up, "down": moe.down}
    return {name: np.asarray(part.kernel[...], np.float64) for name, part in named.items() if part is not None}


def reference(config: ModelConfig, w: dict[str, np.ndarray], x: np.ndarray, segments: np.ndarray, predicted=None):
    """(y, loss, load, dropped): token by token, expert by expert."""
    x = np.asarray(x, np.float64)
    y, load = np.zeros_like(x), np.zeros(config.num_experts)
    loss, dropped = 0.0, 0
    for row in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if segments[row, t] > 0]
        logits = x[row] @ w["router"]
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        best = np.argsort(-p, axis=-1, kind="stable")[:, : config.experts_per_token]
        counts = np.bincount(best[real].ravel(), minlength=config.num_experts)
        load += counts
        share = counts / len(real)
        balance = config.num_experts * np.sum(share * p[real].mean(0))
        z = np.mean(np.log(np.exp(logits[real]).sum(-1)) ** 2)
        weight = len(real) if predicted is None else predicted[row]
        loss += weight * (config.router_balance_loss * balance + config.router_z_loss * z) / config.num_layers
        room = np.full(config.num_experts, x.shape[1])
        if config.expert_dispatch == "capacity":
            even = x.shape[1] * config.experts_per_token / config.num_experts
            room = np.full(config.num_experts, int(np.ceil(even * config.capacity_factor)))
        for choice in range(config.experts_per_token):  # all first choices before all second ones
            for t in real:
                expert = best[t, choice]
                if not room[expert]:
                    dropped += 1
                    continue
                room[expert] -= 1
                total = p[t, best[t]].sum() if config.router_renormalize else 1.0
                hidden = _activate(x[row, t] @ w["gate" if config.gated_mlp else "up"][expert])
                hidden *= x[row, t] @ w["up"][expert] if config.gated_mlp else 1.0
                y[row, t] += p[t, expert] / total * (hidden @ w["down"][expert])
    return y, loss, load, dropped


def _activate(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


CONFIGS = {
    "dropless": MODEL,
    "capacity": dataclasses.replace(MODEL, expert_dispatch="capacity", capacity_factor=0.6),
    "capacity with room": dataclasses.replace(MODEL, expert_dispatch="capacity", capacity_factor=5.0),
    "one expert a token": dataclasses.replace(MODEL, experts_per_token=1, router_renormalize=False),
    "not gated": dataclasses.replace(MODEL, gated_mlp=False, router_renormalize=False),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_output_losses_and_statistics(config):
    moe = layer(config)
    y, sums = jax.jit(moe)(inputs(), jnp.asarray(SEGMENTS))
    wanted, loss, load, dropped = reference(config, weights_of(moe), inputs(), SEGMENTS)
    np.testing.assert_allclose(y, wanted, atol=2e-5)
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)
    np.testing.assert_array_equal(sums.statistics["load"], load)
    assert sums.statistics["dropped"] == dropped
    assert sums.statistics["tokens"] == (SEGMENTS > 0).sum()
    if config is CONFIGS["capacity"]:
        assert dropped > 5


def test_the_losses_of_a_row_weigh_as_many_as_its_predicted_tokens():
    moe, predicted = layer(MODEL), np.array([2.0, 0.0, 1.0], np.float32)
    _, sums = jax.jit(moe)(inputs(), jnp.asarray(SEGMENTS), jnp.asarray(predicted))
    _, loss, *_ = reference(MODEL, weights_of(moe), inputs(), SEGMENTS, predicted)
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)


@pytest.mark.parametrize("config", [CONFIGS["dropless"], CONFIGS["capacity"]], ids=["dropless", "capacity"])
def test_gradients(config):
    """Along random directions, against central differences of the reference."""
    moe, random = layer(config), np.random.default_rng(1)
    x, w = inputs(), weights_of(moe)
    pull = random.standard_normal(x.shape)

    def objective(x, w) -> float:
        y, loss, *_ = reference(config, w, x, SEGMENTS)
        return np.sum(y * pull) + loss

    graph, state = nnx.split(moe)

    def computed(state, x):
        y, sums = nnx.merge(graph, state)(x, jnp.asarray(SEGMENTS))
        return jnp.sum(y * pull.astype(np.float32)) + sums.loss

    d_state, d_x = jax.jit(jax.grad(computed, argnums=(0, 1)))(state, x)
    gradients = {"x": d_x} | {name: d_state[name]["kernel"][...] for name in w}
    for name in gradients:
        values = {"x": np.asarray(x, np.float64)} | w
        step = random.standard_normal(values[name].shape) * 1e-6
        ends = [{**values, name: values[name] + sign * step} for sign in (1, -1)]
        change = [objective(end.pop("x"), end) for end in ends]
        expected = (change[0] - change[1]) / 2
        np.testing.assert_allclose(np.sum(np.asarray(gradients[name], np.float64) * step), expected, rtol=2e-3)


def test_top_k_takes_the_first_of_equals():
    numbers, chosen = top_k(jnp.array([[[0.2, 0.4, 0.4, 0.0]]]), 3)
    assert numbers.tolist() == [[[1, 2, 0]]]
    assert chosen.argmax(-1).tolist() == numbers.tolist()


def test_the_gradient_of_bfloat16_experts_is_summed_in_float32():
    """A row of 256 and many of 1/2: bfloat16 would lose each of them."""
    rows = jnp.concatenate([jnp.full((1, 1, 1), 256.0), jnp.full((1, 2047, 1), 0.5)], axis=1).astype(jnp.bfloat16)
    gradient = jax.grad(lambda w: expert_matmul(rows, w).astype(jnp.float32).sum())(jnp.ones((1, 1, 1)))
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient.item(), 256 + 2047 / 2, rtol=1e-6)


def test_metrics_of_a_balanced_and_of_a_broken_router():
    even = {"load": jnp.full((2, 4), 6.0), "balance": jnp.full(2, 12.0), "log_z_squared": jnp.full(2, 24.0)}
    rest = {"dropped": jnp.zeros(2), "tokens": jnp.full(2, 12.0)}
    metrics = router_metrics(even | rest)
    assert {name: float(value) for name, value in metrics.items()} == {
        "router_balance": 1.0,
        "router_z": 2.0,
        "router_max_load": 1.0,
        "router_dropped": 0.0,
    }
    one_sided = even | {"load": jnp.array([[6.0] * 4, [24.0, 0, 0, 0]])} | rest | {"dropped": jnp.array([0.0, 12.0])}
    metrics = router_metrics(one_sided)
    assert (metrics["router_max_load"], metrics["router_dropped"]) == (4.0, 0.25)
    assert router_metrics(None) == {}
