"""`jaxllm layouts`: every layout of a model on N devices, and what each costs."""

import argparse
import dataclasses
import json
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from jaxllm.cli.config_file import load_config, refuse_unnamed
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError
from jaxllm.layout.virtual_devices import set_virtual_devices
from jaxllm.train.config import Config

if TYPE_CHECKING:
    from jaxllm.plan.measure import Failure, Measurement

STAND_IN_VOCABULARY = 32_000

EXAMPLES = """\
  jaxllm layouts --config configs/gpt2_small.py --devices 8
  jaxllm layouts --config configs/llama3_8b.py --devices 64 --vary mesh,remat --illegal
  jaxllm layouts --config configs/quickstart.py --devices 4 --measure --steps 5

Fields that are not named by --vary stay as the config has them; --config.GROUP.FIELD=VALUE sets them. A layout is
given as the flags to type after `jaxllm train --config FILE.py`."""


def _parser() -> Parser:
    parser = Parser("layouts", "Lists the layouts that a model can be trained with on N devices.", EXAMPLES)
    parser.add_config()
    parser.add_argument("--devices", type=int, metavar="N", help="how many; they need not be here, but to measure")
    parser.add_argument(
        "--vary",
        default="mesh,zero_stage,sequence_parallel,schedule",
        metavar="FIELDS",
        help="what differs: mesh and fields of config.layout, joined by commas (default %(default)s)",
    )
    parser.add_argument("--illegal", action="store_true", help="also those that cannot be trained with, and why")
    parser.add_argument("--measure", action="store_true", help="time each on the devices here, or on N virtual CPUs")
    parser.add_argument("--steps", type=int, default=3, help="steps to time (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """Runs the verb; `argv` is what follows it. Returns the exit code: 1 where nothing legal was found or measured."""
    options, overrides = _parser().parse_with_overrides(argv)
    refuse_unnamed(options.config)
    if not options.devices or options.devices < 1:
        raise UserError("say on how many devices: --devices N, 1 or more.")
    if options.steps < 1:
        raise UserError(f"--steps={options.steps} must be 1 or more.")
    config = with_vocabulary(load_config(options.config, overrides), options.measure)

    from jaxllm.plan.layouts import judged_layouts, variations

    names = [name.strip() for name in options.vary.split(",") if name.strip()]
    judged = list(judged_layouts(config, options.devices, variations(config, options.devices, names)))
    legal = [layout for layout, reason in judged if reason is None]
    illegal = [(layout, reason) for layout, reason in judged if reason is not None]
    print(f"{len(legal)} legal layouts of {options.devices} devices, {len(illegal)} that are not", file=sys.stderr)
    results = _measured(legal, config, options) if options.measure else {}
    if options.json:
        print(json.dumps(_as_json(legal, illegal if options.illegal else [], results, config, options)))
    else:
        _print_measured(results, config, options) if options.measure else _print_legal(legal, config, options.devices)
        if options.illegal:
            _print_illegal(illegal, config)
    return 0 if (any(_is_timed(result) for result in results.values()) if options.measure else legal) else 1


def with_vocabulary(config: Config, measures: bool) -> Config:
    """The config with the vocabulary that it, or its tokenizer, says; for a list another one may stand in."""
    from jaxllm.data.tokenizer import load_tokenizer
    from jaxllm.data.tokenizer_training import parse_tokenizer

    if config.model.vocab_size:
        return config
    asked, size = parse_tokenizer(config.data.tokenizer), STAND_IN_VOCABULARY
    try:
        size = asked[1] if asked else load_tokenizer(config.data.tokenizer).vocab_size
    except UserError:
        told = f"config.model.vocab_size=0, and config.data.tokenizer={config.data.tokenizer} is not there"
        if measures:
            raise UserError(f"{told}. Say how many pieces: --config.model.vocab_size=32000") from None
        print(f"{told}: {size:,} pieces stand in for it", file=sys.stderr)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _measured(
    legal: list[Config], config: Config, options: argparse.Namespace
) -> "dict[Config, Measurement | Failure]":
    """The result of each layout, told on stderr as it comes."""
    from jaxllm.plan.layouts import flags
    from jaxllm.plan.measure import measure_all

    set_virtual_devices(options.devices)  # this process has touched no device so far: the memory of a GPU is all theirs
    results = {}
    for number, (layout, result) in enumerate(measure_all(legal, options.devices, options.steps), start=1):
        said = f"{result.tokens_per_second:,.0f} tokens/s" if _is_timed(result) else f"failed: {result.reason}"
        print(f"[{number}/{len(legal)}] {said}  {_written(flags(layout, config))}", file=sys.stderr, flush=True)
        results[layout] = result
    return results


def _is_timed(result: "Measurement | Failure") -> bool:
    return hasattr(result, "tokens_per_second")


def _written(flags: list[str]) -> str:
    return " ".join(flags) or "(the config as it is)"


def _print_legal(legal: list[Config], config: Config, num_devices: int) -> None:
    from jaxllm.plan.layouts import bytes_at_rest, flags

    print(f"{'bytes a device at rest':>22}  flags")
    for layout in legal:
        print(f"{bytes_at_rest(layout, num_devices):>22,}  {_written(flags(layout, config))}")


def _print_illegal(illegal: list[tuple[Config, str]], config: Config) -> None:
    """Each reason once, with how many layouts it rules out and the first of them."""
    from jaxllm.plan.layouts import flags

    by_reason: dict[str, list[Config]] = defaultdict(list)
    for layout, reason in illegal:
        by_reason[reason].append(layout)
    print("\nnot legal:")
    for reason, layouts in by_reason.items():
        print(f"{len(layouts):>6}  {reason}\n        such as {_written(flags(layouts[0], config))}")


def _print_measured(
    results: "dict[Config, Measurement | Failure]", config: Config, options: argparse.Namespace
) -> None:
    """The layouts that were timed, fastest first, then those that failed."""
    from jaxllm.plan.layouts import bytes_at_rest, flags

    timed = {layout: result for layout, result in results.items() if _is_timed(result)}
    print(f"{'tokens/s':>12} {'compiled MB':>12} {'peak MB':>10} {'at rest MB':>11} {'compile s':>10}  flags")
    for layout, result in sorted(timed.items(), key=lambda item: -item[1].tokens_per_second):
        at_rest = bytes_at_rest(layout, options.devices) / 1e6
        peak = "-" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:,.1f}"
        print(
            f"{result.tokens_per_second:>12,.0f} {result.compiled_bytes / 1e6:>12,.1f} {peak:>10} {at_rest:>11,.1f} "
            f"{result.compile_seconds:>10.1f}  {_written(flags(layout, config))}"
        )
    for layout, result in results.items():
        if not _is_timed(result):
            print(f"failed: {result.reason}\n    {_written(flags(layout, config))}")


def _as_json(legal, illegal, results, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    from jaxllm.plan.layouts import bytes_at_rest, flags

    def entry(layout: Config, **rest: Any) -> dict[str, Any]:
        return {"flags": flags(layout, config), **rest}

    listed = [
        entry(
            layout,
            bytes_at_rest=bytes_at_rest(layout, options.devices),
            **(results[layout]._asdict() if layout in results else {}),
        )
        for layout in legal
    ]
    answer = {"devices": options.devices, "legal": listed}
    return answer | ({"illegal": [entry(c, reason=reason) for c, reason in illegal]} if options.illegal else {})
