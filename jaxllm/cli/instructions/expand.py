"""`jaxllm instructions --expand`: Self-Instruct with a model of this library."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.cli import workdir
from jaxllm.cli.flags import Parser
from jaxllm.cli.generate import add_sampling_flags
from jaxllm.errors import UserError
from jaxllm.remote.storage import refuse_remote

if TYPE_CHECKING:
    from jaxllm.data.instructions.tasks import Task
    from jaxllm.generate.self_instruct import SelfInstruct

EXAMPLES = """\
  jaxllm instructions --expand seed_tasks.jsonl --workdir runs/llama --count 1000 --out new_tasks.jsonl

A seed task is {"instruction", "instances": [{"input", "output"}]} or {"instruction", "input", "output"}. A new
task is a line {"instruction", "input", "output", "rouge_l"} as soon as it is there; the same command again goes on."""


def main(argv: list[str]) -> int:
    """Expands seed tasks. Returns the exit code.

    Raises:
      UserError: flags that make no sense, files that cannot be read or written, or a model that writes nothing new.
    """
    options, overrides = _parser().parse_with_overrides(argv)
    _check(options)

    from jaxllm.data.instructions.tasks import read_tasks, recover_tasks

    seeds, before = read_tasks(options.expand), recover_tasks(Path(options.out))
    rejected: Counter[str] = Counter()
    if len(before) < options.count:
        expansion = _open(options, overrides, seeds, before)
        _expand(expansion, options, len(before))
        rejected = expansion.rejected
    count = max(len(before), options.count)
    print(f"{options.out}: {count:,} tasks, {len(before):,} of them from before; {_by_rule(rejected)}", file=sys.stderr)
    if options.json:
        said = {"out": options.out, "tasks": count, "before": len(before), "rejected": dict(rejected)}
        print(json.dumps(said, ensure_ascii=False))
    return 0


def _parser() -> Parser:
    what = "Lets a model write new instructions, inputs and outputs after seed tasks (Self-Instruct, Wang et al. 2022)."
    parser = Parser("instructions --expand", what, EXAMPLES)
    parser.add_argument("--expand", required=True, metavar="FILE", help="seed tasks, which people wrote")
    workdir.add_flags(parser)
    parser.add_argument("--count", type=int, default=100, metavar="N", help="tasks in --out at the end (%(default)s)")
    parser.add_argument("--out", metavar="FILE.jsonl", help="goes on where it exists")
    parser.add_argument(
        "--rouge", type=float, default=0.7, metavar="X", help="leave out what is so similar, in ROUGE-L (%(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="prompts at once (%(default)s)")
    parser.add_argument(
        "--patience", type=int, default=20, metavar="N", help="give up after so many rounds without (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the counts as a JSON object")
    add_sampling_flags(parser, temperature=0.7)
    parser.set_defaults(top_p=0.5, max_new_tokens=512)
    return parser


def _check(options: argparse.Namespace) -> None:
    if not options.out or not options.out.endswith(".jsonl"):
        raise UserError(f"--out {options.out or ''}: say where to write the tasks, a file whose name ends in .jsonl.")
    refuse_remote(options.out, "--out")
    for name in ("count", "batch_size", "patience"):
        if (value := getattr(options, name)) < 1:
            raise UserError(f"--{name}={value} must be 1 or more.")
    if not 0 < options.rouge <= 1:
        raise UserError(f"--rouge={options.rouge} must be above 0 and at most 1.")


def _open(
    options: argparse.Namespace, overrides: Mapping[str, str], seeds: "Sequence[Task]", before: "Sequence[Task]"
) -> "SelfInstruct":
    from jaxllm.generate.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    run = workdir.open_workdir(options, overrides)
    import jax

    from jaxllm.generate.engine import Engine
    from jaxllm.generate.self_instruct import SelfInstruct
    from jaxllm.generate.self_instruct_writer import EngineWriter

    if jax.process_count() > 1:
        raise UserError("--expand runs in one process: start it on one machine.")
    size = options.batch_size
    writer = EngineWriter(Engine(run), sampling, options.max_new_tokens, size, stop=options.stop)
    return SelfInstruct(seeds, before, writer, rouge=options.rouge, num_prompts=size, seed=options.seed)


def _expand(expansion: "SelfInstruct", options: argparse.Namespace, count: int) -> None:
    """Writes tasks until there are --count.

    Raises:
      UserError: --patience rounds in a row gave none.
    """
    from jaxllm.data.instructions.tasks import append_task

    fruitless = 0
    while count < options.count:
        before = count
        for task, like in islice(expansion.round(), options.count - count):
            append_task(Path(options.out), task, rouge_l=round(like, 4))
            count += 1
            print(f"+ {task.instruction} (ROUGE-L {like:.2f})", file=sys.stderr)
        print(f"{count:,} of {options.count:,}; {_by_rule(expansion.rejected)}", file=sys.stderr)
        fruitless = 0 if count > before else fruitless + 1
        if fruitless == options.patience:
            raise UserError(
                f"{fruitless} rounds in a row gave no new task; {_by_rule(expansion.rejected)}. {options.out} keeps "
                f"{count:,}. Try another --seed, a higher --temperature, or a model that writes better."
            )


def _by_rule(rejected: Counter[str]) -> str:
    what = ", ".join(f"{number:,} {rule}" for rule, number in rejected.most_common())
    return f"rejected: {what or 'none'}"
