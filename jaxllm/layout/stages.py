"""Which layers each pipeline stage holds, and the deal that brings them there.

The state keeps layers stacked as [layers, …] in their own order, whatever the layout. A pipeline of P devices with v
virtual stages has P x v positions in the order of the model; position p lies on device p mod P. Where that order is not
the canonical one (virtual stages, uneven counts) the weights of a step are dealt once before it, and their gradients
collected once after it, each by an all-to-all.
"""

from typing import NamedTuple

import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxllm.errors import UserError
from jaxllm.layout import zero
from jaxllm.layout.layout import Axes, Layout, pin


class Stages(NamedTuple):
    """The layers of each stage."""

    counts: tuple[int, ...]  # layers of each position, in the order of the model
    numbers: np.ndarray  # [stage, virtual stage, place] -> number of the layer, -1 where a stage holds fewer

    @property
    def is_canonical(self) -> bool:
        """True where device s holds the s-th run of equally many layers: nothing has to be dealt."""
        return np.array_equal(self.numbers.ravel(), np.arange(self.numbers.size))

    @property
    def places(self) -> np.ndarray:
        """[layer] -> its index in the flattened `numbers`."""
        flat = self.numbers.ravel()
        return np.argsort(np.where(flat < 0, flat.size, flat), kind="stable")[: (flat >= 0).sum()]


def make_stages(num_layers: int, num_stages: int, num_virtual_stages: int = 1, stage_layers: str = "") -> Stages:
    """The stages that `config.layout.stage_layers` describes.

    Args:
      stage_layers: "" as many layers at every position; "light_ends" one fewer at the first and the last, which hold
        the embedding and the head (BLOOM: 70 layers on 12 stages are 5, ten times 6, 5); or a list, "5,6,6,5".

    Raises:
      UserError: layers that cannot be dealt so, with lists that can.
    """
    positions = num_stages * num_virtual_stages
    counts = _counts(num_layers, positions, stage_layers)
    starts = np.concatenate([[0], np.cumsum(counts)])
    numbers = np.full((num_stages, num_virtual_stages, max(counts)), -1, np.int32)
    for position, count in enumerate(counts):
        virtual, stage = divmod(position, num_stages)
        numbers[stage, virtual, :count] = np.arange(starts[position], starts[position] + count)
    return Stages(counts, numbers)


def _counts(num_layers: int, positions: int, stage_layers: str) -> tuple[int, ...]:
    name = f"config.layout.stage_layers={stage_layers!r}"
    if num_layers < positions:
        raise UserError(
            f"config.model.num_layers={num_layers} is less than the {positions} stages of the pipeline. "
            f"Choose --config.mesh.pipeline (x config.layout.virtual_stages) of at most {num_layers}."
        )
    nearest = ",".join(map(str, _nearly_even(num_layers, positions)))
    if not stage_layers:
        if num_layers % positions:
            raise UserError(
                f"config.model.num_layers={num_layers} is not divisible by the {positions} stages of the pipeline. "
                f"Say how many layers each holds: --config.layout.stage_layers={nearest}"
            )
        return (num_layers // positions,) * positions
    if stage_layers == "light_ends":
        if positions < 2 or (num_layers + 2) % positions or num_layers + 2 < 2 * positions:
            raise UserError(
                f"{name}: with one layer less at both ends, {num_layers} layers + 2 are not divisible by the "
                f"{positions} stages. Nearest: --config.layout.stage_layers={nearest}"
            )
        inner = (num_layers + 2) // positions
        return (inner - 1, *[inner] * (positions - 2), inner - 1)
    try:
        counts = tuple(int(count) for count in stage_layers.split(","))
    except ValueError:
        raise UserError(f"{name} must be '', 'light_ends' or the layers of each stage, as '5,6,6,5'.") from None
    if len(counts) != positions or sum(counts) != num_layers or min(counts) < 1:
        raise UserError(
            f"{name} must be {positions} counts of at least 1 that add up to config.model.num_layers={num_layers} "
            f"(these are {len(counts)}, {sum(counts)} in all): say {nearest}."
        )
    return counts


def _nearly_even(num_layers: int, positions: int) -> list[int]:
    """Counts that differ by at most one; the ends, which hold embedding and head, are the first to get fewer."""
    least, more = divmod(num_layers, positions)
    light_first = [0, positions - 1, *range(1, positions - 1)][: positions - more] if positions > 1 else []
    return [least + (position not in light_first) * (more > 0) for position in range(positions)]


def deal(layout: Layout, stages: Stages, w: Float[Array, "layers ..."], axes: Axes) -> Array:
    """A stacked weight as [stage, virtual stage, place, …], the first axis over `pipeline`."""
    shape = (*stages.numbers.shape, *w.shape[1:])
    if not stages.is_canonical:
        w = pin(w, layout, _spread(layout, axes, w.shape))
        w = w[np.maximum(stages.numbers.ravel(), 0)]
    return pin(w.reshape(shape), layout, dealt_spec(layout, axes, w.shape))


def collect(layout: Layout, stages: Stages, g: Float[Array, "stage virtual place ..."], axes: Axes) -> Array:
    """The gradient of a dealt weight as that of the stacked one, [layers, …]."""
    flat = (stages.numbers.size, *g.shape[3:])
    if stages.is_canonical:
        return g.reshape(flat)
    g = pin(g.reshape(flat), layout, _spread(layout, axes, flat))
    return g[stages.places]


def dealt_spec(layout: Layout, axes: Axes, shape: tuple[int, ...]) -> P:
    """Where a dealt weight of stacked `shape` lies: over `pipeline`, and as the stage's own layout has it besides."""
    return P("pipeline", None, *zero.step_spec(layout.inside("pipeline"), axes, shape))


def _spread(layout: Layout, axes: Axes, shape: tuple[int, ...]) -> P:
    """`pipeline` moved from the layers to another axis, so that picking layers stays on each device."""
    return zero.with_axis(layout, axes, shape, zero.step_spec(layout.inside("pipeline"), axes, shape), "pipeline")
