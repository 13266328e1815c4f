"""Checkpoints of a run: WORKDIR/checkpoints/STEP, on a disk or in a bucket, written by Orbax in the background.

One is whole or not there, also after a kill in the middle of a save (train/checkpoint/places.py). It holds four items:
`params` and `state` (the rest of the train state) as arrays, `data` (the state of the data iterator) and `run` (config,
versions, metrics, hashes) as JSON; where the model itself writes what it learns from, that is in `batches`. The arrays
have one canonical form, so any layout restores what any other wrote. Whether it can be saved, and what can be restored,
all processes of a run agree on.
"""

import contextlib
import errno
import importlib.metadata
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxllm.errors import Lost, UserError
from jaxllm.layout.scope import like
from jaxllm.model.actor_critic import CRITIC, without_critic
from jaxllm.train.checkpoint.errors import first_line, hush_orbax, out_of_reach, tells_damage, write_failure
from jaxllm.train.checkpoint.files import damage_of, list_files
from jaxllm.train.checkpoint.items import at_path, check_same_arrays, handlers, nested, paths_of, rest_of
from jaxllm.train.checkpoint.places import place_of
from jaxllm.train.checkpoint.read_once import chunks_kept
from jaxllm.train.checkpoint.save import CalledOff, Save
from jaxllm.train.checkpoint.tree_hash import tree_hash
from jaxllm.train.state import Params, TrainState
from jaxllm.train.watch.roll_call import any_process

DAMAGED = ".damaged"  # suffix of one that could not be read
FORGOTTEN = ".rolled_back"  # suffix of one that the run went back behind
VERSIONED = ("jax", "flax", "optax", "orbax-checkpoint")


class SaveFailed(UserError):
    """A checkpoint could not be written, for no mistake of the run's."""


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
      directory: WORKDIR/checkpoints, a folder or an address; made where it is missing.
      keep: how many of the newest to keep.
      keep_best: how many of those with the lowest eval_loss to keep besides.
      say: takes the messages about checkpoints that were skipped.
      bytes_in_flight: how much Orbax encodes and writes at once: memory beside that of the state. It must be above a
        device's part of every array.
    """

    def __init__(
        self,
        directory: Path | str,
        keep: int = 2,
        keep_best: int = 1,
        say: Callable[[str], None] = print,
        bytes_in_flight: int = 96 * 10**9,
    ):
        self._place = place_of(Path(directory))
        self.directory, self.keep, self.keep_best, self.say = self._place.path, keep, keep_best, say
        self._handler = handlers(bytes_in_flight, self._place.commits_by)
        hush_orbax()
        self._save: Save | None = None
        self._saves = 0
        self._removal: threading.Thread | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(*[Exception] if kind else []):  # the first failure is the one to tell
            self.close()

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, ascending."""
        return self._place.steps()

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
          SaveFailed: the disk is full, not writable or fails (now, or during the save before).
        """
        self.wait()
        step = int(state.step)
        self._refuse_without_room(step, state)  # before the hashes, which read all of the state
        run = {
            "config": dict(config),
            "versions": _versions(),
            "metrics": dict(metrics),
            "parameter_hash": tree_hash(without_critic(state.own)),
            "base": dict((identities or {}).get("base", {})),
            "reference": dict((identities or {}).get("reference", {})),
            "arrays_hash": tree_hash(arrays) if arrays else "",
            "state_hash": tree_hash(rest_of(state)),
        }
        items = {
            "params": ocp.args.StandardSave(without_critic(state.own)),
            "state": ocp.args.StandardSave(nested(rest_of(state))),
            "data": ocp.args.JsonSave(dict(data)),
            "run": ocp.args.JsonSave(run),
        }
        if arrays:
            items["batches"] = ocp.args.StandardSave(arrays)
        self._start(step, items)

    def save_params(self, params: Params, config: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> str:
        """Saves parameters that were not trained here as step 0, without a train state, and waits for it.

        Args:
          base: as for `save`.

        Returns:
          The parameters' hash.

        Raises:
          SaveFailed: the disk is full or not writable.
        """
        run = {
            "config": dict(config),
            "versions": _versions(),
            "metrics": {},
            "parameter_hash": tree_hash(params),
            "base": dict(base or {}),
        }
        self._start(0, {"params": ocp.args.StandardSave(params), "run": ocp.args.JsonSave(run)})
        self.wait()
        return run["parameter_hash"]

    @property
    def save_failed(self) -> bool:
        """Whether this process knows that the save under way fails. `wait` in all processes ends it."""
        return self._save is not None and self._save.failed

    @property
    def save_under_way(self) -> bool:
        """Whether a save was started and not yet waited for."""
        return self._save is not None

    def wait(self) -> float | None:
        """Waits until the save under way is committed, then removes the checkpoints that are no longer kept.

        Returns:
          The seconds it took from its start to its commit; None where none was under way.

        Raises:
          SaveFailed: the disk is full, not writable or fails.
        """
        if self._save is None:
            return None
        save, self._save = self._save, None
        try:
            save.wait()
        except Exception as error:
            self._remove_unfinished(int(save.folder.name))
            raise self._failure(save.folder.name, error) from error
        finally:
            save.close()
        self._remove_old()
        return save.seconds

    def close(self) -> None:
        """Waits for the save and the removals under way."""
        self.wait()
        if self._removal:
            self._removal.join()

    def clean_up(self) -> None:
        """Removes what an interrupted save or removal left behind. Only for the run that writes here.

        Raises:
          UserError: nothing can be removed there.
        """
        if jax.process_index() == 0:
            try:
                self._place.clean_up()
            except OSError as error:
                raise UserError(f"{self.directory} cannot be cleaned up: {first_line(error)}.") from error
        _barrier("clean_up")

    def forget_after(self, step: int) -> None:
        """Sets aside the checkpoints of later steps, where there are earlier ones."""
        steps = self.steps()
        later = [s for s in steps if s > step]
        if len(later) < len(steps):
            self._set_aside(later, FORGOTTEN)

    def _start(self, step: int, items: Mapping[str, Any]) -> None:
        folder = self.directory / str(step)
        listed = lambda: self._list_if_possible(step)  # noqa: E731
        self._save = Save(self._handler, folder, self._saves, listed, self._place.commits_by)
        self._saves += 1
        self._save.start(items)
        if jax.process_count() == 1 and self.save_failed:
            self.wait()

    def _refuse_without_room(self, step: int, state: TrainState) -> None:
        """Raises SaveFailed where there is no room for an eighth of the bytes: moments that are zero compress well."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((state.own, rest_of(state)))) // 8
        failure: Exception | None = None
        if jax.process_index() == 0:
            try:
                self._place.make_way(step)
                if (free := self._place.free_bytes()) < needed:
                    failure = OSError(errno.ENOSPC, f"{free:,} bytes are free")
            except OSError as error:
                failure = error
        if any_process(failure is not None):
            raise self._failure(str(step), failure or CalledOff("the first process could not write there"))

    def _remove_unfinished(self, step: int) -> None:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                self._place.remove_unfinished(step)

    def _list_if_possible(self, step: int) -> None:
        with contextlib.suppress(OSError):
            list_files(self._place, step)

    def _failure(self, step: str, error: Exception) -> Exception:
        """What to raise where a save failed: an error that is none of the disk's stays what it is."""
        reason = str(error) if isinstance(error, CalledOff) else write_failure(error)
        if reason is None:
            return error
        whole: list[int] = []
        with contextlib.suppress(OSError):
            whole = self.steps()
        way_out = f"The checkpoint of step {whole[-1]} is whole: free space" if whole else "Free space"
        return SaveFailed(
            f"The checkpoint of step {step} could not be written to {self.directory}: {reason}.\n"
            f"{way_out} and run the same command again to go on."
        )

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

        def read(step: int) -> _Read:
            run = self._read_json(step, "run")
            own = self._read_arrays(run, step, "params", without_critic(abstract.own))
            rest = rest_of(abstract)
            held = self._read_arrays(run, step, "state", nested(rest))
            rest = jax.tree.unflatten(jax.tree.structure(rest), [at_path(held, path) for path in paths_of(rest)])
            batches = self._read_arrays(run, step, "batches", arrays) if arrays else {}
            hashed = [("parameters", own, "parameter_hash"), ("train state", dict(rest), "state_hash")]
            hashed += [("batches", batches, "arrays_hash")] if arrays else []
            own = own | ({CRITIC: rest.pop(CRITIC)} if CRITIC in rest else {})
            parts = {"params": like(own, abstract.params), "constants": like(own, abstract.constants)}
            parts |= {"frozen": {}, "reference": {}}
            data = self._read_json(step, "data")
            return _Read(run, hashed, Restored(step, TrainState(**parts, **rest), data, batches, run))

        return self._newest(read, self.steps(), set_aside=True)

    def restore_params(self, abstract: Params, step: int | None = None) -> tuple[int, Params, dict[str, Any]] | None:
        """(step, parameters, JSON of the run) of the newest checkpoint that can be read; changes nothing on disk.

        Args:
          step: that of this step, and no other.

        Raises:
          UserError: as `restore`.
        """

        def read(step: int) -> _Read:
            run = self._read_json(step, "run")
            params = self._read_arrays(run, step, "params", abstract)
            return _Read(run, [("parameters", params, "parameter_hash")], (step, params, run))

        return self._newest(read, self.steps() if step is None else [step], set_aside=False)

    def step_with(self, parameter_hash: str) -> int | None:
        """The step of the newest checkpoint with these parameters."""
        for step in reversed(self.steps()):
            with contextlib.suppress(OSError, ValueError, KeyError):
                if self._read_json(step, "run")["parameter_hash"] == parameter_hash:
                    return step
        return None

    def _newest(self, read: Callable[[int], "_Read"], steps: list[int], set_aside: bool) -> Any:
        """What `read` makes of the newest of these checkpoints that is whole; None where there are none."""
        for step in reversed(steps):
            found, damage = self._whole(read, step)
            if found is not None:
                if set_aside:  # only now that a good one is found: what hinders all of them is no damage
                    self._set_aside([s for s in steps if s > step], DAMAGED)
                return found.value
            earlier = [s for s in steps if s < step]
            self.say(
                f"The checkpoint of step {step} is damaged and skipped ({damage})."
                + (f" Trying the one before it, of step {earlier[-1]}." if earlier else "")
            )
        if steps:
            raise UserError(
                f"None of the {len(steps)} checkpoints in {self.directory} can be read. "
                "Start again with another --workdir, or restore the folder from a backup."
            )
        return None

    def _whole(self, read: Callable[[int], "_Read"], step: int) -> tuple["_Read | None", str]:
        """A checkpoint, or None and what is wrong with it: in all processes, where it is wrong for one."""
        folder, found = self.directory / str(step), None
        with _no_damage_told(folder):
            damage = damage_of(self._place, step) if jax.process_index() == 0 else None
            if not any_process(damage is not None):
                try:
                    found = read(step)
                except Exception as error:
                    if isinstance(error, PermissionError) or out_of_reach(error) or not tells_damage(error):
                        raise
                    damage = first_line(error)
        if any_process(damage is not None):
            return None, damage or "as another process found"
        for what, tree, name in found.hashed:
            now, then = tree_hash(tree), found.run[name]
            if now != then:
                return None, f"the {what} have the hash {now}, but {then} was taken at the save"
        return found, ""

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
        return self._handler.restore(self.directory / str(step), args=args)[item]

    def _read_arrays(self, run: dict[str, Any], step: int, item: str, abstract: Any) -> Any:
        folder = self.directory / str(step)
        metadata = self._handler.metadata(folder).item_metadata[item]
        if metadata is None:
            raise FileNotFoundError(f"{folder / item} is missing or has no metadata")
        num_layers = run["config"].get("model", {}).get("num_layers")
        check_same_arrays(folder, item, abstract, metadata.tree, num_layers)
        # Not strict: where layers were made up to a multiple of the stages (layout/at_rest.py), here or there.
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract, strict=False)})
        # By the handler itself: Orbax's checkpointer would wait here for processes that could not read their part.
        with chunks_kept():
            return self._handler.restore(folder, args=args)[item]

    def _remove_old(self) -> None:
        """Removes what is not kept, in a thread. What a storage does not let go now goes after the next save."""
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                self._remove(self._not_kept())

    def _not_kept(self) -> list[int]:
        steps = self.steps()
        kept = set(steps[-max(self.keep, 1) :])
        if self.keep_best and len(steps) > len(kept):
            by_loss = sorted(steps, key=self._eval_loss)
            kept |= {step for step in by_loss[: self.keep_best] if self._eval_loss(step) < math.inf}
        return [step for step in steps if step not in kept]

    def _remove(self, steps: list[int]) -> None:
        if not steps:
            return
        if self._removal:
            self._removal.join()
        self._removal = self._place.remove(steps)

    def _eval_loss(self, step: int) -> float:
        """That of a checkpoint, infinite where it was not measured, is not a number or cannot be read."""
        try:
            loss = self._read_json(step, "run")["metrics"].get("eval_loss", math.inf)
        except (OSError, ValueError, KeyError):
            return math.inf
        return loss if math.isfinite(loss) else math.inf

    def _set_aside(self, steps: list[int], suffix: str) -> None:
        for step in steps if jax.process_index() == 0 else []:
            self._place.set_aside(step, suffix)
        _barrier("set_aside")


class _Read(NamedTuple):
    """What was read of a checkpoint, not yet held against its hashes."""

    run: dict[str, Any]
    hashed: list[tuple[str, Any, str]]  # of what, the arrays, the name of their hash in `run`
    value: Any


@contextlib.contextmanager
def _no_damage_told(folder: PathLike[str]) -> Iterator[None]:
    """Failures to read a checkpoint that say nothing about what is in it."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"The checkpoint {folder} may not be read: {error}.") from None
    except Exception as error:
        if out_of_reach(error):
            raise Lost(f"The checkpoint {folder} cannot be read now: {first_line(error)}") from error
        raise


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jaxllm checkpoints: {name}")
