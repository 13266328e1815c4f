"""Data files mutated at random: each is read as a run reads it, or refused in a few lines that name it.

    python -m tests.fuzz_data --count 200 --seed 0 [--only 17]

A case is a small valid file of one of the kinds that jaxllm reads, a tokenizer or a chat template, with its bytes, its
records or its compression spoilt, or with something else in its place. It is opened as a run opens its data, and read
through one epoch and one evaluation.
"""

import argparse
import contextlib
import gzip
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from tests.fuzz_files import (
    BY_NAME,
    KINDS,
    Kind,
    Records,
    as_jsonl,
    as_object,
    as_text,
    conversations,
    texts,
    valid_content,
)
from tests.fuzz_spoil import place_other, spoil_bytes, spoil_value
from tests.fuzzing import Campaign, Outcome, outcome_of

LENGTH = 64  # tokens a row
BATCH = 4


class Case(NamedTuple):
    """A file of `kind`, spoilt in the ways `how`."""

    kind: str
    how: list[str]
    seed: str


def draw_case(seed: int, number: int) -> Case:
    """The kinds come in turn."""
    draw = random.Random(f"{seed} {number}")
    how = draw.choices((["values"], ["bytes"], ["packed bytes"], ["values", "bytes"], ["place"]), (40, 30, 15, 8, 7))[0]
    return Case(KINDS[number % len(KINDS)].name, how, f"{seed} {number}")


def write_case(case: Case, path: Path) -> None:
    """Writes the file of a case."""
    kind, draw = BY_NAME[case.kind], random.Random(f"{case.seed} content")
    content = valid_content(case.kind)
    if "values" in case.how and not isinstance(content, bytes):
        for _ in range(draw.choice((1, 1, 3))):
            content = spoil_value(draw, content)
    try:
        data = kind.write(content, path)
    except (TypeError, ValueError, AttributeError):  # it cannot be written so; jsonl takes anything
        data = json.dumps(content).encode()
    if "bytes" in case.how or ("values" in case.how and isinstance(content, bytes)):
        data = spoil_bytes(draw, data)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    if "packed bytes" in case.how:
        data = spoil_bytes(draw, data)
    path.write_bytes(data)
    if "place" in case.how:
        case.how.append(place_other(draw, path))


def try_case(case: Case, folder: Path) -> Outcome:
    """What becomes of a case; its files lie in `folder` until the next."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / case.kind
    write_case(case, path)
    return outcome_of(lambda: read_through(BY_NAME[case.kind], path), folder)


def read_through(kind: Kind, path: Path) -> None:
    """Opens the data as a run does, and reads one epoch and one evaluation."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxllm.data.config import DataConfig
    from jaxllm.data.dataset import prepare
    from jaxllm.data.prompts import prepare_prompts
    from jaxllm.steps import STEPS

    if kind.name == "config.json":
        read_stored_config(path.parent)
        return
    config = DataConfig(**fields_of(kind, path))
    if STEPS[kind.step].draws:
        prompts = prepare_prompts(config, max_prompt_length=LENGTH)
        assert prompts.identity and prompts.describe()
        return
    data = prepare(config, length=LENGTH, kind=STEPS[kind.step].batch, progress=False)
    assert data.describe()
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))
    with contextlib.closing(data.train_loader(sharding, batch_size=BATCH, seed=0)) as batches:
        for batch in itertools.islice(batches, data.rows_an_epoch() // BATCH + 1):
            _check_tokens(batch, data.tokenizer.vocab_size)
    for batch in data.eval_batches(sharding, batch_size=BATCH):
        _check_tokens(batch, data.tokenizer.vocab_size)


def read_stored_config(workdir: Path) -> None:
    """As the verbs that use a run do."""
    from jaxllm.cli.config_file import merge, override
    from jaxllm.generate.run import config_for_use

    config_for_use(workdir, lambda config: override(merge(config), {}), own_mesh=False)


def _check_tokens(batch: Any, vocab_size: int) -> None:
    import numpy as np

    tokens = np.asarray(batch.tokens)
    assert tokens.min() >= 0 and tokens.max() < vocab_size, (tokens.min(), tokens.max(), vocab_size)


def fields_of(kind: Kind, path: Path) -> dict[str, Any]:
    """The fields of config.data of a run that reads the file, with whatever valid files are beside it."""
    beside = path.parent / "valid"
    beside.mkdir()
    (beside / "tokenizer.model").write_bytes(valid_content("tokenizer.model"))
    fields: dict[str, Any] = {"path": str(path), "tokenizer": str(beside), "held_out": "0.2", "batch_size": BATCH}
    fields |= {"cache": str(path.parent / "cache"), **kind.fields}
    is_text = fields["source"] == "text"
    valid = beside / ("a.txt" if is_text else "a.jsonl")
    valid.write_bytes(as_text(texts(), valid) if is_text else as_jsonl(_beside(kind), valid))
    if kind.name == "held_out.jsonl":
        fields |= {"path": str(valid), "held_out": f"file:{path}"}
    if kind.name.startswith("tokenizer"):
        fields |= {"path": str(valid), "tokenizer": str(path.parent)}
    if kind.name == "tokenizer_config.json":
        (path.parent / "tokenizer.json").write_bytes(as_object(valid_content("tokenizer.json"), path))
    if kind.name == "template.jinja":
        fields |= {"path": str(valid), "chat_template": str(path)}
    return fields


def _beside(kind: Kind) -> Records:
    return conversations() if kind.step == "sft" else texts()


def cases(seed: int, count: int) -> Iterator[tuple[int, Case]]:
    return ((number, draw_case(seed, number)) for number in range(count))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="the numbers of the cases to try")
    parser.add_argument("--folder", type=Path, help="where the file of the last case stays; default a temporary one")
    options = parser.parse_args()
    counted = Campaign()
    with tempfile.TemporaryDirectory() as temporary:
        for number, case in cases(options.seed, options.count):
            if options.only is not None and number not in options.only:
                continue
            folder = options.folder or Path(temporary) / "files"
            outcome = counted.timed(f"case {number}", lambda case=case, folder=folder: try_case(case, folder))
            again = f"python -m tests.fuzz_data --seed {options.seed} --count {number + 1} --only {number}"
            counted.add(outcome, f"{again}  ({case.kind}: {', '.join(case.how)})", verbose=options.only is not None)
    return counted.finish()


if __name__ == "__main__":
    import tests.conftest  # noqa: F401

    sys.exit(main())
