"""`jaxllm explain`: where each tensor lies under a layout, and what each collective of the compiled step is for."""

import json
import sys
from collections.abc import Sequence

from jaxllm.cli.config_file import load_config, refuse_unnamed
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError
from jaxllm.layout.virtual_devices import set_virtual_devices

EXAMPLES = """\
  jaxllm explain --config configs/quickstart.py --devices 8 --config.mesh.model=2
  jaxllm explain --config configs/quickstart.py --devices 8 --tensor 'layers.attention.*'
  jaxllm explain --config configs/quickstart.py --devices 8 --config.layout.zero_stage=3 --collectives --json

Nothing is run, and no data is read. Where there are fewer than N devices, N virtual CPU devices stand in for them."""


def _parser() -> Parser:
    parser = Parser("explain", "Tells where each tensor lies, and what each collective of a step is for.", EXAMPLES)
    parser.add_config()
    parser.add_argument("--devices", type=int, metavar="N", help="how many (default: those that are here)")
    parser.add_argument("--tensor", metavar="PATH", help="this tensor alone; a glob such as 'layers.mlp.*' will do")
    parser.add_argument("--collectives", action="store_true", help="the collectives alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """Runs the verb; `argv` is what follows it. Returns the exit code."""
    options, overrides = _parser().parse_with_overrides(argv)
    refuse_unnamed(options.config)
    if options.devices is not None and options.devices < 1:
        raise UserError(f"--devices={options.devices} must be 1 or more.")
    config = load_config(options.config, overrides)

    if options.devices:
        set_virtual_devices(options.devices)  # before JAX counts what there is
    import jax

    from jaxllm.layout.compile_check import compile_checked
    from jaxllm.plan.explain import collective_rows, matching, tensor_rows
    from jaxllm.plan.program import make_program
    from jaxllm.train.checks import check

    devices = jax.devices()
    if options.devices:
        devices = (devices if len(devices) >= options.devices else jax.devices("cpu"))[: options.devices]
    check(config, len(devices))
    program = make_program(config, devices)
    answer = {}
    if not options.collectives:
        rows = tensor_rows(program)
        answer["tensors"] = matching(rows, options.tensor) if options.tensor else rows
    if not options.tensor:
        compiled = compile_checked(
            program.lowered,
            program.layout,
            program.spec.parameters,
            allow_replication=config.layout.allow_replication,
            runs_here=False,
            warn=lambda line: print(line, file=sys.stderr),
        )
        answer["collectives"] = collective_rows(program, compiled)
    if options.json:
        print(json.dumps({name: [row._asdict() for row in rows] for name, rows in answer.items()}))
    else:
        _print(answer)
    return 0


def _print(answer: dict) -> None:
    tables = {
        "tensors": (("tensor", "axes", "computed with", "at rest", "a device", "bytes", "optimizer"), _tensor_cells),
        "collectives": (("kind", "over", "for", "of", "at", "a device", "bytes", "runs"), _collective_cells),
    }
    for number, (name, rows) in enumerate(answer.items()):
        if number:
            print()
        head, cells = tables[name]
        _print_table([head, *map(cells, rows)])


def _tensor_cells(row) -> tuple[str, ...]:
    split = lambda spec: ", ".join(f"{axis}/{over}" for axis, over in spec.items()) or "whole"  # noqa: E731
    sizes = " ".join(f"{axis}={size}" for axis, size in row.axes.items())
    rest = "" if row.at_rest is None else split(row.at_rest)
    moments = f"{row.optimizer_bytes:,}" if row.at_rest is not None else ""
    return (row.tensor, sizes, split(row.compute), rest, _shape(row.local_shape), f"{row.bytes:,}", moments)


def _collective_cells(row) -> tuple[str, ...]:
    over, axes = "+".join(row.mesh_axes), "+".join(row.logical_axes)
    return (row.kind, over, axes, row.tensor, row.line, _shape(row.shape), f"{row.bytes:,}", f"{row.runs:,}")


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
