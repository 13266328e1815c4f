"""How frozen weights are held: once, in the dtype of compute, or the matrices of the layers in 4 bits."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.layout import nf4
from jaxllm.layout.vocabulary import weight_dtype
from jaxllm.model.adapter_config import AdapterConfig

Tree = dict[str, Any]
CODES, SCALES = "codes", "scales"  # what stands in place of a matrix in 4 bits


def freeze(weights: Tree, axes: Tree, config: AdapterConfig, compute: jnp.dtype) -> Tree:
    """Float32 weights as they are held. Traceable."""

    def held(path: tuple, w: Float[Array, "..."], w_axes: Sequence[str]) -> Array | Tree:
        if config.base_weights == "nf4" and _is_packed(path, w_axes):
            packed = nf4.quantize(w, w_axes.index("embed"))
            return {CODES: packed.codes, SCALES: packed.scales}
        return w.astype(weight_dtype(w_axes, compute))

    return jax.tree_util.tree_map_with_path(held, weights, axes)


def _is_packed(path: tuple, axes: Sequence[str]) -> bool:
    """The matrices of the layers, but not routers, whose outputs lie close together."""
    return path[-1].key == "kernel" and axes[0] == "layers" and None not in axes


def thaw(held: Tree, axes: Tree | tuple) -> Tree:
    """The weights that are computed with: those in 4 bits as float32, all others as they are. Traceable."""
    if set(held) == {CODES, SCALES}:
        return nf4.dequantize(nf4.NF4(held[CODES], held[SCALES], axes.index("embed")), jnp.float32)
    return {key: thaw(value, axes[key]) if isinstance(value, dict) else value for key, value in held.items()}


def held_axes(held: Tree, axes: Tree | tuple) -> Tree:
    """The logical axes of what `freeze` made of weights with these axes."""
    if not isinstance(axes, dict):
        return {key: axes for key in held} if isinstance(held, dict) else axes
    return {key: held_axes(held[key], axes[key]) for key in held}
