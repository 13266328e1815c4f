"""The items of a checkpoint: which arrays are in which, under what names, and whether they are those of a run."""

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxllm.errors import UserError
from jaxllm.layout.at_rest import made_up
from jaxllm.model.actor_critic import CRITIC
from jaxllm.train.state import TrainState


def handlers(bytes_in_flight: int, commits_by: type | None = None) -> ocp.CompositeCheckpointHandler:
    """Orbax's, for the items of a checkpoint.

    Args:
      commits_by: as that of the checkpoint's place (jaxllm/train/checkpoint/places.py).
    """
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ("params", "state", "batches"):
        arrays = ocp.StandardCheckpointHandler(save_concurrent_gb=bytes_in_flight / 10**9)
        registry.add(item, ocp.args.StandardSave, arrays)
        registry.add(item, ocp.args.StandardRestore, arrays)
    for item in ("data", "run"):
        text = ocp.JsonCheckpointHandler()
        registry.add(item, ocp.args.JsonSave, text)
        registry.add(item, ocp.args.JsonRestore, text)
    options = ocp.CompositeOptions(temporary_path_class=commits_by)
    return ocp.CompositeCheckpointHandler(handler_registry=registry, composite_options=options)


def rest_of(state: TrainState) -> dict[str, Any]:
    """The train state without the parameters of the model; with a critic's, which no use of the model needs."""
    parameters = ("params", "constants", "frozen", "reference")
    rest = {name: getattr(state, name) for name in TrainState._fields if name not in parameters}
    return rest | {name: value for name, value in state.own.items() if name == CRITIC}


def paths_of(tree: Any) -> dict[str, Any]:
    """The leaves by path, names and indices joined by slashes: "optimizer/0/mu/head/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(tree: Any) -> dict[str, Any]:
    """The same leaves in dictionaries only, so that what is written does not depend on the classes of the tree."""
    nested: dict[str, Any] = {}
    for path, leaf in paths_of(tree).items():
        *folders, name = path.split("/")
        at = nested
        for folder in folders:
            at = at.setdefault(folder, {})
        at[name] = leaf
    return nested


def at_path(nested: Mapping[str, Any], path: str) -> Any:
    for name in path.split("/"):
        nested = nested[name]
    return nested


def check_same_arrays(folder: PathLike[str], item: str, abstract: Any, saved: Any, num_layers: int | None) -> None:
    """Refuses a checkpoint whose arrays have other paths, shapes or types, naming the first few.

    Args:
      num_layers: those of the model that was saved; arrays of layers may be longer (layout/at_rest.py), here and there.
    """

    def described(tree: Any, is_made_up: Callable[[Any], bool]) -> dict[str, str]:
        return {path: describe(path, leaf, is_made_up) for path, leaf in paths_of(tree).items()}

    def describe(path: str, leaf: Any, is_made_up: Callable[[Any], bool]) -> str:
        of_layers = num_layers and leaf.shape and "layers" in path.split("/")
        shape = [num_layers, *leaf.shape[1:]] if of_layers and is_made_up(leaf) else list(leaf.shape)
        return f"{shape} {jax.numpy.dtype(leaf.dtype).name}"

    def by_stages(leaf: Any) -> bool:
        stages = getattr(getattr(leaf.sharding, "mesh", None), "shape", {}).get("pipeline", 1)
        return leaf.shape[0] == made_up(num_layers, stages)

    wanted = described(abstract, by_stages)
    # Of what was saved the stages are not known. They are no more than the layers, so less than as many were added.
    found = described(saved, lambda leaf: num_layers < leaf.shape[0] < 2 * num_layers)
    differ = [path for path in (wanted | found) if wanted.get(path) != found.get(path)]
    if not differ:
        return
    lines = [
        f"  {path}: {found.get(path, 'absent')} in the checkpoint, {wanted.get(path, 'absent')} in this run"
        for path in differ[:3]
    ]
    more = [f"  and {len(differ) - 3} more"] if len(differ) > 3 else []
    what, group = ("model", "model") if item == "params" else ("optimizer", "optimizer")
    way_out = f"Use the config.{group} of that run, or another --workdir."
    raise UserError("\n".join([f"{folder} is a checkpoint of another {what}. {way_out}", *lines, *more]))
