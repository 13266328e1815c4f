"""A layout in use: a mesh, a rules table and how the state lies on them. Everything that names a place asks it.

The layout in use is the only global state of jaxllm: `with use_layout(layout):` around whatever is traced. Without
one, `constrain` and its kin do nothing, and the same model code runs on one device.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxllm.config import one_of
from jaxllm.errors import UserError
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.mesh import make_mesh, platform_of
from jaxllm.layout.rules import Rules, describe, make_rules
from jaxllm.layout.scope import Axes, tensor_scope

REMAT = ("none", "selective", "full")
CONTEXT_ATTENTION = ("ring", "all_gather")


@dataclass(frozen=True)
class Layout:
    """One way to lay a model on devices. Hashable, so that compiled functions can be kept by layout."""

    mesh: Mesh
    rules: Rules
    zero_stage: int = 1
    num_microbatches: int = 1
    remat: str = "none"
    scan_layers: bool = True
    attention: str = "auto"
    context_attention: str = "ring"
    schedule: str = "1f1b"
    virtual_stages: int = 1
    stage_layers: str = ""
    reduce_dtype: str = "float32"  # of the gradients' reduction over devices
    # Mesh axes along which the code that is being traced already sees one device's part (inside `jax.shard_map`).
    manual: frozenset[str] = frozenset()

    def mesh_axes(self, logical_axis: str | None) -> tuple[str, ...]:
        """The mesh axes that really split `logical_axis`: those of size 1, or already split, are left out."""
        return tuple(
            axis for axis in self.rules.mesh_axes(logical_axis) if self.mesh.shape[axis] > 1 and axis not in self.manual
        )

    @property
    def num_stages(self) -> int:
        """Pipeline stages: the devices that layers are dealt to."""
        return self.mesh.shape["pipeline"]

    def inside(self, *mesh_axes: str) -> "Layout":
        """The same layout as code sees it that runs on one device's part along `mesh_axes`."""
        return dataclasses.replace(self, manual=self.manual | set(mesh_axes))

    @property
    def of_stage(self) -> "Layout":
        """The same layout as a stage of a pipeline sees it; without a pipeline itself."""
        return self.inside("pipeline") if self.num_stages > 1 else self

    def size(self, logical_axis: str) -> int:
        """Into how many parts `logical_axis` is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.mesh_axes(logical_axis))

    def spec(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> P:
        """Where a tensor with these logical axes lives while it is computed with.

        With `shape`, an axis that its mesh axes do not divide stays whole (kv_heads fewer than `model`, say).

        Raises:
          UserError: two of the axes are split over the same mesh axis.
        """
        parts, used = [], {}
        for position, axis in enumerate(axes):
            mesh_axes = self.mesh_axes(axis)
            if shape is not None and shape[position] % self.size(axis):
                mesh_axes = ()
            for mesh_axis in mesh_axes:
                if mesh_axis in used:
                    raise UserError(
                        f"layout rules split both '{used[mesh_axis]}' and '{axis}' of a tensor {describe(axes)} over "
                        f"mesh axis '{mesh_axis}'. Give one of them another mesh axis, or none "
                        f"(--config.layout.rule_overrides={axis}=none)."
                    )
                used[mesh_axis] = axis
            parts.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
        return P(*parts)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The sharding of an activation or a batch with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes))


def make_layout(
    mesh: MeshConfig,
    layout: LayoutConfig,
    *,
    reduce_dtype: str = "float32",
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """Reads a layout from its two config groups.

    Raises:
      UserError: a mesh that does not fit the devices, an unknown rule, or a zero_stage, remat policy or
        context_attention there is not.
    """
    if layout.zero_stage not in range(4):
        raise UserError(f"config.layout.zero_stage={layout.zero_stage} must be 0, 1, 2 or 3.")
    if layout.num_microbatches < 1:
        raise UserError(f"config.layout.num_microbatches={layout.num_microbatches} must be 1 or more.")
    one_of("config.layout.remat", layout.remat, REMAT)
    one_of("config.layout.context_attention", layout.context_attention, CONTEXT_ATTENTION)
    return Layout(
        mesh=make_mesh(mesh, devices, model_across_nodes=layout.model_across_nodes),
        rules=make_rules(layout.rules, layout.rule_overrides, sequence_parallel=layout.sequence_parallel),
        zero_stage=layout.zero_stage,
        num_microbatches=layout.num_microbatches,
        remat=layout.remat,
        scan_layers=layout.scan_layers,
        attention=layout.attention,
        context_attention=layout.context_attention,
        schedule=layout.schedule,
        virtual_stages=layout.virtual_stages,
        stage_layers=layout.stage_layers,
        reduce_dtype=reduce_dtype,
    )


_current: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: Layout | None) -> Iterator[None]:
    """Makes `layout` the one that everything traced inside is laid out by."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def current_layout() -> Layout | None:
    """The layout in use, or None on one device."""
    layout = _current.get()
    return layout if layout is not None and layout.mesh.size > 1 else None


def chosen_layout() -> Layout | None:
    """The layout in use, on one device too: what asks for its remat policy and the like."""
    return _current.get()


def platform() -> str:
    """`platform_of` the devices of the layout in use, which need not be here."""
    layout = _current.get()
    has_devices = layout is not None and isinstance(layout.mesh, Mesh)
    return platform_of(layout.mesh.devices.flat[0] if has_devices else jax.devices()[0])


def constrain(x: Array, *axes: str | None) -> Array:
    """Pins an activation, and its gradient, to where its logical axes live. A no-op on one device."""
    return reshard(x, axes, axes)


def reshard(x: Array, forward: Axes, backward: Axes) -> Array:
    """Pins an activation to where the axes `forward` live, and its gradient to where `backward` live.

    Two different answers are what sequence parallelism needs: an activation gathered over the sequence has a gradient
    that is reduce-scattered over it (g of Korthikanti et al. 2022), and the other way round.
    """
    layout = current_layout()
    if layout is None:
        return x
    with tensor_scope("", forward, backward):
        return _reshard(layout, forward, backward, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _reshard(layout: Layout, forward: Axes, backward: Axes, x: Array) -> Array:
    return pin(x, layout, layout.spec(forward, x.shape))


def _reshard_forward(layout, forward, backward, x):
    return _reshard(layout, forward, backward, x), None


def _reshard_backward(layout, forward, backward, _, gradient):
    return (pin(gradient, layout, layout.spec(backward, gradient.shape)),)


_reshard.defvjp(_reshard_forward, _reshard_backward)


def pin(x: Array, layout: Layout, spec: P) -> Array:
    """`x` with the sharding `spec`, inside a traced function."""
    if layout.manual:  # there the mesh of the context is the one whose manual axes are known
        return jax.lax.with_sharding_constraint(x, spec)
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def on_each_device(layout: Layout | None, local: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`local`, written for one device's part of its arguments, as a function of the whole: `jax.shard_map`.

    Manual over every mesh axis that is not yet, so it may be used inside another manual region (a pipeline's). Where it
    is differentiated there, give it a `custom_vjp`: JAX cannot save the residuals of a nested `shard_map`.
    """
    if layout is None:
        return local
    axes = set(layout.mesh.axis_names) - layout.manual
    mesh = {} if layout.manual else {"mesh": layout.mesh}
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False, **mesh)


def axis_names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One dimension of a PartitionSpec as a tuple of mesh axes."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def as_dtype(name: str) -> jnp.dtype:
    """The dtype of a config field such as `precision.compute`."""
    return jnp.dtype(name)
