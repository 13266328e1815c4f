"""`config.train.init_from`: a fresh run that starts from the parameters of another one."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxllm.data.tokenizer import Tokenizer, load_tokenizer
from jaxllm.errors import UserError
from jaxllm.model.config import ModelConfig, differing
from jaxllm.model.spec import ModelSpec
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.config import Config, read_config
from jaxllm.train.state import Params

ORIGIN = "huggingface"  # folder of a WORKDIR: what an export needs of the directory that the model came from


def refuse_parameters_alone(stored: Mapping[str, Any], workdir: Path) -> None:
    """Refuses to go on with a checkpoint that has no train state: one that `jaxllm convert` wrote."""
    if "state_hash" not in stored:
        raise UserError(
            f"--workdir {workdir} holds imported parameters and no training run to go on with. "
            f"Give a new one, and start from these: --config.train.init_from={workdir}."
        )


def check_initial(config: Config, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """Holds the run against the one that `config.train.init_from` names, before anything is compiled.

    The models must compute the same. Only the context may be stretched: another `rope_scaling` than none, and its
    numbers; and a longer `max_length` where positions are not learned.

    Raises:
      UserError: no run there, another model (by field) or another tokenizer.
    """
    source = Path(config.train.init_from)
    stored = _newest_run(source)
    model, folder = read_config(stored["config"]).model, source / "tokenizer"
    if folder.exists() and (theirs := load_tokenizer(folder)).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"config.train.init_from={source}: its model was trained with another tokenizer than "
            f"config.data.tokenizer={config.data.tokenizer}. Set config.data.tokenizer={folder}."
        )
    vocab_size = theirs.vocab_size if folder.exists() else spec.config.vocab_size
    fields = differing(model.resolved(vocab_size), spec.config)
    stretched = spec.config.rope_scaling != "none"
    for name in [name for name in fields if stretched and name.startswith("rope_") and name != "rope_theta"]:
        del fields[name]
    if stretched:
        _check_original_length(source, model, spec.config)
    if fields:
        lines = [f"config.model.{name}: {theirs!r} there, {ours!r} here" for name, (theirs, ours) in fields.items()]
        raise UserError(
            f"config.train.init_from={source} is another model. --config.model={source} takes it as it is:\n  "
            + "\n  ".join(lines)
        )


def _check_original_length(source: Path, trained: ModelConfig, stretched: ModelConfig) -> None:
    """Positions are stretched from the context that the model was trained on: a derived one may be another."""
    lengths = dict.fromkeys((trained.max_length, trained.rope_original_length or trained.max_length))
    if stretched.rope_original_length not in lengths:
        longest = round(trained.max_length * stretched.rope_factor)
        raise UserError(
            f"config.model.rope_original_length={stretched.rope_original_length} (where it is 0: max_length / "
            f"rope_factor), but the model of config.train.init_from={source} was trained on "
            f"{' or '.join(map(str, lengths))} tokens. For rope_factor={stretched.rope_factor:g} set "
            f"config.model.max_length={longest}, or say config.model.rope_original_length={trained.max_length}."
        )


def restore_initial(source: str, abstract: Params, say: Callable[[str], None]) -> Params:
    """The parameters of the newest checkpoint of the run in `source`, placed as `abstract` says."""
    with Checkpoints(Path(source) / "checkpoints", say=say) as checkpoints:
        restored = checkpoints.restore_params(abstract)
    assert restored is not None, "check_initial found a checkpoint"
    step, params, run = restored
    say(f"parameters of {source}, step {step}, parameter hash {run['parameter_hash']}; a fresh optimizer")
    return params


def carry_origin(source: str, workdir: Path) -> None:
    """Copies what an export needs into a run that started from an imported one."""
    if source and (Path(source) / ORIGIN).is_dir() and not (workdir / ORIGIN).exists():
        shutil.copytree(Path(source) / ORIGIN, workdir / ORIGIN)


def _newest_run(source: Path) -> dict[str, Any]:
    with Checkpoints(source / "checkpoints") as checkpoints:
        stored = checkpoints.newest_run()
    if stored is None:
        hint = ""
        if (source / "config.json").is_file() and list(source.glob("*.safetensors*")):
            hint = f" Import it first: jaxllm convert --from hf:{source} --to WORKDIR."
        raise UserError(f"config.train.init_from={source}: there is no checkpoint in it.{hint}")
    return stored
