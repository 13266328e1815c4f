"""Runs a stack of equal layers: one compiled layer in a loop, or unrolled, with a remat policy.

`cut_at_layers` opens a loss function at its stack: that is how a pipeline runs what comes before the layers, some of
the layers, and what comes after them on different devices, without the loss knowing.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.layout.layout import chosen_layout

# Names that model code gives (jax.ad_checkpoint.checkpoint_name) to what `selective` keeps: the outputs of the matmuls
# and of attention. Norms, activations and the attention probabilities are computed again.
KEPT = ("linear", "attention", "attention_statistics")


class LayerSums(NamedTuple):
    """What a layer gives in training besides its activation: sums over tokens, which add up over microbatches."""

    loss: Float[Array, ""]  # added to the loss
    statistics: dict[str, Array]  # of which metrics are made


class Layer(Protocol):
    """One layer: the activation, its number in the whole stack and its own inputs -> the activation and outputs.

    In training the outputs are `LayerSums` or None.
    """

    def __call__(self, x: Array, number: Int[Array, ""], inputs: Any) -> tuple[Array, Any]: ...


def run_layers(layer: Layer, x: Array, per_layer: Any, num_layers: int) -> tuple[Array, Any]:
    """Applies `layer(x, number, inputs of one layer) -> (x, outputs of one layer)` for each layer in turn.

    On CPU, XLA merges what unrolled layers recompute with the first computation, so there `remat` saves memory only
    with `scan_layers`.

    Args:
      layer: one layer; it is traced once (`scan_layers`) or once a layer.
      x: the activation that passes through.
      per_layer: a tree whose arrays have a leading `layers` axis: weights, caches.

    Returns:
      The last activation and the outputs, stacked along a leading `layers` axis.
    """
    handler = _handler.get()
    if handler is not None:
        return handler(layer, x, per_layer)
    return run_each(layer, x, jnp.arange(num_layers, dtype=jnp.uint32), per_layer)


def run_each(layer: Layer, x: Array, numbers: Int[Array, "layers"], per_layer: Any) -> tuple[Array, Any]:
    """`run_layers` of the layers with these numbers."""
    layout = chosen_layout()
    one = _rematerialised(lambda x, inputs: layer(x, *inputs), layout.remat if layout else "none")
    if layout is None or layout.scan_layers:
        return jax.lax.scan(one, x, (numbers, per_layer))
    outputs = []
    for i in range(len(numbers)):
        x, output = one(x, jax.tree.map(lambda a, i=i: a[i], (numbers, per_layer)))
        outputs.append(output)
    return x, jax.tree.map(lambda *a: jnp.stack(a), *outputs)


def _rematerialised(layer: Callable, remat: str) -> Callable:
    if remat == "none":
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT) if remat == "selective" else None
    layout = chosen_layout()
    return jax.checkpoint(layer, policy=policy, prevent_cse=not (layout and layout.scan_layers))


# What `run_layers` does instead of running the layers: (layer, x, per_layer) -> what it returns.
_Handler = Callable[[Layer, Array, Any], tuple[Array, Any]]
_handler: contextvars.ContextVar[_Handler | None] = contextvars.ContextVar("layers handler", default=None)


@contextlib.contextmanager
def cut_at_layers(handler: _Handler) -> Iterator[None]:
    """Inside, `run_layers` returns what `handler(layer, x, per_layer)` makes of the stack."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)
