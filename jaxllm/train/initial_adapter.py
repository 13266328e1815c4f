"""`config.adapter.init_from`: a fresh run that goes on with the adapter of another one, or with an imported one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.errors import UserError
from jaxllm.model.actor_critic import without_critic
from jaxllm.remote.copy import local_copy
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.config import Config, read_config
from jaxllm.train.initial import Base, newest_identity
from jaxllm.train.state import Params, TrainState

# Fields of config.adapter that make no other parameters of one that is there already.
FREE = ("init_from", "base_weights", "dropout", "prompt_init", "prompt_text")


def check_initial_adapter(config: Config) -> None:
    """Holds the adapter against the one that `config.adapter.init_from` names, before anything is compiled.

    Raises:
      UserError: no run there, no adapter, another one (by field), or one for other parameters than the base's.
    """
    source = local_copy(config.adapter.init_from)
    with Checkpoints(source / "checkpoints") as checkpoints:
        stored = checkpoints.newest_run()
    if stored is None:
        raise UserError(f"config.adapter.init_from={source}: there is no checkpoint in it.")
    theirs = read_config(stored["config"]).adapter
    if theirs.kind == "none":
        raise UserError(
            f"config.adapter.init_from={source} is a whole model, not an adapter. As a base: "
            f"--config.train.init_from={source}."
        )
    there, here = dataclasses.asdict(theirs), dataclasses.asdict(config.adapter)
    names = [name for name in there if name not in FREE and there[name] != here[name]]
    if names:
        lines = [f"config.adapter.{name}: {there[name]!r} there, {here[name]!r} here" for name in names]
        raise UserError(
            f"config.adapter.init_from={source} is another adapter. --config.adapter={source} takes it as it is:\n  "
            + "\n  ".join(lines)
        )
    _check_base(stored, config, newest_identity(local_copy(config.train.init_from))["parameter_hash"])


def restore_initial_adapter(
    config: Config,
    base: Base | None,
    abstract: TrainState,
    say: Callable[[str], None],
    identity: Mapping[str, Any] | None = None,
) -> tuple[Params, dict[str, Any]]:
    """The parameters of the adapter that `config.adapter.init_from` names, placed as `abstract` says; and which.

    Args:
      base: the model that it must be for.
      identity: of the parameters wanted; default the newest.

    Raises:
      UserError: an adapter for other parameters than those of `base`, or none with these parameters any more.
    """
    source = config.adapter.init_from
    with Checkpoints(local_copy(source) / "checkpoints", say=say) as checkpoints:
        wanted = None if identity is None else checkpoints.step_with(identity["parameter_hash"])
        if identity is not None and wanted is None:
            raise UserError(
                f"the reference of this run is the adapter with parameter hash {identity['parameter_hash']} (step "
                f"{identity['step']}), which is no longer in config.adapter.init_from={source}."
            )
        restored = checkpoints.restore_params(without_critic(abstract.own), wanted)
    assert restored is not None, "check_initial_adapter found a checkpoint"
    step, params, run = restored
    if base is not None:
        _check_base(run, config, base.parameter_hash)
    say(f"adapter of {source}, step {step}, parameter hash {run['parameter_hash']}; a fresh optimizer")
    return params, {"step": step, "parameter_hash": run["parameter_hash"]}


def _check_base(run: Mapping[str, Any], config: Config, parameter_hash: str) -> None:
    wanted = run["base"]["parameter_hash"]
    if wanted != parameter_hash:
        raise UserError(
            f"config.adapter.init_from={config.adapter.init_from} is an adapter for the parameters with hash {wanted}, "
            f"and those of config.train.init_from={config.train.init_from} have {parameter_hash}. An adapter fits no "
            f"other model: --config.train.init_from={run['config']['train']['init_from']}."
        )
