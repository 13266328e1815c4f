"""`jaxllm tokenizer`: trains a tokenizer on text and writes it to a folder."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import rich.console
import rich.progress

from jaxllm.cli.flags import Parser
from jaxllm.data.sources import Source, open_source
from jaxllm.data.tokenizer import SentencePieceTokenizer
from jaxllm.data.tokenizer_files import CONFIG_FILE, JSON_FILE
from jaxllm.data.tokenizer_training import KINDS, SAMPLE_BYTES, train_tokenizer
from jaxllm.errors import UserError, did_you_mean
from jaxllm.remote.storage import refuse_remote

EXAMPLES = """\
  jaxllm tokenizer --input 'books/*.txt' --vocab_size 8000 --out tokenizers/books
  jaxllm tokenizer --source jsonl --input corpus.jsonl.zst --kind unigram --vocab_size 32000 --out tokenizers/corpus"""


def _parser() -> Parser:
    parser = Parser("tokenizer", "Trains a tokenizer on text and writes it to a folder.", EXAMPLES)
    parser.add_argument("--input", required=True, help="files, globs or folders, joined by commas")
    parser.add_argument("--out", required=True, help="folder to write tokenizer.model to")
    parser.add_argument("--vocab_size", type=int, default=8000, help="pieces in all (default %(default)s)")
    parser.add_argument("--kind", default="bpe", help="bpe or unigram (default %(default)s)")
    parser.add_argument(
        "--source", default="text", help="text, jsonl, json, parquet, csv, arrayrecord, tfds:name:split"
    )
    parser.add_argument("--field", default="text", help="field of a record that holds the text (default %(default)s)")
    parser.add_argument("--special_tokens", default="", help="names of further special tokens, joined by commas")
    parser.add_argument("--sample_bytes", type=int, default=SAMPLE_BYTES, help="text to learn from (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as a JSON object")
    return parser


def main(argv: list[str]) -> int:
    """Runs the verb; `argv` is what follows it. Returns the exit code.

    Raises:
      UserError: unknown flags, unreadable text, or a vocabulary that the text is too small or too rich for.
    """
    flags = _parser().parse(argv)
    if flags.kind not in KINDS:
        raise UserError(f"--kind={flags.kind} is unknown. {did_you_mean(flags.kind, KINDS)}")
    if flags.vocab_size < 1 or flags.sample_bytes < 1:
        raise UserError(f"--vocab_size={flags.vocab_size} and --sample_bytes={flags.sample_bytes} must be above 0.")
    refuse_remote(flags.out, "--out")
    if foreign := [name for name in (JSON_FILE, CONFIG_FILE) if (Path(flags.out) / name).exists()]:
        raise UserError(f"--out={flags.out} holds a Hugging Face tokenizer ({foreign[0]}). Write to another folder.")
    source = open_source(flags.source, flags.input, flags.field)
    tokenizer = _train(source, flags)
    try:
        tokenizer.save(flags.out)
    except OSError as error:
        raise UserError(f"--out={flags.out}: cannot be written: {error.strerror}.") from error
    result = {
        "path": flags.out,
        "kind": flags.kind,
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": dict(tokenizer.specials),
        "fingerprint": tokenizer.fingerprint,
    }
    print(json.dumps(result, ensure_ascii=False) if flags.json else f"{flags.out}: {tokenizer.vocab_size} pieces")
    return 0


def _train(source: Source, flags: argparse.Namespace) -> SentencePieceTokenizer:
    with rich.progress.Progress(console=rich.console.Console(file=sys.stderr)) as bar:
        task = bar.add_task("reading", total=1.0)

        def texts() -> Iterator[str]:
            for document in source.documents():
                yield document.text
                bar.update(task, completed=document.progress)
            bar.update(task, description=f"learning {flags.vocab_size:,} pieces")

        return train_tokenizer(
            texts(),
            kind=flags.kind,
            vocab_size=flags.vocab_size,
            specials=[name for name in flags.special_tokens.split(",") if name],
            sample_bytes=flags.sample_bytes,
        )
