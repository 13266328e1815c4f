"""`config.train.init_from`: a fresh run that starts from the parameters of another one."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.data.tokenizer import Tokenizer, load_tokenizer
from jaxllm.data.tokenizer_training import parse_tokenizer
from jaxllm.errors import UserError, did_you_mean
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.config import ModelConfig, differing
from jaxllm.model.spec import ModelSpec
from jaxllm.remote.copy import local_copy
from jaxllm.remote.place import with_addresses
from jaxllm.train.checkpoint.checkpoints import Checkpoints
from jaxllm.train.config import Config, read_config
from jaxllm.train.state import Params

ADAPTERS = "adapters"  # folder of a WORKDIR: a run of its own for each adapter of this model
ORIGIN = "huggingface"  # folder of a WORKDIR: what an export needs of the directory that the model came from


def refuse_parameters_alone(stored: Mapping[str, Any], workdir: Path) -> None:
    """Refuses to go on with a checkpoint that has no train state: one that `jaxllm convert` wrote."""
    if "state_hash" not in stored:
        adapts = read_config(stored["config"]).adapter.kind != "none"
        flag = f"--config.adapter={workdir}" if adapts else f"--config.train.init_from={workdir}"
        raise UserError(
            f"--workdir {workdir} holds imported parameters and no training run to go on with. "
            f"Give a new one, and start from these: {flag}."
        )


def refuse_new_tokenizer(config: Config) -> None:
    """A model keeps its tokenizer: said before another one is learned."""
    theirs = local_copy(config.train.init_from) / "tokenizer"
    if theirs.is_dir() and parse_tokenizer(config.data.tokenizer) is not None:
        raise UserError(
            f"config.data.tokenizer={config.data.tokenizer} would be trained anew, but the model of "
            f"config.train.init_from={config.train.init_from} has its own. Use --config.data.tokenizer={theirs}"
        )


def check_initial(config: Config, spec: ModelSpec, tokenizer: Tokenizer, field: str = "init_from") -> None:
    """Holds the run against the one that `config.train.init_from` names, or another `field`, before a compile.

    The models must compute the same. Only the context may be stretched: another `rope_scaling` than none, and its
    numbers; and a longer `max_length` where positions are not learned.

    Raises:
      UserError: no run there, another model (by field) or another tokenizer.
    """
    source = local_copy(getattr(config.train, field))
    theirs = read_config(_newest_run(source)["config"])
    if theirs.adapter.kind != "none":
        raise UserError(
            f"config.train.{field}={source} is an adapter, not a model. Start from its base, "
            f"{theirs.train.init_from} (with --config.adapter={source} it goes on), or merge the two: "
            f"jaxllm convert --from {source} --to WORKDIR."
        )
    model, folder = theirs.model, source / "tokenizer"
    if folder.exists() and load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"config.train.{field}={source}: its model was trained with another tokenizer than "
            f"config.data.tokenizer={config.data.tokenizer}. Set config.data.tokenizer={folder}."
        )
    vocab_size = load_tokenizer(folder).vocab_size if folder.exists() else spec.config.vocab_size
    fields = differing(model.resolved(vocab_size), spec.config)
    if spec.config.scalar_head:  # it may be new
        fields.pop("scalar_head", None)
    stretched = spec.config.rope_scaling != "none"
    for name in [name for name in fields if stretched and name.startswith("rope_") and name != "rope_theta"]:
        del fields[name]
    if stretched:
        _check_original_length(field, source, model, spec.config)
    if fields:
        lines = [f"config.model.{name}: {theirs!r} there, {ours!r} here" for name, (theirs, ours) in fields.items()]
        raise UserError(
            f"config.train.{field}={source} is another model. --config.model={source} takes it as it is:\n  "
            + "\n  ".join(lines)
        )


def _check_original_length(field: str, source: Path, trained: ModelConfig, stretched: ModelConfig) -> None:
    """Positions are stretched from the context that the model was trained on: a derived one may be another."""
    lengths = dict.fromkeys((trained.max_length, trained.rope_original_length or trained.max_length))
    if not differing(trained, stretched):
        return
    if stretched.rope_original_length not in lengths:
        longest = round(trained.max_length * stretched.rope_factor)
        raise UserError(
            f"config.model.rope_original_length={stretched.rope_original_length} (where it is 0: max_length / "
            f"rope_factor), but the model of config.train.{field}={source} was trained on "
            f"{' or '.join(map(str, lengths))} tokens. For rope_factor={stretched.rope_factor:g} set "
            f"config.model.max_length={longest}, or say config.model.rope_original_length={trained.max_length}."
        )
    reach = round(stretched.rope_original_length * stretched.rope_factor)
    if reach != stretched.max_length:
        raise UserError(
            f"config.model.max_length={stretched.max_length} is not rope_original_length="
            f"{stretched.rope_original_length} x rope_factor={stretched.rope_factor:g}, which is {reach}. The model of "
            f"config.train.{field}={source} reads {trained.max_length} tokens: to stretch those, set "
            f"config.model.rope_original_length={trained.max_length} and "
            f"config.model.rope_factor={stretched.max_length / trained.max_length:g}."
        )


class Base(NamedTuple):
    """A model's parameters, and which they are."""

    params: Params
    step: int
    parameter_hash: str

    @property
    def identity(self) -> dict[str, Any]:
        """What the checkpoint of an adapter says of the model that it is for."""
        return {"step": self.step, "parameter_hash": self.parameter_hash}


def newest_identity(workdir: Path) -> dict[str, Any]:
    """The identity of the parameters of the newest checkpoint in `workdir`, as a base.

    Raises:
      UserError: there is none.
    """
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        stored = checkpoints.newest_run()
        if stored is None:
            raise UserError(f"{workdir} has no checkpoint yet.")
        parameter_hash = stored["parameter_hash"]
        step = checkpoints.step_with(parameter_hash)
        assert step is not None
        return Base({}, step, parameter_hash).identity


def restore_initial(source: str, abstract: Params, say: Callable[[str], None]) -> Base:
    """The parameters of the newest checkpoint of the run in `source`, placed as `abstract` says."""
    with Checkpoints(local_copy(source) / "checkpoints", say=say) as checkpoints:
        restored = checkpoints.restore_params(abstract)
    assert restored is not None, "check_initial found a checkpoint"
    step, params, run = restored
    say(f"parameters of {source}, step {step}, parameter hash {run['parameter_hash']}; a fresh optimizer")
    return Base(params, step, run["parameter_hash"])


def has_scalar_head(source: str) -> bool:
    """Whether the run in `source` has one, of its own."""
    config = read_config(_newest_run(local_copy(source))["config"])
    return config.model.scalar_head and config.adapter.kind == "none"


def restore_base(
    workdir: Path,
    config: Config,
    identity: Mapping[str, Any],
    abstract: Params,
    say: Callable[[str], None],
    source: str = "",
) -> Base:
    """The parameters that the run in `workdir` was trained beside, placed as `abstract` says.

    They are looked for in `source` (default `config.train.init_from`), and where an adapter lies in BASE/adapters/NAME
    also in BASE.

    Raises:
      UserError: no such run, or one that has no checkpoint with these parameters.
    """
    wanted = identity["parameter_hash"]
    places = [local_copy(source or config.train.init_from)]
    places += [workdir.absolute().parent.parent] if workdir.absolute().parent.name == ADAPTERS else []
    found = []
    for place in places:
        with Checkpoints(place / "checkpoints", say=say) as checkpoints:
            found += checkpoints.steps()
            step = checkpoints.step_with(wanted)
            if step is not None:
                restored = checkpoints.restore_params(abstract, step)
                assert restored is not None
                named = with_addresses(str(place))
                say(f"the base: {named}, step {step}, parameter hash {wanted} as when the run began")
                return Base(restored[1], step, wanted)
    where = " or ".join(map(str, places))
    has = f"only of step {', '.join(map(str, found))}, with others" if found else "there is no checkpoint at all"
    raise UserError(
        f"{workdir} was trained beside the parameters with hash {wanted} (step {identity['step']} of its base), which "
        f"are not in {where}: {has}.\nIt fits no other model. Give its base: --config.train.init_from=WORKDIR."
    )


def adapter_folder(workdir: str | Path, name: str) -> Path:
    """The folder of the adapter `name` of the run in `workdir`.

    Raises:
      UserError: there is none of that name.
    """
    folder = local_copy(workdir) / ADAPTERS / name
    if not (folder / "config.json").is_file():
        there = sorted(path.parent.name for path in (local_copy(workdir) / ADAPTERS).glob("*/config.json"))
        way_out = did_you_mean(name, there) if there else f"There are none: {Path(workdir) / ADAPTERS} is empty."
        raise UserError(f"--adapter {name}: {workdir} has no adapter of that name. {way_out}")
    return folder


def prompt_tokens(adapter: AdapterConfig, tokenizer: Tokenizer) -> list[int]:
    """The tokens that a prompt starts as, where it does as those of a text.

    Raises:
      UserError: a text without a token.
    """
    if adapter.kind != "prompt" or adapter.prompt_init != "text":
        return []
    tokens = tokenizer.encode(adapter.prompt_text)
    if not tokens:
        raise UserError(f"config.adapter.prompt_text={adapter.prompt_text!r} has no token. Write a text.")
    return tokens


def carry_origin(source: str, workdir: Path) -> None:
    """Copies what an export needs into a run that started from an imported one."""
    if source and (local_copy(source) / ORIGIN).is_dir() and not (workdir / ORIGIN).exists():
        shutil.copytree(local_copy(source) / ORIGIN, workdir / ORIGIN)


def _newest_run(source: Path) -> dict[str, Any]:
    with Checkpoints(source / "checkpoints") as checkpoints:
        stored = checkpoints.newest_run()
    if stored is None:
        hint = ""
        if (source / "config.json").is_file() and list(source.glob("*.safetensors*")):
            hint = f" Import it first: jaxllm convert --from hf:{source} --to WORKDIR."
        raise UserError(f"config.train.init_from={source}: there is no checkpoint in it.{hint}")
    return stored
