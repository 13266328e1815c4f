"""From logical axes to mesh axes: one table a person can read, change by flag, or replace in a config.

The model says `("batch", "length", "embed")`; a `Rules` table says where each of these names is split. A name whose
mesh axes all have size 1 is not split, so one table serves every mesh.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxllm.errors import UserError, did_you_mean
from jaxllm.layout.mesh import AXES

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axis, several (outermost first), or None for "whole on every device"."""

    batch: MeshAxes = ("replica", "data", "expert")  # sequences
    length: MeshAxes = "context"  # tokens of a sequence, inside blocks
    residual_length: MeshAxes = "context"  # the same between blocks; `model` joins under sequence_parallel
    embed: MeshAxes = None  # the residual stream
    mlp: MeshAxes = "model"  # hidden units: columns of up and gate, rows of down
    heads: MeshAxes = "model"  # query heads
    kv_heads: MeshAxes = "model"  # key and value heads
    head_dim: MeshAxes = None
    vocab: MeshAxes = "model"  # rows of the embedding and of the head
    positions: MeshAxes = None  # rows of a learned position table
    experts: MeshAxes = "expert"
    layers: MeshAxes = "pipeline"
    state: MeshAxes = "data"  # no axis of a tensor: what ZeRO spreads master weights and optimizer state over

    def mesh_axes(self, logical_axis: str | None) -> tuple[str, ...]:
        """The mesh axes of one logical axis, outermost first; `()` where it is whole."""
        value = getattr(self, logical_axis) if logical_axis else None
        return (value,) if isinstance(value, str) else tuple(value or ())


LOGICAL_AXES = tuple(f.name for f in dataclasses.fields(Rules))

RULE_SETS: dict[str, Rules] = {
    # Shoeybi et al. 2019: column- and row-parallel pairs, vocabulary-parallel embedding and head.
    "megatron": Rules(),
    # No tensor parallelism: every axis but `context` splits the batch, and the state over all that split it.
    "fsdp": Rules(
        batch=("replica", "data", "expert", "model"),
        mlp=None,
        heads=None,
        kv_heads=None,
        vocab=None,
        state=("data", "model"),
    ),
    # The attention and the mlp are split, the vocabulary is whole (small vocabularies).
    "megatron_whole_vocab": Rules(vocab=None),
}


def make_rules(name: str, overrides: str | Mapping[str, MeshAxes] = "", *, sequence_parallel: bool = False) -> Rules:
    """The named rule set with `overrides` put over it.

    Args:
      name: a key of RULE_SETS.
      overrides: a mapping, or as on the command line "mlp=data,vocab=none,batch=replica+data".
      sequence_parallel: split the sequence between blocks over `model` too (Korthikanti et al. 2022).

    Raises:
      UserError: an unknown rule set, logical axis or mesh axis, or a mesh axis named twice in one row.
    """
    if name not in RULE_SETS:
        raise UserError(f"config.layout.rules={name!r} is no rule set. {did_you_mean(name, RULE_SETS)}")
    rules = RULE_SETS[name]
    if sequence_parallel and "model" not in rules.mesh_axes("batch"):
        rules = dataclasses.replace(rules, residual_length=(*rules.mesh_axes("residual_length"), "model"))
    rows = parse_overrides(overrides) if isinstance(overrides, str) else dict(overrides)
    for logical, mesh_axes in rows.items():
        _check_row(logical, mesh_axes)
    return dataclasses.replace(rules, **rows)


def parse_overrides(text: str) -> dict[str, tuple[str, ...]]:
    """Reads "mlp=data,vocab=none,batch=replica+data" into rows of a table."""
    rows = {}
    for row in filter(None, (part.strip() for part in text.split(","))):
        logical, equals, value = row.partition("=")
        if not equals or not value:
            raise UserError(
                f"config.layout.rule_overrides: '{row}' is not of the form logical_axis=mesh_axis "
                "(several joined by +, or none)."
            )
        rows[logical.strip()] = () if value.strip() == "none" else tuple(axis.strip() for axis in value.split("+"))
    return rows


def _check_row(logical: str, mesh_axes: MeshAxes) -> None:
    if logical not in LOGICAL_AXES:
        raise UserError(f"layout rule '{logical}': no such logical axis. {did_you_mean(logical, LOGICAL_AXES)}")
    named = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())
    for axis in named:
        if axis not in AXES:
            raise UserError(f"layout rule '{logical}={axis}': no such mesh axis. {did_you_mean(axis, AXES)}")
    if len(set(named)) < len(named):
        raise UserError(f"layout rule '{logical}={'+'.join(named)}' names a mesh axis twice.")


def describe(axes: Sequence[str | None]) -> str:
    """Logical axes as a person writes them: [embed, heads, head_dim]."""
    return "[" + ", ".join(axis or "-" for axis in axes) + "]"
