"""LoRA on whole trees of parameters: where an adapter starts, and a model with its adapter merged into it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.layout.scope import joined, without
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.adapters import STACKED, Sides, added_kernel, gained, kernel_lengths, merged_kernel, split_sides
from jaxllm.model.prompt_trees import started_prompt
from jaxllm.model.spec import ModelSpec

Tree = dict[str, Any]


def started(spec: ModelSpec, base: Tree, seed: int, prompt: Sequence[int] = ()) -> Tree:
    """All parameters at the start of a run: the model's `base`, and an adapter's from the seed and from the model; a
    scalar head's from the seed, where the base has none.

    Traceable. DoRA's magnitudes are the lengths of the columns of the frozen matrices; PiSSA's matrices are their
    largest singular directions; a prompt may start as tokens of the vocabulary or of a text.

    Args:
      prompt: the tokens of `config.adapter.prompt_text`.
    """
    if not spec.is_adapted:
        return joined(base, without(spec.added(spec.init(seed)), base))
    params = joined(base, spec.own(spec.init(seed)))
    if spec.adapter.places:
        return started_prompt(spec, params, seed, prompt)
    return _map_lora(lambda *node: _start(spec.adapter, *node), params, spec.axes)


def merged(spec: ModelSpec, params: Tree) -> Tree:
    """The float32 parameters of the model without an adapter that computes what the adapted one does."""
    return spec.base(_map_lora(lambda *node: {"kernel": _merge(spec.adapter, *node)}, params, spec.axes))


def unmerged(spec: ModelSpec, params: Tree, adapter: Tree) -> Tree:
    """What `merged` was made of: the model's own parameters, within float32 rounding; `adapter` as it was merged.

    DoRA does not only add: its columns are brought back to the lengths that the sum had, which the adapter does not
    know, so it is refused.
    """
    if spec.adapter.dora:
        raise ValueError("DoRA changes the lengths of columns and cannot be taken out again: keep the base.")
    subtract = lambda kernel, lora, sides: {"kernel": kernel - _added(spec.adapter, kernel.shape, lora, sides)}  # noqa: E731
    return spec.base(_map_lora(subtract, joined(params, adapter), spec.axes))


def _map_lora(f: Callable[[Array, Tree, Sides], Tree], params: Tree, axes: Tree) -> Tree:
    """Each {kernel, lora, …} with what `f(kernel, lora, sides)` replaces in it."""
    changed = dict(params)
    for key, value in params.items():
        if not isinstance(value, dict) or key == "lora":
            continue
        changed[key] = _map_lora(f, value, axes[key])
        if "lora" in value:
            changed[key] |= f(value["kernel"], value["lora"], _sides(axes[key]))
    return changed


def _sides(axes: Tree) -> Sides:
    """Of a kernel with its stack of layers, from the axes of its adapter: [*stack, *inputs, rank]."""
    a = axes["lora"]["a"]
    stacked = sum(axis in STACKED for axis in a)
    return Sides(stacked, len(a) - stacked - 1)


def _start(config: AdapterConfig, kernel: Array, lora: Tree, sides: Sides) -> Tree:
    lora = dict(lora)
    if "magnitude" in lora:
        lora["magnitude"] = kernel_lengths(kernel, sides)
    if config.init == "pissa":
        lora["a"], lora["b"] = principal(kernel, config.rank, config.scale, sides)
        lora["start_a"], lora["start_b"] = lora["a"], lora["b"]
    return {"lora": lora}


def _added(config: AdapterConfig, shape: tuple[int, ...], lora: Tree, sides: Sides) -> Float[Array, "*axes"]:
    return config.scale * added_kernel(*_narrow(lora, sides), shape, sides)


def _narrow(lora: Tree, sides: Sides) -> tuple[Array, Array]:
    """The two matrices whose product, times the scale, is what is added."""
    if "start_a" not in lora:
        return lora["a"], lora["b"]
    return gained(lora["a"], lora["b"], lora["start_a"], lora["start_b"], sides)


def _merge(config: AdapterConfig, kernel: Array, lora: Tree, sides: Sides) -> Array:
    return merged_kernel(kernel, *_narrow(lora, sides), lora.get("magnitude"), sides, config.scale)


def principal(
    w: Float[Array, "*axes"], rank: int, scale: float, sides: Sides
) -> tuple[Float[Array, "*stack inputs rank"], Float[Array, "*stack rank outputs"]]:
    """A and B with scale * A B = the largest `rank` singular directions of W, each with half of the square roots.

    Meng et al. 2024, equations 2 and 3.
    """
    stack, inputs, outputs = split_sides(w.shape, sides)

    def one(matrix: Float[Array, "inputs outputs"]) -> tuple[Array, Array]:
        u, values, v = jnp.linalg.svd(matrix, full_matrices=False)
        roots = jnp.sqrt(values[:rank] / scale)
        return u[:, :rank] * roots, roots[:, None] * v[:rank]

    # One after the other: a device that decomposes a matrix has it whole.
    a, b = jax.lax.map(one, w.reshape(-1, math.prod(inputs), math.prod(outputs)))
    return a.reshape(*stack, *inputs, rank), b.reshape(*stack, rank, *outputs)
