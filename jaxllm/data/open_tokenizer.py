"""The tokenizer of a run: loaded, or trained once on the text that is trained on."""

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from jaxllm.data import shards
from jaxllm.data.batch import BatchKind
from jaxllm.data.chat_template import BUILT_IN, named_template
from jaxllm.data.config import DataConfig
from jaxllm.data.example_streams import read_pieces
from jaxllm.data.held_out import HeldOut, split_documents
from jaxllm.data.progress import Bar
from jaxllm.data.sources import Component, Source
from jaxllm.data.tokenizer import Tokenizer, load_tokenizer
from jaxllm.data.tokenizer_training import SAMPLE_BYTES, parse_tokenizer, sample_passages, train_tokenizer
from jaxllm.errors import UserError


def open_tokenizer(
    config: DataConfig,
    components: Sequence[Component],
    held_out: HeldOut,
    kind: BatchKind,
    cache: Path,
    bar: Bar,
) -> Tokenizer:
    """Loads `config.tokenizer`, or trains it on the training part, each component in proportion to its weight.

    One that is trained has the special tokens that its batches and a built-in chat template need. The chat template
    that `config` names becomes the tokenizer's, and goes along wherever that does.

    Raises:
      UserError: no such tokenizer, no text to learn one from, or one that lacks what the template writes.
    """
    spec = parse_tokenizer(config.tokenizer)
    path = config.tokenizer if spec is None else _trained(*spec, config, components, held_out, kind, cache, bar)
    return load_with_template(path, config)


def load_with_template(path: str | Path, config: DataConfig) -> Tokenizer:
    """The tokenizer at `path`, with the chat template of `config.chat_template` where that names one.

    Raises:
      UserError: no tokenizer there, no such template, or one that writes special tokens which the tokenizer lacks.
    """
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        raise UserError(f"config.data.tokenizer: {error}") from error
    source = named_template(config.chat_template)
    if source is None:
        return tokenizer
    if missing := [name for name in BUILT_IN.get(config.chat_template, ()) if name not in tokenizer.specials]:
        raise UserError(
            f"config.data.chat_template={config.chat_template} writes {', '.join(missing)}, special tokens that the "
            f"tokenizer of config.data.tokenizer={config.tokenizer} does not have. plain and zephyr do with any; or "
            "set the template when the tokenizer is trained, at pretraining."
        )
    return tokenizer.with_template(source)


def _trained(
    algorithm: str,
    vocab_size: int,
    config: DataConfig,
    components: Sequence[Component],
    held_out: HeldOut,
    kind: BatchKind,
    cache: Path,
    bar: Bar,
) -> Path:
    """The folder of the tokenizer in the cache."""
    specials = (*kind.special_tokens, *BUILT_IN.get(config.chat_template, ()))
    identity = [[c.source.identity(), c.weight] for c in components]
    split = [held_out.kind, held_out.fraction, held_out.marker]
    examples = [config.fields, kind.examples] if kind.examples else []
    key = shards.cache_key(
        "tokenizer", identity, split, algorithm, vocab_size, version("sentencepiece"), *specials, *examples
    )

    def train(folder: Path) -> None:
        whole = sum(component.weight for component in components)
        with bar(f"learning {vocab_size:,} pieces") as report:
            passages = [
                passage
                for component in components
                for passage in sample_passages(
                    _train_texts(component.source, held_out, config, kind, report),
                    int(SAMPLE_BYTES * component.weight / whole),
                )
            ]
            if not passages:
                raise nothing_to_train_on(config)
            try:
                train_tokenizer(passages, kind=algorithm, vocab_size=vocab_size, specials=specials).save(folder)
            except UserError as error:
                raise UserError(f"config.data.tokenizer={config.tokenizer}: {error}") from error
            shards.seal(folder)

    folder = shards.cached(cache, f"tokenizer-{key}", train)
    shards.check_sealed(folder)
    return folder


def nothing_to_train_on(config: DataConfig) -> UserError:
    """What to say of a split that leaves nothing."""
    return UserError(f"config.data.held_out={config.held_out!r} leaves no text to train on.")


def _train_texts(
    source: Source, held_out: HeldOut, config: DataConfig, kind: BatchKind, report: Callable[[float], None]
) -> Iterator[str]:
    pieces = read_pieces(source, held_out, config.fields, kind) if kind.examples else split_documents(source, held_out)
    for piece in pieces:
        if not piece.held_out:
            yield from piece.example.texts if kind.examples else [piece.text]
        report(piece.progress)
