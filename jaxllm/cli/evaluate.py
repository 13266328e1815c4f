"""`jaxllm evaluate`: loss, perplexity and bits per character of files."""

import json
import sys

from jaxllm.cli import workdir
from jaxllm.cli.flags import Parser
from jaxllm.cli.generate import is_first_process
from jaxllm.errors import UserError

EXAMPLES = """\
  jaxllm evaluate --workdir runs/sanguo --input held_out.txt
  jaxllm evaluate --workdir runs/sanguo --input 'test/*.jsonl.gz' --field content --json
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        "evaluate", "Loss, perplexity and bits per character and byte of a trained model on files.", EXAMPLES
    )
    workdir.add_flags(parser)
    parser.add_argument("--input", metavar="FILES", help="files, globs or folders, joined by commas")
    parser.add_argument(
        "--source", default="", help="text, jsonl, parquet, arrayrecord, tfds:…; default: by the suffix"
    )
    parser.add_argument("--field", default="text", help="field of a record that holds the text (%(default)s)")
    parser.add_argument("--length", type=int, default=0, metavar="N", help="tokens a window; 0: as in training")
    parser.add_argument(
        "--overlap", type=int, default=0, metavar="N", help="tokens of each window that are only context; 0: half of it"
    )
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="windows at once (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options, overrides = parser.parse_with_overrides(argv)
    if not options.input and not options.source.startswith("tfds:"):
        raise UserError("say what to evaluate on: --input FILES.")
    if options.batch_size < 1:
        raise UserError(f"--batch_size={options.batch_size} must be 1 or more.")

    from jaxllm.data.sources import kind_of, open_source

    source = open_source(options.source or kind_of(options.input), options.input or "", options.field)
    texts = [document.text for document in source.documents()]
    run = workdir.open_workdir(options, overrides)
    from jaxllm.generate.score import score

    result = score(run, texts, length=options.length, overlap=options.overlap, batch_size=options.batch_size)
    if not is_first_process():
        return 0
    if options.json:
        print(json.dumps(result.as_dict() | {"step": run.step}))
        return 0
    print(f"step {run.step}: {result.documents:,} documents, {result.tokens:,} tokens predicted", file=sys.stderr)
    print(f"loss                {result.loss:.4f} nats a token")
    print(f"perplexity          {result.perplexity:.2f}")
    print(f"bits per character  {result.bits_per_character:.4f}")
    print(f"bits per byte       {result.bits_per_byte:.4f}")
    return 0
