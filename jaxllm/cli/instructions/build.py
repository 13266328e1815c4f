"""`jaxllm instructions --input`: builds a clean set of instructions out of files."""

import argparse
import json
import sys
from pathlib import Path

from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError

EXAMPLES = """\
  jaxllm instructions --input alpaca.json,sharegpt.jsonl.gz,faq.csv --out sets/first
  jaxllm instructions --input chats.parquet:3,gsm8k.jsonl:1 --out sets/mixed --languages en,zh --max_examples 50000

Files are jsonl, JSON, parquet, CSV, TSV or ArrayRecord, also .gz and .zst. DIR gets train.jsonl, held_out.jsonl and
report.json. These rules leave conversations out, unless --allow names them:
{rules}"""


def main(argv: list[str]) -> int:
    """Builds a set. Returns the exit code.

    Raises:
      UserError: flags that make no sense, files that cannot be read, or nothing left.
    """
    from jaxllm.data.examples import parse_fields
    from jaxllm.data.instructions.build import build
    from jaxllm.data.instructions.filters import make_rules
    from jaxllm.data.instructions.inputs import parse_inputs
    from jaxllm.data.instructions.report import examples, report, table, write_set
    from jaxllm.interop.hf.whole import whole_or_nothing

    options, overrides = _parser().parse_with_overrides(argv)
    fields = parse_fields(overrides.pop("data.fields", ""))
    _check(options, overrides)
    languages, allow = _names(options.languages), _names(options.allow)
    rules = make_rules(options.min_length, options.max_length, languages, allow)
    inputs = parse_inputs(options.input)
    how = {name: getattr(options, name) for name in ("near", "held_out", "max_examples", "seed")}
    with whole_or_nothing(Path(options.out), "--out") as folder:
        built = build(inputs, rules, fields, **how)
        lengths = {"min_length": options.min_length, "max_length": options.max_length}
        said = report(built, how | lengths | {"languages": languages, "allow": allow})
        write_set(folder, built, said)
    print("\n".join([*examples(built), *table(built, rules)]), file=sys.stderr)
    if options.json:
        print(json.dumps(said, ensure_ascii=False))
    return 0


def _parser() -> Parser:
    from jaxllm.data.instructions.filters import RULES

    examples = EXAMPLES.format(rules="\n".join(f"  {rule.name:<15} {rule.what}" for rule in RULES))
    parser = Parser("instructions --input", "Builds a clean set of instructions out of files.", examples)
    parser.add_argument(
        "--input", required=True, metavar="FILES", help="files, globs or folders, joined by commas; FILE:WEIGHT mixes"
    )
    parser.add_argument("--out", metavar="DIR", help="a new folder")
    parser.add_argument("--min_length", type=int, default=0, metavar="N", help="characters a conversation; 0: any")
    parser.add_argument("--max_length", type=int, default=0, metavar="N", help="characters a conversation; 0: any")
    parser.add_argument("--languages", default="", metavar="CODES", help="leave out others than, for example, en,zh")
    parser.add_argument("--allow", default="", metavar="RULES", help="leave nothing out by these rules")
    parser.add_argument(
        "--near",
        type=float,
        default=0.8,
        metavar="X",
        help="leave out what is so similar to another, as Jaccard index of runs of three words (%(default)s); 1: none",
    )
    parser.add_argument("--held_out", type=float, default=0.05, metavar="X", help="part of each input (%(default)s)")
    parser.add_argument("--max_examples", type=int, default=0, metavar="N", help="in both files together; 0: all")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of split, order and mixture (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as a JSON object")
    return parser


def _check(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    if not options.out:
        raise UserError("say where to write the set: --out DIR.")
    if overrides:
        raise UserError(f"--config.{next(iter(overrides))}: of the config --config.data.fields alone is of use here.")
    for name in ("min_length", "max_length", "max_examples"):
        if (value := getattr(options, name)) < 0:
            raise UserError(f"--{name}={value} must be 1 or more, or 0 for no bound.")
    if options.max_length and options.min_length > options.max_length:
        raise UserError(f"--min_length={options.min_length} is over --max_length={options.max_length}.")
    if not 0 < options.near <= 1:
        raise UserError(f"--near={options.near} must be above 0 and at most 1 (1: near duplicates stay).")
    if not 0 <= options.held_out < 1:
        raise UserError(f"--held_out={options.held_out} must be from 0 to under 1, for example 0.05.")


def _names(value: str) -> list[str]:
    return [name for name in map(str.strip, value.split(",")) if name]
