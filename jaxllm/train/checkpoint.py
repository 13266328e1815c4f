"""Checkpoints of a run: WORKDIR/checkpoints/STEP, written by Orbax in the background and committed by one rename.

A folder with a number for a name is a whole checkpoint; whatever was cut short has another name. It holds four items:
`params` and `state` (the rest of the train state) as arrays, `data` (the state of the data iterator) and `run` (config,
versions, metrics, hashes) as JSON; where the model itself writes what it learns from, that is in `batches`. The arrays
have one canonical form, so any layout restores what any other wrote.
"""

import contextlib
import importlib.metadata
import math
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxllm.errors import UserError
from jaxllm.layout.at_rest import made_up
from jaxllm.layout.scope import like
from jaxllm.model.actor_critic import CRITIC, without_critic
from jaxllm.train.checkpoint_errors import first_line, hush_orbax, tells_damage, write_failure
from jaxllm.train.state import Params, TrainState
from jaxllm.train.tree_hash import tree_hash

UNFINISHED = ".orbax-checkpoint-tmp"  # of one that Orbax is writing, or was when it was killed
REMOVED = ".removed"  # suffix of a checkpoint on its way out
DAMAGED = ".damaged"  # suffix of one that could not be read
VERSIONED = ("jax", "flax", "optax", "orbax-checkpoint")


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: TrainState  # without what it holds frozen, and without its reference
    data: dict[str, Any]  # the state of the source of the batches
    arrays: Params  # of that source
    run: dict[str, Any]  # config, versions, metrics, parameter_hash, state_hash


class Checkpoints:
    """The checkpoints of one run. Every process of the run makes one and calls it in the same order.

    Args:
      directory: WORKDIR/checkpoints; made where it is missing.
      keep: how many of the newest to keep.
      keep_best: how many of those with the lowest eval_loss to keep besides.
      say: takes the messages about checkpoints that were skipped.
      bytes_in_flight: how much Orbax encodes and writes at once: memory beside that of the state. It must be above a
        device's part of every array.
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 2,
        keep_best: int = 1,
        say: Callable[[str], None] = print,
        bytes_in_flight: int = 96 * 10**9,
    ):
        self.directory, self.keep, self.keep_best, self.say = Path(directory).absolute(), keep, keep_best, say
        handlers = ocp.CompositeCheckpointHandler(handler_registry=_handlers(bytes_in_flight))
        self._orbax = ocp.AsyncCheckpointer(handlers)
        hush_orbax()
        self._saving: int | None = None
        self._removal: threading.Thread | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(*[Exception] if kind else []):  # the first failure is the one to tell
            self.close()

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def save(
        self,
        state: TrainState,
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float],
        identities: Mapping[str, Mapping[str, Any]] | None = None,
        arrays: Params | None = None,
    ) -> None:
        """Starts a save and returns once the arrays are copied to the host; after that `state` may be donated.

        Of a run that trains an adapter this is the adapter alone.

        Args:
          identities: which parameters are held beside these, `parameter_hash` and `step` each: "base", of the model
            that an adapter is for; "reference".
          arrays: of the source of the batches.

        Waits for the save before. Older checkpoints go when a newer one is on disk, never earlier.

        Raises:
          UserError: the disk is full or not writable (now, or during the save before).
        """
        self.wait()
        step = int(state.step)
        run = {
            "config": dict(config),
            "versions": _versions(),
            "metrics": dict(metrics),
            "parameter_hash": tree_hash(without_critic(state.own)),
            "base": dict((identities or {}).get("base", {})),
            "reference": dict((identities or {}).get("reference", {})),
            "arrays_hash": tree_hash(arrays) if arrays else "",
            "state_hash": tree_hash(_rest(state)),
        }
        self._saving = step
        items = {
            "params": ocp.args.StandardSave(without_critic(state.own)),
            "state": ocp.args.StandardSave(_nested(_rest(state))),
            "data": ocp.args.JsonSave(dict(data)),
            "run": ocp.args.JsonSave(run),
        }
        if arrays:
            items["batches"] = ocp.args.StandardSave(arrays)
        args = ocp.args.Composite(**items)
        self._guard(lambda: self._orbax.save(self.directory / str(step), args=args))

    def save_params(self, params: Params, config: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> str:
        """Saves parameters that were not trained here as step 0, without a train state, and waits for it.

        Args:
          base: as for `save`.

        Returns:
          The parameters' hash.

        Raises:
          UserError: the disk is full or not writable.
        """
        run = {
            "config": dict(config),
            "versions": _versions(),
            "metrics": {},
            "parameter_hash": tree_hash(params),
            "base": dict(base or {}),
        }
        self._saving = 0
        args = ocp.args.Composite(params=ocp.args.StandardSave(params), run=ocp.args.JsonSave(run))
        self._guard(lambda: self._orbax.save(self.directory / "0", args=args))
        self.wait()
        return run["parameter_hash"]

    def wait(self) -> None:
        """Waits until the save under way is committed, then removes the checkpoints that are no longer kept.

        Raises:
          UserError: the disk is full or not writable.
        """
        self._guard(self._orbax.wait_until_finished)
        if self._saving is not None:
            self._saving = None
            self._remove_old()

    def close(self) -> None:
        """Waits for the save and the removals under way."""
        self.wait()
        if self._removal:
            self._removal.join()
        self._orbax.close()

    def clean_up(self) -> None:
        """Removes what an interrupted save or removal left behind. Only for the run that writes here."""
        if jax.process_index() == 0 and self.directory.is_dir():
            for path in [*self.directory.glob(f"*{UNFINISHED}*"), *self.directory.glob(f"*{REMOVED}")]:
                shutil.rmtree(path, ignore_errors=True)
        _barrier("clean_up")

    def newest_run(self) -> dict[str, Any] | None:
        """The JSON of the newest checkpoint where it can be read: config, versions, metrics, hashes."""
        for step in reversed(self.steps()):
            with contextlib.suppress(OSError, ValueError, KeyError):
                return self._read_json(step, "run")
        return None

    def restore(self, abstract: TrainState, arrays: Params | None = None) -> Restored | None:
        """The newest checkpoint that can be read, or None where there is none at all.

        Damaged ones that are newer are renamed, so that the run can write these steps again.

        Args:
          abstract: `jax.ShapeDtypeStruct`s with the shardings to restore into; they need not be those of the save.
          arrays: the same, of the source of the batches.

        Raises:
          UserError: none can be read, one of another model, or arrays that differ from those saved.
        """
        read = lambda step: self._restore_state(step, abstract, arrays or {})  # noqa: E731
        return self._newest(read, set_aside=True, steps=self.steps())

    def restore_params(self, abstract: Params, step: int | None = None) -> tuple[int, Params, dict[str, Any]] | None:
        """(step, parameters, JSON of the run) of the newest checkpoint that can be read; changes nothing on disk.

        Args:
          step: that of this step, and no other.

        Raises:
          UserError: as `restore`.
        """
        steps = self.steps() if step is None else [step]
        return self._newest(lambda step: self._restore_params(step, abstract), set_aside=False, steps=steps)

    def step_with(self, parameter_hash: str) -> int | None:
        """The step of the newest checkpoint with these parameters."""
        for step in reversed(self.steps()):
            with contextlib.suppress(OSError, ValueError, KeyError):
                if self._read_json(step, "run")["parameter_hash"] == parameter_hash:
                    return step
        return None

    def _newest(self, read: Callable[[int], Any], set_aside: bool, steps: list[int]) -> Any:
        """What `read` makes of the newest of these checkpoints that it can read; None where there are none."""
        for step in reversed(steps):
            try:
                found = read(step)
            except PermissionError as error:
                raise UserError(f"The checkpoint {self.directory / str(step)} may not be read: {error}.") from None
            except Exception as error:
                if not tells_damage(error):
                    raise
                earlier = [s for s in steps if s < step]
                self.say(
                    f"The checkpoint of step {step} is damaged and skipped ({first_line(error)})."
                    + (f" Trying the one before it, of step {earlier[-1]}." if earlier else "")
                )
            else:
                if set_aside:  # only now that a good one is found: what hinders all of them is no damage
                    self._set_aside([s for s in steps if s > step])
                return found
        if steps:
            raise UserError(
                f"None of the {len(steps)} checkpoints in {self.directory} can be read. "
                "Start again with another --workdir, or restore the folder from a backup."
            )
        return None

    def _restore_state(self, step: int, abstract: TrainState, arrays: Params) -> Restored:
        run = self._read_json(step, "run")
        own = self._read_arrays(run, step, "params", without_critic(abstract.own), run["parameter_hash"])
        rest = _rest(abstract)
        nested = self._read_arrays(run, step, "state", _nested(rest), None)
        rest = jax.tree.unflatten(jax.tree.structure(rest), [_at(nested, path) for path in _paths(rest)])
        self._check_hash(step, "train state", tree_hash(rest), run["state_hash"])
        own |= {CRITIC: rest.pop(CRITIC)} if CRITIC in rest else {}
        parts = {"params": like(own, abstract.params), "constants": like(own, abstract.constants)}
        parts |= {"frozen": {}, "reference": {}}
        batches = self._read_arrays(run, step, "batches", arrays, run["arrays_hash"]) if arrays else {}
        return Restored(step, TrainState(**parts, **rest), self._read_json(step, "data"), batches, run)

    def _restore_params(self, step: int, abstract: Params) -> tuple[int, Params, dict[str, Any]]:
        run = self._read_json(step, "run")
        return step, self._read_arrays(run, step, "params", abstract, run["parameter_hash"]), run

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
        return self._orbax.restore(self.directory / str(step), args=args)[item]

    def _read_arrays(self, run: dict[str, Any], step: int, item: str, abstract: Any, saved_hash: str | None) -> Any:
        folder = self.directory / str(step)
        metadata = self._orbax.metadata(folder).item_metadata[item]
        if metadata is None:
            raise FileNotFoundError(f"{folder / item} is missing or has no metadata")
        num_layers = run["config"].get("model", {}).get("num_layers")
        _check_same_arrays(folder, item, abstract, metadata.tree, num_layers)
        # Not strict: where layers were made up to a multiple of the stages (layout/at_rest.py), here or there.
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract, strict=False)})
        arrays = self._orbax.restore(folder, args=args)[item]
        if saved_hash:
            self._check_hash(step, "parameters", tree_hash(arrays), saved_hash)
        return arrays

    def _check_hash(self, step: int, what: str, found: str, saved: str) -> None:
        if found != saved:
            raise UserError(
                f"The {what} in {self.directory / str(step)} have the hash {found}, but {saved} was taken at the save: "
                "the files were changed or corrupted. Remove that folder to go on from the checkpoint before it."
            )

    def _guard(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            reason = write_failure(error)
            if reason is None:
                raise
            whole = self.steps()
            way_out = f"The checkpoint of step {whole[-1]} is whole: free space" if whole else "Free space"
            raise UserError(
                f"The checkpoint of step {self._saving} could not be written to {self.directory}: {reason}.\n"
                f"{way_out} and run the same command again to go on."
            ) from error

    def _remove_old(self) -> None:
        """Renames what is not kept, so that a number always names a whole one, and removes it in a thread."""
        steps = self.steps()
        kept = set(steps[-max(self.keep, 1) :])
        if self.keep_best and len(steps) > len(kept):
            by_loss = sorted(steps, key=self._eval_loss)
            kept |= {step for step in by_loss[: self.keep_best] if self._eval_loss(step) < math.inf}
        old = [step for step in steps if step not in kept]
        if jax.process_index() or not old:
            return
        if self._removal:
            self._removal.join()
        renamed = [(self.directory / str(step)).rename(self.directory / f"{step}{REMOVED}") for step in old]
        self._removal = threading.Thread(
            target=lambda: [shutil.rmtree(path, ignore_errors=True) for path in renamed], name="checkpoint_removal"
        )
        self._removal.start()

    def _eval_loss(self, step: int) -> float:
        """That of a checkpoint, infinite where it was not measured, is not a number or cannot be read."""
        try:
            loss = self._read_json(step, "run")["metrics"].get("eval_loss", math.inf)
        except (OSError, ValueError, KeyError):
            return math.inf
        return loss if math.isfinite(loss) else math.inf

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps if jax.process_index() == 0 else []:
            target = self.directory / f"{step}{DAMAGED}"
            shutil.rmtree(target, ignore_errors=True)
            (self.directory / str(step)).rename(target)
        _barrier("set_aside")


def _handlers(bytes_in_flight: int) -> ocp.handlers.CheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ("params", "state", "batches"):
        arrays = ocp.StandardCheckpointHandler(save_concurrent_gb=bytes_in_flight / 10**9)
        registry.add(item, ocp.args.StandardSave, arrays)
        registry.add(item, ocp.args.StandardRestore, arrays)
    for item in ("data", "run"):
        text = ocp.JsonCheckpointHandler()
        registry.add(item, ocp.args.JsonSave, text)
        registry.add(item, ocp.args.JsonRestore, text)
    return registry


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def _rest(state: TrainState) -> dict[str, Any]:
    """The train state without the parameters of the model; with a critic's, which no use of the model needs."""
    parameters = ("params", "constants", "frozen", "reference")
    rest = {name: getattr(state, name) for name in TrainState._fields if name not in parameters}
    return rest | {name: value for name, value in state.own.items() if name == CRITIC}


def _paths(tree: Any) -> dict[str, Any]:
    """The leaves by path, names and indices joined by slashes: "optimizer/0/mu/head/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nested(tree: Any) -> dict[str, Any]:
    """The same leaves in dictionaries only, so that what is written does not depend on the classes of the tree."""
    nested: dict[str, Any] = {}
    for path, leaf in _paths(tree).items():
        *folders, name = path.split("/")
        at = nested
        for folder in folders:
            at = at.setdefault(folder, {})
        at[name] = leaf
    return nested


def _at(nested: Mapping[str, Any], path: str) -> Any:
    for name in path.split("/"):
        nested = nested[name]
    return nested


def _check_same_arrays(folder: Path, item: str, abstract: Any, saved: Any, num_layers: int | None) -> None:
    """Refuses a checkpoint whose arrays have other paths, shapes or types, naming the first few.

    Args:
      num_layers: those of the model that was saved; arrays of layers may be longer (layout/at_rest.py), here and there.
    """

    def described(tree: Any, is_made_up: Callable[[Any], bool]) -> dict[str, str]:
        return {path: describe(path, leaf, is_made_up) for path, leaf in _paths(tree).items()}

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


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jaxllm checkpoints: {name}")
