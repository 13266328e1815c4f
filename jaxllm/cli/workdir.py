"""What the verbs that use a trained model share: --workdir, overrides, and the run that they name."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxllm.cli import distributed
from jaxllm.cli.config_file import merge, override
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError
from jaxllm.train.config import config_dict, read_config

if TYPE_CHECKING:
    from jaxllm.generate.run import Run


def add_flags(parser: Parser) -> None:
    """--workdir, and the flags of several processes."""
    parser.add_argument("--workdir", metavar="DIR", help="the run: what `jaxllm train --workdir DIR` wrote")
    distributed.add_flags(parser)


def open_workdir(options: argparse.Namespace, overrides: Mapping[str, str]) -> "Run":
    """The run of --workdir with the overrides laid over its config.

    Raises:
      UserError: no --workdir, no run there, an unknown field, or a layout that does not fit the devices.
    """
    if not options.workdir:
        raise UserError("say which run: --workdir DIR, the folder that `jaxllm train --workdir DIR` wrote.")
    distributed.initialize(options)
    import jax

    from jaxllm.generate.run import layout_for_use, open_run, read_run_config, rows_only
    from jaxllm.train.checks import check_for_use

    stored = read_run_config(options.workdir)
    usual = layout_for_use(stored, jax.device_count())
    if any(name.startswith("mesh.") for name in overrides):
        usual = dataclasses.replace(usual, mesh=rows_only(stored.mesh))
    config = read_config(override(merge(config_dict(usual)), overrides))
    check_for_use(config, jax.device_count())
    if config.mesh != rows_only(stored.mesh) and not any(name.startswith("mesh.") for name in overrides):
        shape = " ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(config.mesh).items() if size != 1)
        print(f"The run's mesh does not fit the {jax.device_count()} devices here; using {shape}.", file=sys.stderr)
    return open_run(options.workdir, config)
