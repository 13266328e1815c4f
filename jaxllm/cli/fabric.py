"""`jaxllm fabric`: measures the collectives of each mesh axis on the devices at hand."""

import json

from jaxllm.cli import distributed
from jaxllm.cli.config_file import override
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError
from jaxllm.train.config import base_config, read_config

EXAMPLES = """\
  jaxllm fabric --config.mesh.data=4 --config.mesh.model=2 --cluster h100x8
  srun --nodes=2 --ntasks-per-node=1 jaxllm fabric --config.mesh.model=8 --config.mesh.data=2 --cluster h100x8

GB/s are those that one device sends in one direction, as in the table of clusters (jaxllm/plan/clusters.toml)."""


def main(argv: list[str]) -> int:
    parser = Parser(
        "fabric", "Measures all-reduce, all-gather, reduce-scatter and permute over each mesh axis.", EXAMPLES
    )
    parser.add_argument("--megabytes", type=float, default=64.0, metavar="MB", help="of an array (default %(default)s)")
    parser.add_argument("--cluster", metavar="NAME", help="to hold it against: a name or a file, as of jaxllm plan")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    distributed.add_flags(parser)
    options, overrides = parser.parse_with_overrides(argv)
    if not 0 < options.megabytes <= 16_384:
        raise UserError(f"--megabytes={options.megabytes:g} must be above 0 and at most 16384.")
    config = read_config(override(base_config(), overrides))
    distributed.initialize(options)
    import jax

    from jaxllm.layout.mesh import make_mesh
    from jaxllm.plan.clusters import load_cluster
    from jaxllm.plan.fabric import fabric_table, measure_fabric

    cluster = load_cluster(options.cluster) if options.cluster else None
    measured = measure_fabric(make_mesh(config.mesh), round(options.megabytes * 1e6), cluster)
    if jax.process_index():
        return 0
    if not measured:
        raise UserError("one device has no fabric. Start several, or give virtual ones (README, Launching).")
    if options.json:
        for line in measured:
            print(json.dumps({**line._asdict(), "share": line.share}))
    else:
        print(fabric_table(measured))
    return 0
