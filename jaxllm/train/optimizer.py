"""AdamW, Lion and Muon with their learning-rate schedule and weight-decay mask.

Each is one chain: a *direction* (the optimizer proper), decoupled weight decay, the learning rate. Clipping by the
global norm and the guard against non-finite gradients belong to the train step, which needs the norm anyway.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxllm.config import one_of
from jaxllm.errors import UserError
from jaxllm.train.config import OptimizerConfig

Axes = tuple[str | None, ...]  # logical axes of one parameter, e.g. ("layers", "embed", "mlp")

OPTIMIZERS = ("adamw", "lion", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
STACKED_AXES = ("layers", "experts")  # leading axes along which a parameter is a stack of independent matrices
MUON_RMS = 0.2  # Liu et al. 2025: brings Muon's update to the size of AdamW's, so both share one learning rate


def make_optimizer(config: OptimizerConfig, total_steps: int, axes: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optimizer of a run, for a nested dict of float32 parameters.

    The new parameters are `params - learning_rate * (direction + weight_decay * params)`, the decay where
    `decay_table` says so. Directions: AdamW (Loshchilov and Hutter 2019, decay times the learning rate, as in PyTorch),
    Lion (Chen et al. 2023), Muon (Jordan 2024) for the matrices of the layers and AdamW for the rest.

    Args:
      total_steps: length of the run in optimizer steps; the schedule ends there.
      axes: the logical axes of each parameter, a tree parallel to the parameters with tuples as leaves.

    Raises:
      UserError: an unknown name, a number out of range, or a faulty decay mask.
    """
    check_optimizer(config)
    return optax.chain(
        _direction(config, axes),
        optax.add_decayed_weights(config.weight_decay, mask=_decay_mask(config, axes)),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )


def make_schedule(config: OptimizerConfig, total_steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """The learning rate of step s = 0, 1, …, total_steps - 1, with n = s + 1, W = warmup_steps, S = total_steps.

    Warmup, n <= W: peak * n / W, so that no step is lost at a rate of zero. After it, with end = peak * final_fraction:
      cosine:   end + (peak - end) * (1 + cos(pi * (n - W) / (S - W))) / 2
      linear:   peak + (end - peak) * (n - W) / (S - W)
      wsd:      peak until n = S - D, then linear to end over the last D = decay_steps (0: a tenth of the run)
      constant: peak

    Raises:
      UserError: an unknown schedule, or warmup and decay longer than the run.
    """
    one_of("config.optimizer.schedule", config.schedule, SCHEDULES)
    peak, warmup, end = config.learning_rate, config.warmup_steps, config.learning_rate * config.final_fraction
    decay = (config.decay_steps or max(total_steps // 10, 1)) if config.schedule == "wsd" else 0
    if warmup < 0 or decay < 0 or warmup + decay > total_steps or (warmup == total_steps and warmup):
        spent = f"warmup_steps={warmup}" + (f" and decay_steps={decay}" if decay else "")
        raise UserError(
            f"config.optimizer.{spent} do not fit into config.train.steps={total_steps}. "
            f"Lower them, say to --config.optimizer.warmup_steps={total_steps // 10}, or train for longer."
        )
    after = {
        "cosine": lambda: [optax.cosine_decay_schedule(peak, total_steps - warmup, alpha=config.final_fraction)],
        "linear": lambda: [optax.linear_schedule(peak, end, total_steps - warmup)],
        "wsd": lambda: [optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)],
        "constant": lambda: [optax.constant_schedule(peak)],
    }[config.schedule]()
    starts = [warmup, total_steps - decay][: len(after)]
    first = optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    joined = optax.join_schedules([first, *after], starts)
    return lambda step: jnp.maximum(jnp.asarray(joined(step + 1), jnp.float32), 0)  # a cosine ends a rounding below 0


def decay_table(config: OptimizerConfig, axes: Mapping[str, Any]) -> dict[str, bool]:
    """Parameter path -> is it decayed? In the order of the tree; what the run prints at start.

    `decay_mask` "matrices" decays every parameter but norms (`scale`), biases, lengths (`magnitude`) and the table of
    learned positions; "all" every one; anything else is a regular expression, and the paths in which it is found are
    decayed.

    Raises:
      UserError: a faulty regular expression, or one found in no path.
    """
    paths = list(flat_paths(axes))
    if config.decay_mask == "all":
        return dict.fromkeys(paths, True)
    if config.decay_mask == "matrices":
        no_matrices = ("bias", "scale", "magnitude")
        return {p: p.split("/")[-1] not in no_matrices and "position_embedding" not in p for p in paths}
    try:
        pattern = re.compile(config.decay_mask)
    except re.error as error:
        raise UserError(
            f"config.optimizer.decay_mask={config.decay_mask!r} is no regular expression: {error}. "
            "Mend it, or write 'matrices' or 'all'."
        ) from None
    table = {path: pattern.search(path) is not None for path in paths}
    if not any(table.values()):
        raise UserError(
            f"config.optimizer.decay_mask={config.decay_mask!r} is found in no parameter path "
            f"(such as {paths[0]}). Write 'matrices', 'all', or a regular expression that is."
        )
    return table


def flat_paths(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a nested dict by path: "layers/mlp/up/kernel" -> leaf. Tuples of axes count as leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def map_param_leaves(
    optimizer: optax.GradientTransformation,
    f: Callable[..., Any],
    state: Any,
    *rest: Any,
    transform_non_params: Callable[[Any], Any] | None = None,
) -> Any:
    """`optax.tree_map_params`, also for optimizers that keep some moments for a part of the parameters only (Muon).

    `f(moment, *leaves_of_rest)` is called on each leaf of `state` that belongs to a parameter; `rest` are trees
    parallel to the parameters (say, of shardings).
    """

    def at_leaf(moment: Any, *others: Any) -> Any:
        return moment if isinstance(moment, optax.MaskedNode) else f(moment, *others)

    return optax.tree_utils.tree_map_params(
        optimizer,
        at_leaf,
        state,
        *rest,
        transform_non_params=transform_non_params,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


def muon_dimensions(path: str, axes: Axes) -> MuonDimensionNumbers | None:
    """Which axes of a layer's kernel are the matrix Muon orthogonalises; None where AdamW takes the parameter.

    Leading `layers` and `experts` axes are stacks of matrices. Of the rest, `embed` is one side of the matrix and all
    others the other: [layers, embed, heads, head_dim] maps embed to heads x head_dim, [layers, heads, head_dim, embed]
    back.
    """
    stacked = len(list(itertools.takewhile(STACKED_AXES.__contains__, axes)))
    sides = tuple(range(stacked, len(axes)))
    if not stacked or not path.endswith("/kernel") or len(sides) < 2:
        return None
    if axes[-1] == "embed":
        return MuonDimensionNumbers(sides[:-1], sides[-1:])
    return MuonDimensionNumbers(sides[:1], sides[1:])


def _direction(config: OptimizerConfig, axes: Mapping[str, Any]) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name == "adamw":
        return adam
    if config.name == "lion":
        return optax.scale_by_lion(config.beta1, config.beta2)
    dimensions = _by_path(muon_dimensions, axes)
    is_leaf = lambda x: x is None or isinstance(x, MuonDimensionNumbers)  # noqa: E731
    masked = jax.tree.map(lambda d: optax.MaskedNode() if d is None else d, dimensions, is_leaf=is_leaf)
    labels = jax.tree.map(lambda d: "adamw" if d is None else "muon", dimensions, is_leaf=is_leaf)
    muon = optax.chain(
        scale_by_muon(beta=config.momentum, weight_dimension_numbers=masked), _scale_to_adamw(masked, is_leaf)
    )
    return optax.partition({"muon": muon, "adamw": adam}, labels)


def _scale_to_adamw(dimensions: Any, is_leaf: Callable[[Any], bool]) -> optax.GradientTransformation:
    """Liu et al. 2025 (arXiv 2502.16982): an orthogonal update times 0.2 * sqrt(max(fan_in, fan_out))."""

    def scale(update: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
        fans = [math.prod(update.shape[a] for a in side) for side in (axes.reduction_axis, axes.output_axis)]
        return update * (MUON_RMS * max(fans) ** 0.5)

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, dimensions, is_leaf=is_leaf))


def _by_path(f: Callable[[str, Axes], Any], axes: Mapping[str, Any]) -> Any:
    """A tree parallel to the parameters with f(path, axes of the parameter) as leaves."""
    treedef = jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(treedef, [f(path, leaf) for path, leaf in flat_paths(axes).items()])


def _decay_mask(config: OptimizerConfig, axes: Mapping[str, Any]) -> Any:
    table = decay_table(config, axes)
    return _by_path(lambda path, _: table[path], axes)


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises a UserError on an unknown optimizer and on numbers out of their range."""
    one_of("config.optimizer.name", config.name, OPTIMIZERS)
    ranges = {
        "learning_rate": (config.learning_rate > 0, "above 0"),
        "final_fraction": (0 <= config.final_fraction <= 1, "from 0 to 1"),
        "weight_decay": (config.weight_decay >= 0, "0 or more"),
        "beta1": (0 <= config.beta1 < 1, "0 or more and below 1"),
        "beta2": (0 <= config.beta2 < 1, "0 or more and below 1"),
        "momentum": (0 <= config.momentum < 1, "0 or more and below 1"),
        "epsilon": (config.epsilon > 0, "above 0"),
        "clip_norm": (config.clip_norm >= 0, "0 (no clipping) or more"),
    }
    for field, (fits, rule) in ranges.items():
        if not fits:
            raise UserError(f"config.optimizer.{field}={getattr(config, field)} must be {rule}.")
