"""`jaxllm convert`: models between WORKDIRs and Hugging Face directories."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

from jaxllm.cli.config_file import merge, override
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError

EXAMPLES = """\
  jaxllm convert --from hf:models/Llama-3.2-1B --to runs/llama
  jaxllm convert --from hf:models/Llama-3.1-8B --to runs/llama8b --config.mesh.data=4 --config.mesh.model=2
  jaxllm convert --from runs/llama --to hf:models/mine --dtype bfloat16 --max_shard_size 2GB

A WORKDIR made of a Hugging Face directory is used like any other: generate, chat, evaluate. Train on from it in a new
one: jaxllm train --config.train.init_from=runs/llama --config.model=runs/llama …
"""
HF = "hf:"
DTYPES = ("bfloat16", "float16", "float32")


def main(argv: list[str]) -> int:
    parser = Parser("convert", "Weights, config and tokenizer, from and to Hugging Face directories.", EXAMPLES)
    parser.add_argument("--from", dest="source", metavar="DIR", help="hf:DIR, or a WORKDIR")
    parser.add_argument("--to", dest="target", metavar="DIR", help="a new WORKDIR, or hf:DIR")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights in hf:DIR; default: as they came, or float32")
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="of one file in hf:DIR: 5GB, 500MB (%(default)s)"
    )
    options, overrides = parser.parse_with_overrides(argv)
    if not options.source or not options.target:
        raise UserError("say what to convert: --from hf:DIR --to WORKDIR, or --from WORKDIR --to hf:DIR.")
    if options.source.startswith(HF) == options.target.startswith(HF):
        raise UserError(
            f"--from {options.source} --to {options.target}: one of the two is a Hugging Face directory (hf:DIR), the "
            "other a WORKDIR."
        )
    if misplaced := [name for name in overrides if not name.startswith(("mesh.", "layout."))]:
        raise UserError(
            f"--config.{misplaced[0]}={overrides[misplaced[0]]}: a conversion changes no model. "
            "Fields of config.mesh and config.layout say how it is spread over the devices."
        )
    if options.source.startswith(HF):
        _import(options, overrides)
    else:
        _export(options, overrides)
    return 0


def _import(options: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    if options.dtype:
        raise UserError(f"--dtype {options.dtype} is for --to hf:DIR; a WORKDIR keeps float32 master weights.")
    from jaxllm.train.config import read_config

    config = read_config(override(merge({}), overrides))
    from jaxllm.interop.hf.load import import_directory

    import_directory(Path(options.source.removeprefix(HF)), Path(options.target), config, _say)


def _export(options: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    from jaxllm.generate.run import read_run_config
    from jaxllm.interop.hf.export import export_run
    from jaxllm.interop.hf.files import parse_size
    from jaxllm.layout.config import MeshConfig
    from jaxllm.train.config import config_dict, read_config

    workdir, size = Path(options.source), parse_size(options.max_shard_size)
    if not (workdir / "checkpoints").is_dir() and list(workdir.glob("*.safetensors*")):
        raise UserError(f"--from {workdir} is a Hugging Face directory. Write --from hf:{workdir}.")
    stored = dataclasses.replace(read_run_config(workdir, "--from"), mesh=MeshConfig())
    config = read_config(override(merge(config_dict(stored)), overrides))
    export_run(workdir, Path(options.target.removeprefix(HF)), config, options.dtype, size, _say)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
