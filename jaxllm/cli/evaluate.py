"""`jaxllm evaluate`: loss, perplexity and bits per character of files, or accuracy on multiple-choice questions."""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from jaxllm.cli import workdir
from jaxllm.cli.flags import Parser
from jaxllm.cli.generate import is_first_process
from jaxllm.errors import UserError

if TYPE_CHECKING:
    from jaxllm.generate.choices import ChoiceScore
    from jaxllm.generate.run import Run
    from jaxllm.generate.score import Score

EXAMPLES = """\
  jaxllm evaluate --workdir runs/sanguo --input held_out.txt
  jaxllm evaluate --workdir runs/sanguo --input 'test/*.jsonl.gz,more.parquet' --field content --json
  jaxllm evaluate --workdir runs/sanguo --choices questions.jsonl

A question is a line of JSON such as {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1}, where
  the prompt may be called prompt, question, query, context or ctx,
  the choices, a list or {"text": [...], "label": [...]}, choices, options or endings,
  the answer (the text of a choice, its label, its index from 0 or its letter from A) answer, label, gold, target
  or answerKey.
acc takes the choice of the highest log-likelihood, acc_norm and acc_bytes that of the highest a character and a byte:
the three of lm-evaluation-harness.
"""
LOSS = {
    "loss": ("loss", "{:.4f}", " nats a token"),
    "perplexity": ("perplexity", "{:.2f}", ""),
    "bits_per_character": ("bits per character", "{:.4f}", ""),
    "bits_per_byte": ("bits per byte", "{:.4f}", ""),
}
CHOICES = {
    "acc": ("acc", "{:.4f}", " by log-likelihood"),
    "acc_norm": ("acc_norm", "{:.4f}", " by log-likelihood a character"),
    "acc_bytes": ("acc_bytes", "{:.4f}", " by log-likelihood a byte"),
}
Scores = Mapping[str, "Score"] | Mapping[str, "ChoiceScore"]  # by file


def main(argv: list[str]) -> int:
    parser = Parser(
        "evaluate", "Loss, perplexity and bits per character and byte on files, or accuracy on questions.", EXAMPLES
    )
    workdir.add_flags(parser)
    parser.add_argument("--input", metavar="FILES", help="files, globs or folders, joined by commas")
    parser.add_argument("--choices", metavar="FILES", help="the same, of multiple-choice questions: jsonl")
    _add_text_flags(parser)
    parser.add_argument("--delimiter", default=" ", metavar="TEXT", help="between prompt and choice (a space)")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="rows at once (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options, overrides = parser.parse_with_overrides(argv)
    given = bool(options.input) or options.source.startswith("tfds:")
    if not given and not options.choices:
        raise UserError("say what to evaluate on: --input FILES, or --choices FILES.")
    if given and options.choices:
        raise UserError("--input and --choices are two evaluations: give one of them.")
    if options.batch_size < 1:
        raise UserError(f"--batch_size={options.batch_size} must be 1 or more.")
    evaluate = _choices(options) if options.choices else _loss(options)
    run = workdir.open_workdir(options, overrides)
    scores = evaluate(run)
    if is_first_process():
        _show(scores, CHOICES if options.choices else LOSS, run.step, options.json)
    return 0


def _add_text_flags(parser: Parser) -> None:
    group = parser.add_argument_group("with --input")
    group.add_argument(
        "--source", default="", help="text, jsonl, json, parquet, csv, arrayrecord, tfds:…; or by suffix"
    )
    group.add_argument("--field", default="text", help="field of a record that holds the text (%(default)s)")
    group.add_argument("--length", type=int, default=0, metavar="N", help="tokens a window; 0: as in training")
    group.add_argument(
        "--overlap", type=int, default=0, metavar="N", help="tokens of each window that are only context; 0: half of it"
    )


def _loss(options: argparse.Namespace) -> Callable[["Run"], Scores]:
    """Reads the texts of --input, and returns what scores them, by file."""
    from jaxllm.data.sources import kind_of, open_source

    paths: dict[str, list[str]] = {}
    for path in filter(str.strip, (options.input or "").split(",")) if options.input else [""]:
        paths.setdefault(options.source or kind_of(path.strip()), []).append(path)
    sources = [open_source(kind, ",".join(of_kind), options.field) for kind, of_kind in paths.items()]
    texts: dict[str, list[str]] = {}
    for document in itertools.chain.from_iterable(source.documents() for source in sources):
        texts.setdefault(document.file, []).append(document.text)

    def evaluate(run: "Run") -> Scores:
        from jaxllm.generate.score import score_each

        how = {"length": options.length, "overlap": options.overlap, "batch_size": options.batch_size}
        return dict(zip(texts, score_each(run, list(texts.values()), **how), strict=True))

    return evaluate


def _choices(options: argparse.Namespace) -> Callable[["Run"], Scores]:
    """Reads the questions of --choices, and returns what scores them, by file."""
    from jaxllm.data.choices import read_questions

    questions = read_questions(options.choices)

    def evaluate(run: "Run") -> Scores:
        from jaxllm.generate.choices import answer
        from jaxllm.generate.likelihood import Scorer

        scores: dict[str, ChoiceScore] = {}
        answers = answer(Scorer(run, options.batch_size), questions, delimiter=options.delimiter)
        for question, score in zip(questions, answers, strict=True):
            scores[question.file] = scores[question.file] + score if question.file in scores else score
        return scores

    return evaluate


def _show(scores: Scores, figures: Mapping[str, tuple[str, str, str]], step: int, as_json: bool) -> None:
    """One JSON object, or the figures of one file line by line, or a line a file and the total."""
    first, *rest = scores.values()
    total = sum(rest, first)
    if as_json:
        files = {"files": {file: score.as_dict() for file, score in scores.items()}} if rest else {}
        print(json.dumps(total.as_dict() | {"step": step} | files, ensure_ascii=False))
        return
    print(f"step {step}: {total}", file=sys.stderr)
    values = lambda score: [form.format(getattr(score, name)) for name, (_, form, _) in figures.items()]  # noqa: E731
    if not rest:
        for value, (title, _, unit) in zip(values(total), figures.values(), strict=True):
            print(f"{title:<18}  {value}{unit}")
        return
    rows = [["", *(title for title, _, _ in figures.values())]]
    rows += [[file, *values(score)] for file, score in [*scores.items(), ("total", total)]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))
