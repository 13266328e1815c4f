"""What rules a user wrote do to the tensors of a model: said before anything is compiled, with the tensor named."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxllm.errors import UserError
from jaxllm.layout.layout import Axes, Layout, axis_names
from jaxllm.layout.rules import describe
from jaxllm.layout.zero import compute_spec, state_spec

ACTIVATION_ROWS = ("batch", "length", "residual_length", "residual_embed")  # no parameter has these axes
PADDED = ("vocab",)  # rows are added until it divides, so its size does not matter


class _Tensor(NamedTuple):
    path: str
    axes: Axes
    shape: tuple[int, ...]

    def __str__(self) -> str:
        sizes = zip(self.axes, self.shape, strict=True)
        return f"{self.path} {describe([axis if axis in PADDED else f'{axis}={size}' for axis, size in sizes])}"


def check_rules(
    layout: Layout,
    axes: Any,
    shapes: Any,
    rows: Iterable[str],
    activations: Mapping[str, Axes] | None = None,
    source: str = "config.layout.rule_overrides",
) -> None:
    """Checks a rules table against the tensors that it is for.

    Args:
      axes, shapes: trees of the parameters: logical axes, and leaves with a `shape`.
      rows: the logical axes of the rows that the user wrote: over a named rule set, or in a table of their own.
      activations: logical axes of the activations, by name.
      source: where the user wrote them.

    Raises:
      UserError: one mesh axis used twice for a tensor; or one of `rows` that shards nothing.
    """
    tensors = list(_tensors(axes, shapes))
    for tensor in tensors:
        with_path(tensor.path, compute_spec, layout, tensor.axes, tensor.shape)
    for name, activation in (activations or {}).items():
        with_path(name, layout.spec, activation)
    for logical in rows:
        mesh_axes = layout.rules.mesh_axes(logical)
        if mesh_axes:
            row = f"{source}: '{logical}={'+'.join(mesh_axes)}' shards nothing"
            if logical in ACTIVATION_ROWS:
                having = [f"{name} {describe(a)}" for name, a in (activations or {}).items() if logical in a]
                _check_sizes(layout, logical, row, next(iter(having), f"the axis {logical}"))
            else:
                _check_row(layout, logical, row, tensors)


def with_path(path: str, place: Any, *arguments: Any) -> Any:
    """`place(*arguments)`, with the tensor's path in front of what it may complain of."""
    try:
        return place(*arguments)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _check_row(layout: Layout, logical: str, row: str, tensors: list[_Tensor]) -> None:
    concerned = tensors if logical == "state" else [tensor for tensor in tensors if logical in tensor.axes]
    if not concerned:
        known = sorted({axis for tensor in tensors for axis in tensor.axes if axis})
        raise UserError(f"{row}: no parameter of this model has the axis {logical}. Its axes are {', '.join(known)}.")
    first = concerned[0]
    _check_sizes(layout, logical, row, str(first))
    if logical == "state":
        _check_state(layout, row, concerned)
    elif logical not in PADDED and not any(_splits(layout, logical, tensor) for tensor in concerned):
        parts = layout.size(logical)
        sizes = " x ".join(f"config.mesh.{axis}={layout.mesh.shape[axis]}" for axis in layout.mesh_axes(logical))
        raise UserError(
            f"{row}: {sizes} does not divide the axis {logical} of {first}. "
            f"Make it a multiple of {parts}, or leave out the row (--config.layout.rule_overrides={logical}=none)."
        )


def _check_sizes(layout: Layout, logical: str, row: str, tensor: str) -> None:
    """Whether any of the row's mesh axes has more than one device to split `tensor` over."""
    if not layout.mesh_axes(logical):
        mesh_axes = layout.rules.mesh_axes(logical)
        sizes = " and ".join(f"config.mesh.{axis}=1" for axis in mesh_axes)
        raise UserError(
            f"{row}: {sizes}, so {tensor} stays whole. "
            f"Give --config.mesh.{mesh_axes[-1]} more devices, or leave out the row."
        )


def _check_state(layout: Layout, row: str, tensors: list[_Tensor]) -> None:
    if not layout.zero_stage:
        raise UserError(f"{row}: config.layout.zero_stage=0 keeps {tensors[0]} whole. Set it to 1, 2 or 3.")
    if all(state_spec(layout, t.axes, t.shape) == compute_spec(layout, t.axes, t.shape) for t in tensors):
        parts = math.prod(layout.mesh.shape[axis] for axis in layout.mesh_axes("state"))
        raise UserError(
            f"{row}: no dimension of {tensors[0]}, nor of any other parameter, can be split into {parts} more parts. "
            f"Name another mesh axis, or leave out the row."
        )


def _splits(layout: Layout, logical: str, tensor: _Tensor) -> bool:
    spec = compute_spec(layout, tensor.axes, tensor.shape)
    return any(axis == logical and axis_names(part) for axis, part in zip(tensor.axes, spec, strict=True))


def _tensors(axes: Any, shapes: Any, path: str = "") -> Iterator[_Tensor]:
    if isinstance(axes, Mapping):
        for name in axes:
            yield from _tensors(axes[name], shapes[name], f"{path}.{name}" if path else name)
    else:
        yield _Tensor(path, tuple(axes), tuple(shapes.shape))
