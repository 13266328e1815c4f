"""`jaxllm generate`: continues prompts with a trained model."""

import json
import sys

from jaxllm.cli import workdir
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError

EXAMPLES = """\
  jaxllm generate --workdir runs/shakespeare --prompt "To be, or" --max_new_tokens 100
  jaxllm generate --workdir runs/sanguo --prompt 却说曹操 --prompt 话说孔明 --temperature 0.8 --top_p 0.9
  jaxllm generate --workdir runs/sanguo --prompt_file prompts.txt --json > out.jsonl
  jaxllm generate --workdir runs/bert --prompt "He was born in <mask> 1962 ."
"""


def add_sampling_flags(parser: Parser, temperature: float) -> None:
    """The flags of jaxllm.generate.sampling.Sampling, and those beside it."""
    parser.add_argument("--max_new_tokens", type=int, default=200, metavar="N", help="at most so many (%(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="0 is greedy: the most probable token (%(default)s)",
    )
    parser.add_argument("--top_k", type=int, default=0, metavar="K", help="draw from the K most probable; 0: all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, metavar="P", help="draw from the fewest that together have probability P"
    )
    parser.add_argument(
        "--min_p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw from those at least P times as probable as the first",
    )
    parser.add_argument(
        "--repetition_penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: what was said already is less likely",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed draws the same text (%(default)s)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")


def main(argv: list[str]) -> int:
    parser = Parser(
        "generate", "Continues prompts, or fills the masks in them. Text goes to stdout as it is generated.", EXAMPLES
    )
    workdir.add_flags(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable: a batch")
    parser.add_argument("--prompt_file", metavar="FILE", help="one prompt a line; - is stdin")
    add_sampling_flags(parser, temperature=1.0)
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt, when all are done")
    options, overrides = parser.parse_with_overrides(argv)
    prompts = [*options.prompt, *_prompts_of(options.prompt_file)]
    if not prompts:
        raise UserError('say what to continue: --prompt "…", or --prompt_file FILE.')

    from jaxllm.generate.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    run = workdir.open_workdir(options, overrides)
    if not run.spec.config.causal:
        return _fill(run, prompts, options.json)
    from jaxllm.generate.engine import Engine

    engine, first = Engine(run), is_first_process()
    # One prompt streams; several would be mixed up, so they are printed one after the other.
    streams = len(prompts) == 1 and not options.json and first
    if streams:
        print(prompts[0], end="", flush=True)
    completions = engine.generate(
        prompts,
        options.max_new_tokens,
        sampling,
        stop=options.stop,
        seed=options.seed,
        on_text=(lambda _, text: print(text, end="", flush=True)) if streams else None,
    )
    if any(completion.finish_reason == "context" for completion in completions):
        print(f"jaxllm: stopped where the model's context of {engine.max_length} tokens is full.", file=sys.stderr)
    if first:
        _show(completions, streams, options.json)
    return 0


def _fill(run, prompts: list[str], as_json: bool) -> int:
    """Of a model that sees both sides of a token: the prompts with their masks filled."""
    from jaxllm.generate.fill import fill

    for filled in fill(run, prompts):
        if is_first_process():
            print(json.dumps(filled._asdict(), ensure_ascii=False) if as_json else filled.text)
    return 0


def is_first_process() -> bool:
    """All processes generate; one prints."""
    import jax

    return jax.process_index() == 0


def _show(completions, streamed: bool, as_json: bool) -> None:
    if streamed:
        print()
        return
    for number, completion in enumerate(completions):
        if as_json:
            print(json.dumps(completion._asdict(), ensure_ascii=False))
        else:
            print(("\n" if number else "") + completion.prompt + completion.text)


def _prompts_of(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        with open(0 if file == "-" else file, encoding="utf-8", closefd=file != "-") as lines:
            prompts = [line.rstrip("\n") for line in lines]
    except OSError as error:
        raise UserError(f"--prompt_file {file}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file {file}: not UTF-8 text (byte {error.start}).") from None
    return [prompt for prompt in prompts if prompt]
