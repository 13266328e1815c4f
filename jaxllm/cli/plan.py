"""`jaxllm plan`: whether a model fits a cluster under a layout, what it sends, and how fast it goes. Without a GPU."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.cli.config_file import load_config
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError
from jaxllm.train.config import Config

if TYPE_CHECKING:
    from jaxllm.plan.clusters import Cluster
    from jaxllm.plan.compiled import Compiled
    from jaxllm.plan.estimate import Estimate
    from jaxllm.plan.program import Program

EXAMPLES = """\
  jaxllm plan --config configs/bloom_176b.py
  jaxllm plan --config configs/llama3_8b.py --cluster h200x8 --gpus 128 --config.mesh.model=2
  jaxllm plan --config configs/llama3_8b.py --search
  jaxllm plan --config configs/bloom_176b.py --html bloom.html --json

With the extra `plan` (pip install 'jaxllm[plan]') the step is compiled for GPUs that are not here, and its memory is
XLA's own; without it virtual CPU devices stand in. --quick counts instead, and compiles nothing."""


def _parser() -> Parser:
    parser = Parser("plan", "Tells whether a run fits a cluster, what it sends, and how long it takes.", EXAMPLES)
    parser.add_argument("--config", metavar="FILE.py", help="the experiment: a Python file with get_config()")
    parser.add_argument("--cluster", default="", metavar="NAME", help="or FILE.toml (default: config.cluster)")
    parser.add_argument("--gpus", type=int, metavar="N", help="how many (default: config.cluster.gpus, or the mesh's)")
    parser.add_argument("--tokens", type=float, default=0, metavar="N", help="of the run (default: 20 a parameter)")
    parser.add_argument("--quick", action="store_true", help="count, do not compile")
    parser.add_argument("--search", action="store_true", help="rank the legal layouts that fit")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts of a search to show and to compile")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", help="write a page: memory, shardings, schedule, traffic")
    return parser


def main(argv: list[str]) -> int:
    """Runs the verb; `argv` is what follows it. Returns the exit code: 1 where nothing fits."""
    options, overrides = _parser().parse_with_overrides(argv)
    if not options.config:
        raise UserError("say which model: --config FILE.py (those that come with jaxllm are in configs/).")
    if options.top < 1:
        raise UserError(f"--top={options.top} must be 1 or more.")

    from jaxllm.plan import gpu_free

    gpu_free.prepare_environment()  # before anything imports JAX, as a config may
    config = load_config(options.config, overrides)

    from jaxllm.plan.clusters import chosen_cluster

    cluster, num_gpus = chosen_cluster(config.cluster, config.mesh, options.cluster, options.gpus)
    on = _prepare(cluster, num_gpus, options)
    from jaxllm.cli.layouts import with_vocabulary
    from jaxllm.plan.program import without_inputs

    config = without_inputs(with_vocabulary(config, measures=False))
    run = _search if options.search else _plan
    return run(config, cluster, num_gpus, options, on)


def _prepare(cluster: "Cluster", num_gpus: int, options: argparse.Namespace) -> str:
    """Sees that there are devices to compile for, and returns what they are called; "" where nothing is compiled."""
    from jaxllm.plan import gpu_free
    from jaxllm.plan.measure import virtual_devices

    reason = gpu_free.missing()
    if options.quick:
        return ""
    if not reason:
        return f"{num_gpus} x {cluster.gpu.name}"
    print(f"{reason}: virtual CPU devices stand in for the GPUs", file=sys.stderr)
    virtual_devices(num_gpus)
    return f"{num_gpus} virtual CPU devices"


def _plan(config: Config, cluster: "Cluster", num_gpus: int, options: argparse.Namespace, on: str) -> int:
    from jaxllm.plan.estimate import estimate
    from jaxllm.train.checks import check

    check(config, num_gpus)
    found = estimate(config, cluster, num_gpus, options.tokens)
    program, compiled = _compiled(config, cluster, num_gpus, on) if on else (None, None)
    if options.html:
        _write_page(options.html, config, cluster, num_gpus, found, program, compiled)
    if options.json:
        print(json.dumps(_as_json(config, cluster, num_gpus, found, program, compiled)))
    else:
        _print(config, cluster, num_gpus, found, program, compiled)
    return 0 if _fits(found, compiled) else 1


def _compiled(config: Config, cluster: "Cluster", num_gpus: int, on: str) -> "tuple[Program, Compiled]":
    import jax

    from jaxllm.plan import gpu_free
    from jaxllm.plan.compiled import compile_step
    from jaxllm.plan.program import make_program

    if "virtual" in on:
        program = make_program(config, jax.devices("cpu")[:num_gpus])
        return program, compile_step(program, on)
    with gpu_free.as_if_here(cluster):
        program = make_program(config, gpu_free.gpus(cluster, num_gpus))
        return program, compile_step(program, on)


def _fits(found: "Estimate", compiled: "Compiled | None") -> bool:
    return (compiled.memory.total if compiled else found.memory.total) <= found.usable_bytes


def _head(config: Config, cluster: "Cluster", num_gpus: int, found: "Estimate") -> str:
    from jaxllm.layout.mesh import mesh_shape

    mesh = " x ".join(f"{axis}={size}" for axis, size in mesh_shape(config.mesh, num_gpus).items() if size > 1)
    active = f" ({found.active_parameters / 1e9:,.2f} at work)" if config.model.num_experts else ""
    return (
        f"{config.train_step}: {found.parameters / 1e9:,.2f} billion parameters{active} on {num_gpus} GPUs of "
        f"{cluster.name}: {mesh or 'one GPU'}, ZeRO {config.layout.zero_stage}, "
        f"{found.tokens_a_step:,} tokens a step in {config.layout.num_microbatches} microbatches"
    )


def _print(config, cluster, num_gpus: int, found, program, compiled) -> None:
    from jaxllm.plan import report
    from jaxllm.plan.job import make_job
    from jaxllm.plan.traffic import axis_traffic, crosses_nodes
    from jaxllm.steps import STEPS

    job = make_job(config, cluster, num_gpus)
    lines = [_head(config, cluster, num_gpus, found), "", *report.memory_lines(found, compiled, cluster)]
    if compiled:
        crossing = [crosses_nodes(row, job) for row in compiled.collectives]
        lines += ["", *report.buffer_lines(compiled.buffers), "", *report.traffic_lines(compiled.collectives, crossing)]
    rows = axis_traffic(job, compiled.collectives if compiled else None)
    lines += ["", *report.axis_lines(rows), "", *report.time_lines(found, num_gpus)]
    if STEPS[config.train_step].draws:
        lines.append("The rollouts, in which the model writes, are not in it.")
    print("\n".join(lines))


def _as_json(config, cluster, num_gpus: int, found, program, compiled) -> dict[str, Any]:
    from jaxllm.layout.mesh import mesh_shape
    from jaxllm.plan.job import make_job
    from jaxllm.plan.traffic import axis_traffic, crosses_nodes

    job, rows = make_job(config, cluster, num_gpus), compiled.collectives if compiled else None
    answer = {
        "cluster": cluster.name,
        "gpus": num_gpus,
        "mesh": mesh_shape(config.mesh, num_gpus),
        "layout": dataclasses.asdict(config.layout),
        "fits": _fits(found, compiled),
        "estimate": found.as_dict(),
        "traffic": [row._asdict() for row in axis_traffic(job, rows)],
    }
    if compiled:
        listed = [{**row._asdict(), "crosses_nodes": crosses_nodes(row, job)} for row in compiled.collectives]
        answer["compiled"] = {
            "on": compiled.on,
            "seconds": compiled.seconds,
            "memory": compiled.memory._asdict(),
            "buffers": [buffer._asdict() for buffer in compiled.buffers],
            "collectives": listed,
        }
    return answer


def _write_page(file: str, config, cluster, num_gpus: int, found, program, compiled) -> None:
    from jaxllm.plan.page import page

    text = page(_head(config, cluster, num_gpus, found), config, cluster, num_gpus, found, program, compiled)
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {file}: {error.strerror}.") from None
    print(f"written: {file}", file=sys.stderr)


def _search(config: Config, cluster: "Cluster", num_gpus: int, options: argparse.Namespace, on: str) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from jaxllm.plan.layouts import flags
    from jaxllm.plan.search import search

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("layouts", total=None)
        result = search(
            config, cluster, num_gpus, lambda done, total: progress.update(task, completed=done, total=total)
        )
    fit = f"{len(result.fitting)} that fit {cluster.name} ranked by speed" if result.fitting else "none fits"
    print(f"{result.counted:,} layouts counted; {fit}", file=sys.stderr)
    if not result.fitting:
        print(_nothing_fits(result, cluster, num_gpus), file=sys.stderr)
        return 1
    rows = []
    for candidate in result.fitting[: options.top]:
        compiled = _compiled(candidate.config, cluster, num_gpus, on)[1] if on else None
        rows.append((candidate, compiled, " ".join(flags(candidate.config, config)) or "(the config as it is)"))
    if options.json:
        print(json.dumps([_search_json(*row) for row in rows]))
        return 0
    print(f"{'s a step':>9} {'tokens/s':>12} {'MFU':>6} {'counted':>10} {'compiled':>10}  flags")
    for candidate, compiled, written in rows:
        found = candidate.estimate
        said = "-" if compiled is None else f"{compiled.memory.total / 1e9:,.1f} GB"
        said += " !" if compiled and not _fits(found, compiled) else ""
        print(
            f"{found.time.total:>9.3g} {found.tokens_per_second:>12,.0f} {found.mfu:>6.1%} "
            f"{found.memory.total / 1e9:>7,.1f} GB {said:>10}  {written}"
        )
    return 0 if any(_fits(c.estimate, compiled) for c, compiled, _ in rows) else 1


def _search_json(candidate, compiled, written: str) -> dict[str, Any]:
    answer = {"flags": written, "estimate": candidate.estimate.as_dict()}
    if compiled:
        answer["compiled"] = {"seconds": compiled.seconds, "memory": compiled.memory._asdict()}
    return answer


def _nothing_fits(result, cluster: "Cluster", num_gpus: int) -> str:
    from jaxllm.plan.report import gigabytes

    if result.smallest is None:
        return "no layout is legal; `jaxllm layouts --illegal` says why each is not."
    least = result.smallest
    over = least.estimate.memory.total - least.estimate.usable_bytes
    static = least.estimate.memory.static
    more = max(2, -(-least.estimate.memory.total // least.estimate.usable_bytes)) * num_gpus
    return (
        f"no layout fits: the smallest needs {gigabytes(least.estimate.memory.total)} a GPU, {gigabytes(over)} more "
        f"than {cluster.name} has ({gigabytes(static)} of it weights, gradients and optimizer).\n"
        f"What would make it fit: about {int(more):,} GPUs, or cards with more memory."
    )
