"""From logical axes to mesh axes: one table a person can read, change by flag, or replace in a config.

The model says `("batch", "length", "embed")`; a `Rules` table says where each of these names is split. A name whose
mesh axes all have size 1 is not split, so one table serves every mesh.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxllm.errors import UserError, did_you_mean
from jaxllm.layout.mesh import AXES
from jaxllm.layout.named import is_named, named_value

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axis, several (outermost first), or None for "whole on every device"."""

    batch: MeshAxes = ("replica", "data", "expert")  # sequences
    length: MeshAxes = "context"  # tokens of a sequence, inside blocks
    residual_length: MeshAxes = "context"  # the same between blocks; `model` joins under sequence_parallel
    embed: MeshAxes = None  # the width of the residual stream: of activations inside blocks, and of weights
    residual_embed: MeshAxes = None  # the same of activations between blocks
    mlp: MeshAxes = "model"  # hidden units: columns of up and gate, rows of down
    heads: MeshAxes = "model"  # query heads
    kv_heads: MeshAxes = "model"  # key and value heads
    head_dim: MeshAxes = None
    vocab: MeshAxes = "model"  # rows of the embedding and of the head
    positions: MeshAxes = None  # rows of a learned position table
    experts: MeshAxes = "expert"
    rank: MeshAxes = None  # of adapters: what lies between their two matrices
    virtual: MeshAxes = None  # of adapters: virtual tokens
    encoder: MeshAxes = None  # of adapters: hidden units of what makes virtual tokens
    layers: MeshAxes = "pipeline"
    state: MeshAxes = "data"  # no axis of a tensor: what ZeRO spreads master weights and optimizer state over

    def mesh_axes(self, logical_axis: str | None) -> tuple[str, ...]:
        """The mesh axes of one logical axis, outermost first; `()` where it is whole."""
        value = getattr(self, logical_axis) if logical_axis else None
        return (value,) if isinstance(value, str) else tuple(value or ())


LOGICAL_AXES = tuple(f.name for f in dataclasses.fields(Rules))
RESIDUAL_AXES = ("batch", "residual_length", "residual_embed")  # of the activation between blocks

RULE_SETS: dict[str, Rules] = {
    # Shoeybi et al. 2019: column- and row-parallel pairs, vocabulary-parallel embedding and head.
    "megatron": Rules(),
    # The same with sequence parallelism whatever the flag says (Korthikanti et al. 2022).
    "megatron_sp": Rules(residual_length=("context", "model")),
    # "2D finalized" of GSPMD (Xu et al. 2021, section 5.1): between blocks the width is split over `model`, where
    # megatron_sp splits the sequence, so no length has to divide; at rest matrices are split two ways, heads and mlp
    # over `model`, embed over `data` (ZeRO), and zero_stage=3 makes them whole along `data` only while they are used.
    "2d": Rules(residual_embed="model"),
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
      name: a key of RULE_SETS, or FILE.py:NAME, a table of the user's own or a function that returns one.
      overrides: a mapping, or as on the command line "mlp=data,vocab=none,batch=replica+data".
      sequence_parallel: split the sequence between blocks over `model` too (Korthikanti et al. 2022).

    Raises:
      UserError: an unknown rule set, logical axis or mesh axis, a mesh axis named twice in one row, or an error in the
        user's file (file:line).
    """
    rules = _own_rules(name) if is_named(name) else RULE_SETS.get(name)
    if rules is None:
        raise UserError(
            f"config.layout.rules={name!r} is no rule set. {did_you_mean(name, RULE_SETS)} "
            "One of your own is FILE.py:NAME."
        )
    # Where `model` splits something else of the residual stream already, the sequence stays as it is.
    if sequence_parallel and not any("model" in rules.mesh_axes(axis) for axis in RESIDUAL_AXES):
        rules = dataclasses.replace(rules, residual_length=(*rules.mesh_axes("residual_length"), "model"))
    rows = parse_overrides(overrides) if isinstance(overrides, str) else dict(overrides)
    for logical, mesh_axes in rows.items():
        _check_row(logical, mesh_axes, "config.layout.rule_overrides: " if isinstance(overrides, str) else "")
    return dataclasses.replace(rules, **rows)


def _own_rules(name: str) -> Rules:
    rules = named_value("config.layout.rules", name, Rules)
    for logical in LOGICAL_AXES:
        _check_row(logical, getattr(rules, logical), f"config.layout.rules={name}: ")
    return dataclasses.replace(rules, **{logical: rules.mesh_axes(logical) for logical in LOGICAL_AXES})


def own_rows(name: str) -> tuple[str, ...]:
    """The rows of a table of the user's own that differ from the default table's; none of a named rule set."""
    rules = _own_rules(name) if is_named(name) else Rules()
    return tuple(axis for axis in LOGICAL_AXES if rules.mesh_axes(axis) != Rules().mesh_axes(axis))


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


def _check_row(logical: str, mesh_axes: MeshAxes, source: str = "") -> None:
    if logical not in LOGICAL_AXES:
        raise UserError(f"{source}layout rule '{logical}': no such logical axis. {did_you_mean(logical, LOGICAL_AXES)}")
    if not isinstance(mesh_axes, str | tuple | list | None):
        raise UserError(f"{source}layout rule '{logical}={mesh_axes!r}' must be a mesh axis, a tuple of them, or None.")
    named = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())
    for axis in named:
        if axis not in AXES:
            raise UserError(f"{source}layout rule '{logical}={axis}': no such mesh axis. {did_you_mean(axis, AXES)}")
    if len(set(named)) < len(named):
        raise UserError(f"{source}layout rule '{logical}={'+'.join(named)}' names a mesh axis twice.")


def describe(axes: Sequence[str | None]) -> str:
    """Logical axes as a person writes them: [embed, heads, head_dim]."""
    return "[" + ", ".join(axis or "-" for axis in axes) + "]"
