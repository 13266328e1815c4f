"""ZeRO is a matter of when the weights are gathered (Rajbhandari et al. 2020).

| stage | weights for compute            | gradients                            | state (master weights, optimizer) |
| ----- | ------------------------------ | ------------------------------------ | --------------------------------- |
| 0     | replicated                     | all-reduced once a step              | replicated                        |
| 1     | gathered once a step           | all-reduced once a step, then sliced | sharded                           |
| 2     | gathered once a step           | reduce-scattered each microbatch     | sharded                           |
| 3     | gathered at use, dropped after | reduce-scattered each microbatch     | sharded                           |

Each column is one sharding: `compute_spec`, `gradient_spec`, `state_spec`. The rules row `state` says over which mesh
axes "sharded" means.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxllm.layout.layout import Layout, axis_names, pin, platform

# Stage 3 gathers tensors below this many elements a layer once a step, like stage 2: a norm's scale is not worth a
# collective in every layer. The name for it in DeepSpeed is the parameter persistence threshold.
SMALL = 32_768


def compute_spec(layout: Layout, axes: Sequence[str | None], shape: Sequence[int]) -> P:
    """Where a weight lives while it is computed with: whole but for tensor parallelism."""
    return layout.spec(axes, shape)


def state_spec(layout: Layout, axes: Sequence[str | None], shape: Sequence[int]) -> P:
    """Where a master weight and its optimizer moments live at rest.

    From stage 1 on the mesh axes of the rules row `state` are laid over the largest dimension that they divide, the
    stacked `layers` excepted, so that one layer can be gathered alone. A mesh axis that the compute sharding wanted but
    that does not divide its dimension (a vocabulary of odd size over `model`) finds its place here in the same way, and
    so does `pipeline` for what is no layer: the embedding and the head weigh on no stage more than on another.
    """
    spec = compute_spec(layout, axes, shape)
    wanted = [axis for name in (*axes, *["layers"] * ("layers" not in axes)) for axis in layout.mesh_axes(name)]
    spread = [*layout.mesh_axes("state"), *wanted] if layout.zero_stage else []
    for mesh_axis in dict.fromkeys(spread):
        spec = with_axis(layout, axes, shape, spec, mesh_axis)
    return spec


def with_axis(layout: Layout, axes: Sequence[str | None], shape: Sequence[int], spec: P, mesh_axis: str) -> P:
    """`spec` with `mesh_axis` laid over one more dimension, where it is not in use and divides one."""
    parts = [axis_names(part) for part in spec]
    if not any(mesh_axis in part for part in parts):
        _place(layout, axes, shape, parts, mesh_axis)
    return P(*[part if len(part) > 1 else part[0] if part else None for part in parts])


def _place(layout: Layout, axes, shape, parts: list[tuple[str, ...]], mesh_axis: str) -> None:
    """Adds `mesh_axis` to the best dimension: one that nothing splits yet, the largest, if it divides."""

    def local(i: int) -> int:
        return shape[i] // math.prod(layout.mesh.shape[axis] for axis in parts[i])

    fitting = [i for i, name in enumerate(axes) if name != "layers" and local(i) % layout.mesh.shape[mesh_axis] == 0]
    if fitting:
        best = max(fitting, key=lambda i: (not parts[i], local(i)))
        parts[best] = (*parts[best], mesh_axis)


def gradient_spec(layout: Layout, axes: Sequence[str | None], shape: Sequence[int]) -> P:
    """Where a gradient is accumulated."""
    place = state_spec if layout.zero_stage >= 2 else compute_spec
    return place(layout, axes, shape)


def reduced_once(layout: Layout, specs: Iterable[P]) -> tuple[str, ...]:
    """The mesh axes over which gradients are summed once a step, after the last microbatch.

    Those that split the batch and no accumulator: all of them at stages 0 and 1, `replica` at stages 2 and 3. A step's
    microbatches run manually over these, each device on its own rows.

    Args:
      specs: where a step's weights live while it computes; an axis that splits one of them is the compiler's.
    """
    taken = {axis for spec in specs for part in spec for axis in axis_names(part)}
    if layout.zero_stage >= 2:
        taken |= set(layout.mesh_axes("state"))
    return tuple(axis for axis in layout.mesh_axes("batch") if axis not in taken)


def sum_once(g: Array, mesh_axes: tuple[str, ...]) -> Array:
    """The gradient of code that is manual over `mesh_axes`, summed over them.

    XLA's CPU backend aborts on a bfloat16 all-reduce in a region that is manual over some mesh axes only ("Invalid
    binary instruction opcode copy"), so there it is summed in float32 and rounded once.
    """
    return jax.lax.psum(g.astype(sum_dtype(g.dtype)), mesh_axes).astype(g.dtype)


def scattered_spec(
    layout: Layout, axes: Sequence[str | None], shape: Sequence[int], spec: P, mesh_axes: Sequence[str]
) -> P:
    """Where `sum_scattered` puts the gradient of a weight that lies by `spec`: as `gradient_spec` says, as far as a sum
    over `mesh_axes` can scatter it."""
    wanted = gradient_spec(layout, axes, shape)
    scattered = [tuple(axis for axis in axis_names(part) if axis in mesh_axes) for part in wanted]
    return P(*[(*axis_names(own), *more) or None for own, more in zip(spec, scattered, strict=True)])


def sum_scattered(g: Array, spec: P, mesh_axes: Sequence[str]) -> Array:
    """The gradient of code that is manual over `mesh_axes`, summed over them, each device's part by `spec`."""
    rest = set(mesh_axes)
    for dimension, part in enumerate(spec):
        axes = tuple(axis for axis in axis_names(part) if axis in rest)
        if axes:
            g = jax.lax.psum_scatter(g, axes, scatter_dimension=dimension, tiled=True)
            rest -= set(axes)
    return jax.lax.psum(g, tuple(sorted(rest))) if rest else g


def sum_dtype(dtype: jnp.dtype | str) -> jnp.dtype:
    """The dtype in which manual code sums over devices what is meant to be summed in `dtype`."""
    return jnp.dtype("float32") if platform() == "cpu" else jnp.dtype(dtype)


def is_gathered_at_use(layout: Layout, axes: Sequence[str | None], shape: Sequence[int]) -> bool:
    """True for the weights that stage 3 gathers layer by layer."""
    return layout.zero_stage == 3 and elements_a_layer(axes, shape) >= SMALL


def elements_a_layer(axes: Sequence[str | None], shape: Sequence[int]) -> int:
    """Elements of a weight, of one layer where it is stacked."""
    return math.prod(size for name, size in zip(axes, shape, strict=True) if name != "layers")


def step_spec(layout: Layout, axes: Sequence[str | None], shape: Sequence[int]) -> P:
    """Where a weight waits for its use in a step: whole but for tensor parallelism; as at rest where stage 3 says."""
    place = state_spec if is_gathered_at_use(layout, axes, shape) else compute_spec
    return place(layout, axes, shape)


def cast_at_rest(layout: Layout | None, w: Array, axes: Sequence[str | None], dtype: jnp.dtype) -> Array:
    """A master weight in `dtype`, still spread as at rest, so that what is sent of it travels in `dtype`."""
    at_rest = w.astype(dtype)
    return at_rest if layout is None else pin(at_rest, layout, state_spec(layout, axes, w.shape))


def gather_for_step(layout: Layout | None, w: Array, axes: Sequence[str | None], dtype: jnp.dtype) -> Array:
    """A master weight as the step computes with it: cast first, then gathered."""
    at_rest = cast_at_rest(layout, w, axes, dtype)
    return at_rest if layout is None else pin(at_rest, layout, step_spec(layout, axes, w.shape))


def gather_for_use(layout: Layout | None, w: Array, axes: Sequence[str | None]) -> Array:
    """A weight whole but for tensor parallelism, just before it is multiplied with. Only stage 3 has work to do."""
    return w if layout is None else pin(w, layout, compute_spec(layout, axes, w.shape))


def reduce_gradient(layout: Layout | None, g: Array, axes: Sequence[str | None], dtype: jnp.dtype) -> Array:
    """The gradient of a weight, summed over the devices in the precision it comes in, then in the weight's `dtype`."""
    if layout is not None:
        if _is_repeated(layout, axes, g.shape):
            # First whole: else XLA has each device compute a part of what all have, and sends the parts round.
            g = pin(g, layout, compute_spec(layout, axes, g.shape))
        g = pin(g, layout, gradient_spec(layout, axes, g.shape))
    return g.astype(dtype)


def _is_repeated(layout: Layout, axes: Sequence[str | None], shape: Sequence[int]) -> bool:
    """Whether devices that see the same tokens compute the same gradient: some mesh axis splits neither."""
    split = {axis for name in ("batch", "length") for axis in layout.mesh_axes(name)}
    split |= {axis for part in compute_spec(layout, axes, shape) for axis in axis_names(part)}
    every = {axis for axis, size in layout.mesh.shape.items() if size > 1} - layout.manual - {"pipeline"}
    return elements_a_layer(axes, shape) < SMALL and not every <= split


def barrier(*trees: Any) -> tuple[Any, ...]:
    """Keeps XLA from merging a gather of the backward pass with that of the forward pass, which would keep it alive."""
    return jax.lax.optimization_barrier(trees)
