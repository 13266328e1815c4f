"""What the verbs that use a trained model share: --workdir, overrides, and the run that they name."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxllm.cli import distributed
from jaxllm.cli.config_file import merge, override
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError

if TYPE_CHECKING:
    from jaxllm.generate.run import Run


def add_flags(parser: Parser) -> None:
    """--workdir, and the flags of several processes."""
    parser.add_argument("--workdir", metavar="DIR", help="the run: what `jaxllm train --workdir DIR` wrote")
    parser.add_argument("--adapter", metavar="NAME", help="with the adapter in DIR/adapters/NAME")
    distributed.add_flags(parser)


def open_workdir(options: argparse.Namespace, overrides: Mapping[str, str]) -> "Run":
    """The run of --workdir with the overrides laid over its config.

    Raises:
      UserError: no --workdir, no run or no such adapter there, an unknown field, or a layout that does not fit the
        devices.
    """
    if not options.workdir:
        raise UserError("say which run: --workdir DIR, the folder that `jaxllm train --workdir DIR` wrote.")
    distributed.initialize(options)
    from jaxllm.generate.run import config_for_use, open_run
    from jaxllm.train.initial import adapter_folder

    folder = adapter_folder(options.workdir, options.adapter) if options.adapter else options.workdir
    own_mesh = any(name.startswith("mesh.") for name in overrides)
    config = config_for_use(folder, lambda config: override(merge(config), overrides), own_mesh)
    return open_run(folder, config)
