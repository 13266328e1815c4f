"""Runs a stack of equal layers: one compiled layer in a loop, or unrolled, with a remat policy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxllm.layout.layout import chosen_layout

# Names that model code gives (jax.ad_checkpoint.checkpoint_name) to what `selective` keeps: the outputs of the matmuls
# and of attention. Norms, activations and the attention probabilities are computed again.
KEPT = ("linear", "attention", "attention_statistics")


def run_layers(
    layer: Callable[[Array, Any], tuple[Array, Any]], x: Array, per_layer: Any, num_layers: int
) -> tuple[Array, Any]:
    """Applies `layer(x, inputs of one layer) -> (x, outputs of one layer)` for each layer in turn.

    On CPU, XLA merges what unrolled layers recompute with the first computation, so there `remat` saves memory only
    with `scan_layers`.

    Args:
      layer: one layer; it is traced once (`scan_layers`) or once a layer.
      x: the activation that passes through.
      per_layer: a tree whose arrays have a leading `layers` axis: weights, caches, layer numbers.

    Returns:
      The last activation and the outputs, stacked along a leading `layers` axis.
    """
    layout = chosen_layout()
    layer = _rematerialised(layer, layout.remat if layout else "none")
    if layout is None or layout.scan_layers:
        return jax.lax.scan(layer, x, per_layer)
    outputs = []
    for i in range(num_layers):
        x, output = layer(x, jax.tree.map(lambda a, i=i: a[i], per_layer))
        outputs.append(output)
    return x, jax.tree.map(lambda *a: jnp.stack(a), *outputs)


def _rematerialised(layer: Callable, remat: str) -> Callable:
    if remat == "none":
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT) if remat == "selective" else None
    layout = chosen_layout()
    return jax.checkpoint(layer, policy=policy, prevent_cse=not (layout and layout.scan_layers))
