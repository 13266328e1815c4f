"""`jaxllm instructions --inspect`: looks into files of examples, for fine-tuning or of preferences."""

import dataclasses
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from typing import TYPE_CHECKING

from jaxllm.cli.config_file import load_config, merge, override
from jaxllm.cli.flags import Parser
from jaxllm.errors import UserError
from jaxllm.remote.copy import local_copy

if TYPE_CHECKING:
    from jaxllm.data.batch import BatchKind
    from jaxllm.data.config import DataConfig
    from jaxllm.data.example_streams import ExamplePiece
    from jaxllm.data.sources import Source
    from jaxllm.data.supervision import EncodedExample
    from jaxllm.data.tokenizer import Tokenizer

EXAMPLES = """\
  jaxllm instructions --inspect chats.jsonl --workdir runs/chat
  jaxllm instructions --inspect gsm8k.jsonl --tokenizer models/llama/tokenizer --config.data.chat_template=plain \\
    --config.data.fields=instruction=question,output=answer
  jaxllm instructions --inspect chats.jsonl --config configs/sft.py:runs/base --limit 0

Each example is shown as the model sees it, special tokens by name; what is learned is coloured, or between ⟦ and ⟧.
Of a preference the chosen response is shown with its prompt, and then the rejected."""

MARKS = ("⟦", "⟧")
COLOURS = ("\033[30;42m", "\033[0m")


def main(argv: list[str]) -> int:
    """Shows examples. Returns the exit code.

    Raises:
      UserError: no tokenizer, a file that holds no examples, or one that training would refuse; with its line.
    """
    parser = Parser("instructions --inspect", "Shows examples with the tokens that are learned.", EXAMPLES)
    parser.add_argument(
        "--inspect", required=True, metavar="FILE", help="examples: files, globs or folders, joined by commas"
    )
    parser.add_argument("--source", default="", help="jsonl, parquet or arrayrecord (default: by the file's name)")
    parser.add_argument("--workdir", metavar="DIR", help="take tokenizer, chat template and config.data of this run")
    parser.add_argument("--config", metavar="FILE.py", help="take them of this experiment")
    parser.add_argument("--tokenizer", metavar="DIR", help="a tokenizer, in place of theirs")
    parser.add_argument("--limit", type=int, default=5, help="examples to show; 0 for all (default %(default)s)")
    options, overrides = parser.parse_with_overrides(argv)
    config = _data_config(options, overrides)

    from jaxllm.data import batch
    from jaxllm.data.example_streams import read_pieces
    from jaxllm.data.held_out import HeldOut
    from jaxllm.data.sources import kind_of, open_source

    tokenizer = _tokenizer(config)
    source = open_source(options.source or kind_of(options.inspect), options.inspect, config.field)
    kind = batch.PAIRS if _holds_pairs(source, config.fields) else batch.EXAMPLES
    pieces = read_pieces(source, HeldOut(), config.fields, kind, dialogues=tokenizer.chat_template is not None)
    pieces = islice(pieces, kind.examples * options.limit or None)
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for shown in _shown(pieces, kind, tokenizer, config.supervise, COLOURS if colours else MARKS):
        print(shown)
    return 0


def _holds_pairs(source: "Source", fields: str) -> bool:
    """Whether its first record is a preference."""
    from jaxllm.data.examples import MISSING, find_field, parse_fields

    names = parse_fields(fields, text=source.field)
    first = next(iter(source.records()), None)
    return (
        first is not None
        and isinstance(first.value, Mapping)
        and all(find_field(first.value, names[name]) is not MISSING for name in ("chosen", "rejected"))
    )


def _data_config(options: Namespace, overrides: Mapping[str, str]) -> "DataConfig":
    """config.data of --workdir or --config, with --tokenizer and the overrides."""
    from jaxllm.train.config import base_config, config_dict, read_config

    if options.workdir and options.config:
        raise UserError("--workdir and --config both say which tokenizer to take: give one of them.")
    if options.config:
        config = load_config(options.config, overrides).data
    elif options.workdir:
        from jaxllm.generate.run import read_run_config

        stored = config_dict(read_run_config(options.workdir))
        stored["data"] |= {"tokenizer": str(local_copy(options.workdir) / "tokenizer"), "chat_template": ""}
        config = read_config(override(merge(stored), overrides)).data
    else:
        base = base_config()
        base.data.tokenizer = ""
        config = read_config(override(base, overrides)).data
    return dataclasses.replace(config, tokenizer=options.tokenizer or config.tokenizer)


def _tokenizer(config: "DataConfig") -> "Tokenizer":
    from jaxllm.data.open_tokenizer import load_with_template
    from jaxllm.data.tokenizer_training import parse_tokenizer

    if not config.tokenizer:
        raise UserError("say by which tokenizer: --workdir DIR, --config FILE.py or --tokenizer DIR.")
    if parse_tokenizer(config.tokenizer) is not None:
        raise UserError(
            f"config.data.tokenizer={config.tokenizer} is trained when the run starts. Give the run, "
            "--workdir DIR, or a tokenizer, --tokenizer DIR."
        )
    return load_with_template(config.tokenizer, config)


def _shown(
    pieces: Iterator["ExamplePiece"],
    kind: "BatchKind",
    tokenizer: "Tokenizer",
    supervise: str,
    marks: tuple[str, str],
) -> Iterator[str]:
    from jaxllm.data.supervision import ExampleEncoder

    names = ("",) if kind.examples == 1 else (", chosen", ", rejected")
    encoder = ExampleEncoder(
        tokenizer, supervise if kind.examples == 1 else "completions", allow_silence=len(names) > 1
    )
    for name, piece in zip(cycle(names), pieces, strict=False):
        (encoded,) = encoder.encode([piece.example], [piece.origin])
        margin = f", margin {piece.margin:g}" if piece.margin else ""
        counts = f"{len(encoded.tokens):,} tokens, {encoded.num_supervised:,} of them learned"
        yield f"--- {piece.origin}{name}: {counts}{margin}"
        yield _marked(encoded, tokenizer, marks)


def _marked(encoded: "EncodedExample", tokenizer: "Tokenizer", marks: tuple[str, str]) -> str:
    """The text of the tokens, special ones by name, with `marks` around what is learned."""
    names = {token: name.encode() for name, token in tokenizer.specials.items()}
    pieces = [names.get(token) or tokenizer.token_bytes(token) for token in encoded.tokens]
    text, done = "", 0
    for start, end in encoded.supervised:
        before, learned = (b"".join(pieces[a:b]).decode("utf-8", "replace") for a, b in ((done, start), (start, end)))
        text, done = f"{text}{before}{marks[0]}{learned}{marks[1]}", end
    return text + b"".join(pieces[done:]).decode("utf-8", "replace")
