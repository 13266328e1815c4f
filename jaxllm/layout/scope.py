"""Names that travel with the work: a tensor and its logical axes, in the name of every operation done for it.

XLA carries the name of a JAX scope through partitioning, fusion and the backward pass. So a profile, the partitioner's
warnings and `jaxllm explain` can say which tensor an operation of the compiled program is about.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax

Axes = tuple[str | None, ...]


class Tensor(NamedTuple):
    """A parameter, or an activation: its logical axes and its whole shape."""

    axes: Axes
    shape: tuple[int, ...]


class Frozen(NamedTuple):
    """Weights that are not trained (or their shapes), and their logical axes: nested dicts."""

    weights: Any
    axes: Any


NOTHING = Frozen({}, {})


class Scope(NamedTuple):
    """One named scope of an operation."""

    tensor: str  # path of a parameter, several joined by "+", or "" for an activation
    axes: tuple[str, ...]  # logical axes


def tensor_scope(tensor: str | Sequence[str], *axes: Axes) -> AbstractContextManager:
    """A `jax.named_scope` "layers.attention.out.kernel[heads,head_dim,embed]".

    Args:
      tensor: path of a parameter, or of several that are used together.
      axes: their logical axes.
    """
    name = tensor if isinstance(tensor, str) else "+".join(tensor)
    every = dict.fromkeys(axis for one in axes for axis in one if axis)
    return jax.named_scope(f"{name}[{','.join(every)}]")


def map_named(f: Callable[..., Any], tree: Any, axes: Any) -> Any:
    """`f(leaf, its logical axes)` on each leaf of a tree of parameters, in the scope of that parameter."""

    def named(path, leaf, leaf_axes):
        with tensor_scope(path_name(path), leaf_axes):
            return f(leaf, leaf_axes)

    return jax.tree_util.tree_map_with_path(named, tree, axes)


def map_leaves(f: Callable[..., Any], tree: Any, axes: Any) -> dict[str, Any]:
    """Path of each parameter -> `f(leaf, its logical axes)`."""
    found: dict[str, Any] = {}

    def visit(path, leaf, leaf_axes):
        found[path_name(path)] = f(leaf, leaf_axes)

    jax.tree_util.tree_map_with_path(visit, tree, axes)
    return found


def path_name(path: Sequence[Any]) -> str:
    """A leaf's path in a nested dict as messages write it: "layers.attention.query.kernel"."""
    return ".".join(str(key.key) for key in path)


def scopes(op_name: str) -> list[Scope]:
    """The scopes in the name of an operation, innermost first."""
    found = re.findall(r"([\w.+]*)\[([a-z_,]*)\](?=[/)]|$)", op_name)
    return [Scope(tensor, tuple(filter(None, axes.split(",")))) for tensor, axes in reversed(found)]


def matching(tree: Any, wanted: Callable[[str], bool], path: str = "") -> Any:
    """The part of a nested dict whose leaves have paths that are `wanted`, without what is empty then."""
    found = {}
    for key, value in tree.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            value = matching(value, wanted, name)
            if value:
                found[key] = value
        elif wanted(name):
            found[key] = value
    return found


def joined(first: Any, second: Any) -> Any:
    """One nested dict of two that share no leaf."""
    both = dict(first)
    for key, value in second.items():
        both[key] = joined(both[key], value) if key in both else value
    return both


def without(tree: Any, part: Any) -> Any:
    """A nested dict without the leaves that `part` has, too."""
    rest = {}
    for key, value in tree.items():
        if key not in part:
            rest[key] = value
        elif isinstance(value, dict) and (kept := without(value, part[key])):
            rest[key] = kept
    return rest


def like(tree: Any, part: Any) -> Any:
    """What `tree`, a nested dict, has in the places of `part`."""
    return {key: like(tree[key], value) if isinstance(value, dict) else tree[key] for key, value in part.items()}
