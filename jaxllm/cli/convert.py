"""`jaxllm convert`: models and adapters between WORKDIRs, Hugging Face directories and those of PEFT."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.cli.config_file import merge, override
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError
from jaxllm.remote.copy import local_copy
from jaxllm.remote.storage import refuse_remote

if TYPE_CHECKING:
    from jaxllm.train.config import Config

EXAMPLES = """\
  jaxllm convert --from hf:models/Llama-3.2-1B --to runs/llama
  jaxllm convert --from hf:models/Llama-3.1-8B --to runs/llama8b --config.mesh.data=4 --config.mesh.model=2
  jaxllm convert --from runs/llama --to hf:models/mine --dtype bfloat16 --max_shard_size 2GB
  jaxllm convert --from peft:adapters/french --base runs/llama --to runs/llama/adapters/french
  jaxllm convert --from runs/llama/adapters/french --to peft:adapters/mine
  jaxllm convert --from runs/llama/adapters/french --to hf:models/french

A WORKDIR made of a Hugging Face directory is used like any other: generate, chat, evaluate. Train on from it in a new
one: jaxllm train --config.train.init_from=runs/llama --config.model=runs/llama …
An adapter goes out as it is (peft:DIR), or merged with its base (hf:DIR, or a new WORKDIR).
"""
HF, PEFT = "hf:", "peft:"
DTYPES = ("bfloat16", "float16", "float32")


def main(argv: list[str]) -> int:
    parser = Parser(
        "convert", "Weights, config and tokenizer, from and to directories of Hugging Face and of PEFT.", EXAMPLES
    )
    parser.add_argument("--from", dest="source", metavar="DIR", help="hf:DIR, peft:DIR, or a WORKDIR")
    parser.add_argument("--to", dest="target", metavar="DIR", help="a new WORKDIR, hf:DIR or peft:DIR")
    parser.add_argument("--base", metavar="WORKDIR", help="the model that the adapter in --from peft:DIR is for")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights in hf:DIR; default: as they came, or float32")
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="of one file in hf:DIR: 5GB, 500MB (%(default)s)"
    )
    options, overrides = parser.parse_with_overrides(argv)
    if not options.source or not options.target:
        raise UserError("say what to convert: --from hf:DIR --to WORKDIR, or --from WORKDIR --to hf:DIR.")
    convert = _CONVERSIONS.get((_form(options.source), _form(options.target)))
    if convert is None:
        raise UserError(
            f"--from {options.source} --to {options.target}: one of the two is a WORKDIR. Between directories of "
            "Hugging Face and PEFT the way is through one."
        )
    if misplaced := [name for name in overrides if not name.startswith(("mesh.", "layout."))]:
        raise UserError(
            f"--config.{misplaced[0]}={overrides[misplaced[0]]}: a conversion changes no model. "
            "Fields of config.mesh and config.layout say how it is spread over the devices."
        )
    if options.dtype and not options.target.startswith(HF):
        raise UserError(
            f"--dtype {options.dtype} is for --to hf:DIR; a WORKDIR keeps float32 master weights, and peft:DIR the "
            "adapter's."
        )
    if bool(options.base) != options.source.startswith(PEFT):
        raise UserError(
            f"--base {options.base} is for --from peft:DIR."
            if options.base
            else f"--from {options.source} is an adapter: say which model it is for, --base WORKDIR."
        )
    for place in [place for place in (options.source, options.target) if _form(place)] + [options.target]:
        refuse_remote(place.removeprefix(_form(place)), "convert:", "It reads a WORKDIR there and no more: copy it.")
    convert(options, overrides)
    return 0


def _form(place: str) -> str:
    return next((form for form in (HF, PEFT) if place.startswith(form)), "")


def _import(options: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    from jaxllm.train.config import read_config

    config = read_config(override(merge({}), overrides))
    from jaxllm.interop.hf.load import import_directory

    import_directory(Path(options.source.removeprefix(HF)), Path(options.target), config, _say)


def _export(options: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    from jaxllm.interop.hf.export import export_run
    from jaxllm.interop.hf.files import parse_size

    size = parse_size(options.max_shard_size)
    config = _source_config(options.source, overrides)
    export_run(local_copy(options.source), Path(options.target.removeprefix(HF)), config, options.dtype, size, _say)


def _merge(options: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    from jaxllm.interop.merge import merge_run

    config = _source_config(options.source, overrides)
    merge_run(local_copy(options.source), Path(options.target), config, _say)


def _import_adapter(options: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    from jaxllm.interop.peft.load import import_adapter

    config = _run_config(options.base, "--base", overrides)
    folder = Path(options.source.removeprefix(PEFT))
    import_adapter(folder, local_copy(options.base), Path(options.target), config, _say)


def _export_adapter(options: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    from jaxllm.interop.peft.export import export_adapter

    config = _source_config(options.source, overrides)
    export_adapter(local_copy(options.source), Path(options.target.removeprefix(PEFT)), config, _say)


def _source_config(source: str, overrides: Mapping[str, str]) -> "Config":
    """The config of the run that --from names."""
    workdir = local_copy(source)
    if not (workdir / "checkpoints").is_dir():
        if (workdir / "adapter_config.json").is_file():
            raise UserError(f"--from {source} is an adapter as PEFT writes them. Write --from {PEFT}{source}.")
        if list(workdir.glob("*.safetensors*")):
            raise UserError(f"--from {source} is a Hugging Face directory. Write --from {HF}{source}.")
    return _run_config(source, "--from", overrides)


def _run_config(place: str, flag: str, overrides: Mapping[str, str]) -> "Config":
    """The config of the run in `place`, on the layout that the user asks for."""
    from jaxllm.generate.run import read_run_config
    from jaxllm.layout.config import MeshConfig
    from jaxllm.train.config import config_dict, read_config

    stored = dataclasses.replace(read_run_config(place, flag), mesh=MeshConfig())
    return read_config(override(merge(config_dict(stored)), overrides))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


_CONVERSIONS: dict[tuple[str, str], Callable[[argparse.Namespace, Mapping[str, str]], None]] = {
    (HF, ""): _import,
    ("", HF): _export,
    ("", ""): _merge,
    (PEFT, ""): _import_adapter,
    ("", PEFT): _export_adapter,
}
