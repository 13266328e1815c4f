"""The optimizers against float64 transcriptions of their papers, the schedules against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.errors import UserError
from jaxllm.train.config import OptimizerConfig
from jaxllm.train.optimizer import (
    decay_table,
    flat_paths,
    make_optimizer,
    make_schedule,
    map_param_leaves,
    muon_dimensions,
)

SIZES = {"layers": 2, "embed": 8, "heads": 2, "head_dim": 4, "mlp": 16, "vocab": 12, "positions": 6, "experts": 3}
HEADS = ("layers", "embed", "heads", "head_dim")
AXES = {
    "embedding": {"table": ("vocab", "embed")},
    "position_embedding": {"table": ("positions", "embed")},
    "layers": {
        "attention_norm": {"scale": ("layers", "embed"), "bias": ("layers", "embed")},
        "attention": {
            "query": {"kernel": HEADS, "bias": ("layers", "heads", "head_dim")},
            "out": {"kernel": ("layers", "heads", "head_dim", "embed"), "bias": ("layers", "embed")},
        },
        "mlp": {
            "up": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
            "down": {"kernel": ("layers", "mlp", "embed")},
        },
    },
    "final_norm": {"scale": ("embed",)},
    "head": {"kernel": ("embed", "vocab")},
}


def random_tree(seed):
    generator = np.random.default_rng(seed)
    shape = lambda axes: [SIZES[axis] for axis in axes]  # noqa: E731
    return jax.tree.map(
        lambda axes: jnp.asarray(generator.normal(size=shape(axes)), jnp.float32), AXES, is_leaf=_is_axes
    )


def _is_axes(node):
    return isinstance(node, tuple)


def run(config, steps=4, total_steps=8, place=lambda tree: tree):
    """The parameters after some steps with gradients of fixed seeds."""
    optimizer = make_optimizer(config, total_steps, AXES)
    params = place(random_tree(0))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for index in range(steps):
        params, state = step(params, state, place(random_tree(index + 1)))
    return params, state


def transcription(config, steps=4, total_steps=8):
    """The same by the papers, in NumPy float64."""
    params = {path: np.float64(leaf) for path, leaf in flat_paths(random_tree(0)).items()}
    axes, decayed = flat_paths(AXES), decay_table(config, AXES)
    first = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    second = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    b1, b2 = config.beta1, config.beta2
    for t in range(1, steps + 1):
        rate = formula(config, t, total_steps)
        for path, g in ((p, np.float64(leaf)) for p, leaf in flat_paths(random_tree(t)).items()):
            if config.name == "lion":  # Chen et al. 2023, Program 1
                direction = np.sign(b1 * first[path] + (1 - b1) * g)
                first[path] = b2 * first[path] + (1 - b2) * g
            elif config.name == "muon" and path.startswith("layers/") and path.endswith("kernel"):
                first[path] = config.momentum * first[path] + (1 - config.momentum) * g
                m = config.momentum
                nesterov = m * first[path] / (1 - m ** (t + 1)) + (1 - m) * g / (1 - m**t)
                direction = muon_direction(nesterov, axes[path])
            else:  # Loshchilov and Hutter 2019, Algorithm 2
                first[path] = b1 * first[path] + (1 - b1) * g
                second[path] = b2 * second[path] + (1 - b2) * g * g
                direction = first[path] / (1 - b1**t) / (np.sqrt(second[path] / (1 - b2**t)) + config.epsilon)
            params[path] = params[path] - rate * (direction + config.weight_decay * decayed[path] * params[path])
    return params


def muon_direction(update, axes):
    """Newton-Schulz on each layer's matrix embed x (the rest), times 0.2 sqrt(max(fan_in, fan_out))."""
    out = np.empty_like(update)
    for layer in range(update.shape[0]):
        rows = update[layer].shape[0] if axes[1] == "embed" else -1
        matrix = update[layer].reshape(rows, -1 if rows > 0 else update.shape[-1])
        x = matrix / (np.linalg.norm(matrix) + 1e-8)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        out[layer] = (0.2 * math.sqrt(max(matrix.shape)) * x).reshape(update[layer].shape)
    return out


def formula(config, n, total):
    """The learning rate of the n-th step, n from 1."""
    peak, warmup = config.learning_rate, config.warmup_steps
    end = peak * config.final_fraction
    if n <= warmup:
        return peak * n / warmup
    if config.schedule == "constant":
        return peak
    start = warmup if config.schedule != "wsd" else total - (config.decay_steps or total // 10)
    done = max(n - start, 0) / (total - start)
    return end + (peak - end) * ((1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(name="adamw", learning_rate=0.1, warmup_steps=2),
        OptimizerConfig(name="adamw", learning_rate=0.1, warmup_steps=0, weight_decay=0.5, decay_mask="mlp|bias"),
        OptimizerConfig(name="lion", learning_rate=0.01, warmup_steps=2, schedule="linear", beta2=0.99),
        OptimizerConfig(name="muon", learning_rate=0.1, warmup_steps=2, schedule="wsd", decay_steps=3),
    ],
    ids=["adamw", "adamw-regex", "lion", "muon"],
)
def test_follows_the_paper(config):
    got, _ = run(config)
    want = transcription(config)
    start = flat_paths(random_tree(0))
    for path, value in flat_paths(got).items():
        moved = np.abs(want[path] - start[path]).max()
        assert moved > 1e-3, path
        np.testing.assert_allclose(value, want[path], rtol=0, atol=2e-5 + 2e-5 * moved, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_state_is_found_and_sharded_by_parameter(name):
    """The moments take the shardings of their parameters, and the sharded update equals the whole one."""
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=2)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def spec(axes):
        split = next((i for i, axis in enumerate(axes) if SIZES[axis] % 2 == 0 and axis != "layers"), None)
        return NamedSharding(mesh, PartitionSpec(*["data" if i == split else None for i in range(len(axes))]))

    shardings = jax.tree.map(spec, AXES, is_leaf=_is_axes)
    optimizer = make_optimizer(config, 8, AXES)
    abstract = jax.eval_shape(optimizer.init, random_tree(0))
    seen = []
    mapped = map_param_leaves(
        optimizer,
        lambda moment, param, sharding: seen.append(moment.shape == param.shape) or sharding,
        abstract,
        random_tree(0),
        shardings,
        transform_non_params=lambda leaf: None if leaf.ndim < 2 else 1 / 0,
    )
    kernels = sum("kernel" in path and "layers" in path for path in flat_paths(AXES))
    moments = {"adamw": 2 * len(flat_paths(AXES)), "lion": len(flat_paths(AXES))}
    moments["muon"] = moments["adamw"] - kernels
    assert all(seen) and len(seen) == moments[name]
    assert len(jax.tree.leaves(mapped)) == moments[name]

    whole, _ = run(config)
    sharded, state = run(config, place=lambda tree: jax.device_put(tree, shardings))
    for path, value in flat_paths(sharded).items():
        np.testing.assert_allclose(value, flat_paths(whole)[path], atol=1e-5, err_msg=path)
    split = []
    map_param_leaves(optimizer, lambda moment, _: split.append(not moment.is_fully_replicated), state, shardings)
    assert all(split)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup, decay, total", [(10, 0, 100), (0, 30, 60), (1, 1, 2)])
def test_schedule_formula(schedule, warmup, decay, total):
    config = OptimizerConfig(
        schedule=schedule, warmup_steps=warmup, decay_steps=decay, learning_rate=0.5, final_fraction=0.2
    )
    rate = make_schedule(config, total)
    for n in {1, 2, max(warmup, 1), warmup + 1, total // 2, total - 1 or 1, total}:
        assert float(rate(n - 1)) == pytest.approx(formula(config, n, total), rel=1e-5), n
    assert float(rate(total - 1)) == pytest.approx(0.5 if schedule == "constant" else 0.1)
    if warmup:
        assert float(rate(0)) == pytest.approx(0.5 / warmup)
        assert float(rate(warmup - 1)) == pytest.approx(0.5)
    traced = jax.jit(rate)(jnp.int32(total // 2))
    assert traced.dtype == jnp.float32 and float(traced) == pytest.approx(float(rate(total // 2)))


def test_decay_table_snapshot():
    assert [path for path, decayed in decay_table(OptimizerConfig(), AXES).items() if decayed] == [
        "embedding/table",
        "head/kernel",
        "layers/attention/out/kernel",
        "layers/attention/query/kernel",
        "layers/mlp/down/kernel",
        "layers/mlp/up/kernel",
    ]
    assert all(decay_table(OptimizerConfig(decay_mask="all"), AXES).values())
    regex = decay_table(OptimizerConfig(decay_mask="^layers/.*kernel$"), AXES)
    assert sum(regex.values()) == 4 and not regex["head/kernel"]
    assert list(regex) == list(flat_paths(AXES))


def test_muon_takes_the_matrices_of_the_layers():
    dimensions = {path: muon_dimensions(path, axes) for path, axes in flat_paths(AXES).items()}
    assert {path: (*d.reduction_axis, "->", *d.output_axis) for path, d in dimensions.items() if d} == {
        "layers/attention/out/kernel": (1, 2, "->", 3),
        "layers/attention/query/kernel": (1, "->", 2, 3),
        "layers/mlp/down/kernel": (1, "->", 2),
        "layers/mlp/up/kernel": (1, "->", 2),
    }
    experts = muon_dimensions("layers/mlp/up/kernel", ("layers", "experts", "embed", "mlp"))
    assert (experts.reduction_axis, experts.output_axis) == ((2,), (3,))
    router = muon_dimensions("layers/mlp/router/kernel", ("layers", "embed", "experts"))
    assert (router.reduction_axis, router.output_axis) == ((1,), (2,))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"decay_mask": "kernel("}, r"decay_mask='kernel\(' is no regular expression: .*position 6"),
        ({"decay_mask": "matrix"}, "decay_mask='matrix' is found in no parameter path"),
        ({"name": "adam"}, "Did you mean 'adamw'"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"beta2": 1.0}, "beta2=1.0 must be 0 or more and below 1"),
        ({"warmup_steps": 50}, "warmup_steps=50 do not fit into config.train.steps=50"),
        ({"schedule": "wsd", "warmup_steps": 30, "decay_steps": 21}, "warmup_steps=30 and decay_steps=21"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimizerConfig(**({"warmup_steps": 5} | fields)), 50, AXES)
