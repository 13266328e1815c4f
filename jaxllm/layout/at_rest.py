"""Layers that the stages of a pipeline do not divide, at rest.

An array is split into equal parts only. So where `pipeline` does not divide the layers, the stacked arrays of a train
state are as long as the next multiple (BLOOM: 70 layers on 12 stages are 72): what is past the last layer is zeros, has
no gradient and stays zeros. In a checkpoint too; whoever reads one takes the layers there are.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxllm.layout.layout import Layout
from jaxllm.layout.scope import Tensor

Tree = Any


def shape_at_rest(layout: Layout, axes: Sequence[str | None], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a weight in a train state: its own, but for layers that are made up to a multiple of the stages."""
    if tuple(axes[:1]) != ("layers",) or layout.num_stages == 1:
        return tuple(shape)
    return (made_up(shape[0], layout.num_stages), *shape[1:])


def made_up(num_layers: int, num_stages: int) -> int:
    """The layers with the empty ones after them: the next multiple of the stages."""
    return math.ceil(num_layers / num_stages) * num_stages


def tensor_at_rest(layout: Layout, tensor: Tensor) -> Tensor:
    """The same tensor with its shape at rest."""
    return Tensor(tensor.axes, shape_at_rest(layout, *tensor))


def fitted(tree: Tree, wanted: Tree) -> Tree:
    """Every array as long as `wanted` has it at that place: zeros after its end, or the end left out. Traceable."""
    return jax.tree.map(_fitted, tree, wanted)


def _fitted(x: Array, wanted: Any) -> Array:
    if x.shape == wanted.shape:
        return x
    if x.shape[0] > wanted.shape[0]:
        return x[: wanted.shape[0]]
    return jnp.pad(x, [(0, wanted.shape[0] - x.shape[0]), *[(0, 0)] * (x.ndim - 1)])
