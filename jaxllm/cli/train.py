"""`jaxllm train`: reads the config, checks it against the devices, runs the loop."""

import os
from pathlib import Path

from jaxllm.cli import distributed
from jaxllm.cli.config_file import load_config, refuse_unnamed
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError
from jaxllm.remote.place import address
from jaxllm.remote.storage import check_writable, is_remote

EXAMPLES = """\
  jaxllm train --config configs/shakespeare.py --workdir runs/shakespeare
  jaxllm train --config configs/gpt2_small.py --workdir runs/gpt2 --config.data.path='corpus/*.jsonl.zst'
  jaxllm train --config configs/llama3_8b.py --workdir runs/8b --config.mesh.data=8 --config.mesh.model=4

Any field of the config can be set: --config.GROUP.FIELD=VALUE. The groups are model, adapter, mesh, layout,
precision, data, optimizer and train, and for alignment reward, dpo, rollout, ppo and grpo; --config.model=NAME lays a
preset (gpt2, llama3_8b, …). Run the same command again and the run goes on from its last checkpoint."""


def main(argv: list[str]) -> int:
    parser = Parser("train", "Trains a model, or goes on with a run that was interrupted.", EXAMPLES)
    parser.add_config()
    parser.add_argument(
        "--workdir", metavar="DIR", help="where the run lives: a folder, or gs://BUCKET/… or s3://BUCKET/…"
    )
    distributed.add_flags(parser)
    options, overrides = parser.parse_with_overrides(argv)
    refuse_unnamed(options.config, "what to train")
    if not options.workdir:
        raise UserError("say where the run lives: --workdir DIR.")
    _check_workdir(options.workdir)
    config = load_config(options.config, overrides)

    distributed.initialize(options, config.train.hang_timeout or distributed.HEARTBEAT_SECONDS)
    import jax  # after the config is read: a mistake in it is answered at once

    from jaxllm.train.checks import check

    check(config, jax.device_count())
    from jaxllm.plan.expect import expected
    from jaxllm.rollout.source import RolloutSource
    from jaxllm.steps import STEPS
    from jaxllm.train import loop
    from jaxllm.train.source import DatasetSource

    open_source = RolloutSource if STEPS[config.train_step].draws else DatasetSource
    return loop.train(config, options.workdir, open_source=open_source, expects=expected)


def _check_workdir(given: str) -> None:
    """Refuses a place that could not be made or written, hours before the first checkpoint would tell."""
    if is_remote(given, "--workdir"):
        return check_writable(address(given))
    workdir = Path(given)
    nearest = next(path for path in (workdir, *workdir.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir():
        inside = "" if nearest == workdir else f": {nearest}, on the way to it,"
        raise UserError(f"--workdir {workdir}{inside} is a file. Give a folder; it is made where it does not exist.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--workdir {workdir}: {nearest} is not writable. Give a folder that is.")
