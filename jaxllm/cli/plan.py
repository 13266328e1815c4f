"""`jaxllm plan`: whether a model fits a cluster under a layout, what it sends, and how fast it goes. Without a GPU."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.cli.config_file import load_config, refuse_unnamed
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError
from jaxllm.layout.virtual_devices import set_virtual_devices
from jaxllm.train.config import Config

if TYPE_CHECKING:
    from jaxllm.plan.clusters import Cluster
    from jaxllm.plan.plan import Plan
    from jaxllm.plan.search import Search

EXAMPLES = """\
  jaxllm plan --config configs/bloom_176b.py
  jaxllm plan --config configs/llama3_8b.py --cluster h200x8 --gpus 128 --config.mesh.model=2
  jaxllm plan --config configs/llama3_8b.py --search
  jaxllm plan --config configs/bloom_176b.py --html bloom.html --json

With the extra `plan` (pip install 'jaxllm[plan]') the step is compiled for GPUs that are not here, and its memory is
XLA's own; without it virtual CPU devices stand in. --quick counts instead, and compiles nothing."""


def _parser() -> Parser:
    parser = Parser("plan", "Tells whether a run fits a cluster, what it sends, and how long it takes.", EXAMPLES)
    parser.add_config()
    parser.add_argument("--cluster", default="", metavar="NAME", help="or FILE.toml (default: config.cluster)")
    parser.add_argument("--gpus", type=int, metavar="N", help="how many (default: config.cluster.gpus, or the mesh's)")
    parser.add_argument("--tokens", type=float, default=0, metavar="N", help="of the run (default: 20 a parameter)")
    parser.add_argument("--quick", action="store_true", help="count, do not compile")
    parser.add_argument("--search", action="store_true", help="rank the legal layouts that fit")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts of a search to show and to compile")
    parser.add_argument("--json", action="store_true", help="print one JSON object, or a list of a search")
    parser.add_argument("--html", metavar="FILE", help="write a page: memory, shardings, schedule, traffic")
    return parser


def main(argv: list[str]) -> int:
    """Runs the verb; `argv` is what follows it. Returns the exit code: 1 where nothing fits."""
    options, overrides = _parser().parse_with_overrides(argv)
    refuse_unnamed(options.config)
    if options.top < 1:
        raise UserError(f"--top={options.top} must be 1 or more.")

    from jaxllm.plan import gpu_free

    gpu_free.prepare_environment()  # before anything imports JAX, as a config may
    config = load_config(options.config, overrides)

    from jaxllm.cli.layouts import with_vocabulary
    from jaxllm.plan.clusters import chosen_cluster
    from jaxllm.plan.program import without_inputs

    cluster, num_gpus = chosen_cluster(config.cluster, config.mesh, options.cluster, options.gpus)
    on = _compiles_for(num_gpus, options.quick)
    config = without_inputs(with_vocabulary(config, measures=False))
    return (_search if options.search else _plan)(config, cluster, num_gpus, on, options)


def _compiles_for(num_gpus: int, quick: bool) -> str:
    """What a step is compiled for, as `make_plan` takes it."""
    from jaxllm.plan import gpu_free

    reason = gpu_free.missing()
    if quick or not reason:
        return "counted" if quick else "gpus"
    print(f"{reason}: virtual CPU devices stand in for the GPUs", file=sys.stderr)
    set_virtual_devices(num_gpus)
    return "virtual"


def _plan(config: Config, cluster: "Cluster", num_gpus: int, on: str, options: argparse.Namespace) -> int:
    from jaxllm.plan import report
    from jaxllm.plan.plan import make_plan

    plan = make_plan(config, cluster, num_gpus, on, options.tokens)
    if options.html:
        _write_page(options.html, plan)
    print(json.dumps(plan.as_dict()) if options.json else "\n".join(report.lines(plan)))
    return 0 if plan.fits else 1


def _write_page(file: str, plan: "Plan") -> None:
    from jaxllm.plan.page import page

    try:
        Path(file).write_text(page(plan), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {file}: {error.strerror}.") from None
    print(f"written: {file}", file=sys.stderr)


def _search(config: Config, cluster: "Cluster", num_gpus: int, on: str, options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from jaxllm.plan.layouts import flags
    from jaxllm.plan.plan import make_plan
    from jaxllm.plan.search import search

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("layouts", total=None)
        tell = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
        found = search(config, cluster, num_gpus, tell)
    fit = f"{len(found.fitting)} that fit {cluster.name} ranked by speed" if found.fitting else "none fits"
    print(f"{found.counted:,} layouts counted; {fit}", file=sys.stderr)
    if not found.fitting:
        print(_nothing_fits(found, cluster, num_gpus), file=sys.stderr)
        return 1
    first = found.fitting[: options.top]
    plans = [make_plan(candidate.config, cluster, num_gpus, on, options.tokens) for candidate in first]
    written = [" ".join(flags(plan.config, config)) or "(the config as it is)" for plan in plans]
    if options.json:
        print(json.dumps([_found(plan, typed) for plan, typed in zip(plans, written, strict=True)]))
    else:
        _print_found(plans, written)
    return 0 if any(plan.fits for plan in plans) else 1


def _found(plan: "Plan", written: str) -> dict[str, Any]:
    answer = {"flags": written, "fits": plan.fits, "estimate": plan.estimate.as_dict()}
    if plan.compiled:
        answer["compiled"] = {"seconds": plan.compiled.seconds, "memory": plan.compiled.memory._asdict()}
    return answer


def _print_found(plans: "list[Plan]", written: list[str]) -> None:
    print(f"{'s a step':>9} {'tokens/s':>12} {'MFU':>6} {'counted':>10} {'compiled':>10}  flags")
    for plan, typed in zip(plans, written, strict=True):
        found = plan.estimate
        compiled = f"{plan.bytes / 1e9:,.1f} GB" if plan.compiled else "-"
        too_much = "" if plan.fits else "  (does not fit)"
        print(
            f"{found.time.total:>9.3g} {found.tokens_per_second:>12,.0f} {found.mfu:>6.1%} "
            f"{found.memory.total / 1e9:>7,.1f} GB {compiled:>10}  {typed}{too_much}"
        )


def _nothing_fits(found: "Search", cluster: "Cluster", num_gpus: int) -> str:
    from jaxllm.written import gigabytes

    if found.smallest is None:
        return "no layout is legal; `jaxllm layouts --illegal` says why each is not."
    needed = found.smallest.estimate.memory
    over = needed.total - cluster.usable_bytes
    more = max(2, -(-needed.total // cluster.usable_bytes)) * num_gpus
    return (
        f"no layout fits: the smallest needs {gigabytes(needed.total)} a GPU, {gigabytes(over)} more than "
        f"{cluster.name} has ({gigabytes(needed.static)} of it weights, gradients and optimizer).\n"
        f"What would make it fit: about {int(more):,} GPUs, or cards with more memory."
    )
