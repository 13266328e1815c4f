"""Data files mutated at random: each is read as a run reads it, or refused in a few lines that name it.

    python -m tests.fuzz_data --count 200 --seed 0 [--only 17]

A case is a small valid file of one of the kinds that jaxllm reads, a tokenizer or a chat template, with its bytes, its
records or its compression spoilt, or with something else in its place. It is opened as a run opens its data, and read
through one epoch and one evaluation.
"""

import argparse
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from tests.fuzzing import Campaign, Outcome, outcome_of

LENGTH = 64  # tokens a row
BATCH = 4
NUMBER = 24  # records of a file

Records = list[dict[str, Any]]


class Kind(NamedTuple):
    """A kind of file: how it is called and written, and how a run that reads it is configured."""

    name: str
    records: Callable[[], Any]
    write: Callable[[Any, Path], bytes]  # of records; the path is where they will lie
    fields: dict[str, str]  # of config.data
    step: str = "pretrain"


class Case(NamedTuple):
    """A file of `kind`, spoilt in the ways `how`."""

    kind: str
    how: list[str]
    seed: str


def texts() -> Records:
    return [{"text": f"the cat {n} sat on the mat\nand ran, \u5374\u8bf4", "n": n} for n in range(NUMBER)]


def instructions() -> Records:
    return [{"instruction": f"say {n}", "input": "", "output": f"{n} and {n}"} for n in range(NUMBER)]


def conversations() -> Records:
    answer = lambda n: {"role": "assistant", "content": f"{n}!"}  # noqa: E731
    return [{"messages": [{"role": "user", "content": f"say {n}"}, answer(n)]} for n in range(NUMBER)]


def preferences() -> Records:
    return [{"prompt": f"say {n}", "chosen": f"{n}!", "rejected": "no", "margin": 1.0} for n in range(NUMBER)]


RECORDS = (texts, instructions, conversations, preferences)


def as_jsonl(records: Records, path: Path) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def as_json(records: Records, path: Path) -> bytes:
    return json.dumps(records, indent=1).encode()


def as_text(records: Records, path: Path) -> bytes:
    parts = (record.get("text") if isinstance(record, dict) else record for record in records)
    return "\n\n".join(map(str, parts)).encode("utf-8", "surrogatepass")


def as_csv(records: Records, path: Path) -> bytes:
    rows = [record if isinstance(record, dict) else {"?": record} for record in records]
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    out = io.StringIO()
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    writer = csv.DictWriter(out, names, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(records: Records, path: Path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    def written(table: pyarrow.Table) -> bytes:
        out = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, out)
        return out.getvalue().to_pybytes()

    try:
        return written(pyarrow.Table.from_pylist(records))
    except (pyarrow.ArrowException, AttributeError, UnicodeError, OverflowError):  # a column of two types
        rows = [json.dumps(record).encode() for record in records]
        return written(pyarrow.table({"text": pyarrow.array(rows, pyarrow.binary())}))


def as_arrayrecord(records: Records, path: Path) -> bytes:
    from array_record.python import array_record_module

    file = path.with_name("written.array_record")
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()
    return file.read_bytes()


def as_is(content: bytes, path: Path) -> bytes:
    return content


def sentencepiece_model() -> bytes:
    from jaxllm.data.tokenizer_training import train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer([as_jsonl(every(), Path()).decode() for every in RECORDS] * 5, vocab_size=360).save(folder)
        return (Path(folder) / "tokenizer.model").read_bytes()


def huggingface_tokenizer() -> Any:
    from tests.data import huggingface

    return json.loads(huggingface.gpt2().to_str())


def tokenizer_config() -> dict[str, Any]:
    named = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>", "special": True}}
    return {**named, "add_bos_token": True, "chat_template": ANSWERS, "model_max_length": 1e30}


def template() -> bytes:
    path = Path(__file__).parents[1] / "jaxllm" / "data" / "chat_templates" / "zephyr.jinja"
    return path.read_bytes()


def stored_config() -> dict[str, Any]:
    from jaxllm.train.config import Config, config_dict

    return config_dict(Config())


def as_object(content: Any, path: Path) -> bytes:
    return json.dumps(content).encode()


ANSWERS = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
JSONL = {"source": "jsonl"}
EXAMPLES = {"source": "jsonl", "chat_template": "plain", "packing": "best_fit", "truncation": "drop"}
KINDS = (
    Kind("a.txt", texts, as_text, {"source": "text"}),
    Kind("a.txt.gz", texts, as_text, {"source": "text"}),
    Kind("a.txt.zst", texts, as_text, {"source": "text"}),
    Kind("a.jsonl", texts, as_jsonl, JSONL),
    Kind("a.jsonl.gz", texts, as_jsonl, JSONL),
    Kind("a.jsonl.zst", texts, as_jsonl, JSONL),
    Kind("a.json", texts, as_json, {"source": "json"}),
    Kind("a.csv", texts, as_csv, {"source": "csv"}),
    Kind("a.tsv.gz", texts, as_csv, {"source": "csv"}),
    Kind("a.parquet", texts, as_parquet, {"source": "parquet"}),
    Kind("a.array_record", texts, as_arrayrecord, {"source": "arrayrecord"}),
    Kind("examples.jsonl", instructions, as_jsonl, EXAMPLES, "sft"),
    Kind("examples.json", instructions, as_json, EXAMPLES | {"source": "json"}, "sft"),
    Kind("examples.csv", instructions, as_csv, EXAMPLES | {"source": "csv"}, "sft"),
    Kind("examples.parquet", instructions, as_parquet, EXAMPLES | {"source": "parquet"}, "sft"),
    Kind("talks.jsonl", conversations, as_jsonl, EXAMPLES, "sft"),
    Kind("talks.json.zst", conversations, as_json, EXAMPLES | {"source": "json"}, "sft"),
    Kind("talks.parquet", conversations, as_parquet, EXAMPLES | {"source": "parquet"}, "sft"),
    Kind("talks.array_record", conversations, as_arrayrecord, EXAMPLES | {"source": "arrayrecord"}, "sft"),
    Kind("pairs.jsonl", preferences, as_jsonl, EXAMPLES, "dpo"),
    Kind("pairs.parquet", preferences, as_parquet, EXAMPLES | {"source": "parquet"}, "dpo"),
    Kind("prompts.jsonl", preferences, as_jsonl, EXAMPLES, "grpo"),
    Kind("prompts.csv", preferences, as_csv, EXAMPLES | {"source": "csv"}, "grpo"),
    Kind("held_out.jsonl", texts, as_jsonl, JSONL),
    Kind("tokenizer.model", sentencepiece_model, as_is, {"source": "text"}),
    Kind("tokenizer.json", huggingface_tokenizer, as_object, {"source": "text"}),
    Kind("tokenizer_config.json", tokenizer_config, as_object, EXAMPLES | {"chat_template": ""}, "sft"),
    Kind("template.jinja", template, as_is, EXAMPLES, "sft"),
    Kind("config.json", stored_config, as_object, {"source": "text"}),
)
BY_NAME = {kind.name: kind for kind in KINDS}

# What a JSON value is replaced by.
VALUES = (
    None,
    0,
    -1,
    3,
    1e300,
    float("nan"),
    float("inf"),
    True,
    "",
    " ",
    "x",
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    "\ud800",
)
VALUES += ("\x00", 10**30, 4_000_000_000, -5.5, ["x", 1], {"role": 3}, "x" * 100_000, [{"role": "user"}], "{{", "<s>")


def spoil_value(draw: random.Random, content: Any) -> Any:
    """One value somewhere in JSON-like content is another, is gone, or has another name."""
    content = json.loads(json.dumps(content))
    holder, key = _pick(draw, content)
    if holder is None:
        return draw.choice(VALUES)
    way = draw.choice(("replace", "replace", "replace", "delete", "rename", "wrap"))
    if way == "replace":
        holder[key] = draw.choice(VALUES)
    elif way == "wrap":
        holder[key] = draw.choice((lambda v: [v], lambda v: {"x": v}, str))(holder[key])
    elif way == "delete" or isinstance(holder, list):
        del holder[key]
    else:
        holder[f"{key}_"] = holder.pop(key)
    return content


def _pick(draw: random.Random, content: Any) -> tuple[Any, Any]:
    """A place in nested lists and objects, each depth as likely as another."""
    holder, key = None, None
    while isinstance(content, (dict, list)) and content and (holder is None or draw.random() < 0.75):
        holder, key = content, draw.choice(list(content)) if isinstance(content, dict) else draw.randrange(len(content))
        content = holder[key]
    return holder, key


def spoil_bytes(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(len(data) + 1)
    end = min(at + draw.choice((1, 3, 50)), len(data))
    flipped = bytearray(data)
    for _ in range(draw.choice((1, 1, 4, 40)) if data else 0):
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    ways = (
        bytes(flipped),
        bytes(flipped),
        data[:at],
        data[:at] + draw.randbytes(draw.choice((1, 4, 300))) + data[at:],
        data[:at] + data[end:],
        data[:end] + data[at:],
        data[:at]
        + draw.choice((b"\0", b"\xff", b"\xfe\xff", b"\xc3", b"\xed\xa0\x80", b"\r", b"\x1a", b'"'))
        + data[at:],
        data[:at] + b"[" * 100_000 + data[at:],
        data[:at] + b"a" * 300_000 + data[at:],
        data[:at] + b"9" * 10_000 + data[at:],
        b"\xef\xbb\xbf" + data,
        data.replace(b"\n", b"\r\n"),
        data.replace(b"\n", b""),
        data.decode("utf-8", "replace").encode("utf-16"),
        b"",
        b" \n\n ",
        b"null",
        b"[]",
        data + data,
        draw.randbytes(2_000),
        b"\x1f\x8b" + data,
        b"\x28\xb5\x2f\xfd" + data,
        b"PAR1" + data + b"PAR1",
    )
    return draw.choice(ways)


def place_other(draw: random.Random, path: Path) -> str:
    """Something that is no readable file in place of `path`; says what."""
    what = draw.choice(("folder", "nothing", "fifo", "link to itself", "link to nothing", "socket", "no rights"))
    if what != "no rights":
        path.unlink(missing_ok=True)
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "link to itself":
        path.symlink_to(path)
    elif what == "link to nothing":
        path.symlink_to(path.with_name("nothing"))
    elif what == "socket":
        os.mknod(path, 0o140644)
    elif what == "no rights":
        path.chmod(0)
    return what


def draw_case(seed: int, number: int) -> Case:
    """The kinds come in turn."""
    draw = random.Random(f"{seed} {number}")
    how = draw.choices((["values"], ["bytes"], ["packed bytes"], ["values", "bytes"], ["place"]), (40, 30, 15, 8, 7))[0]
    return Case(KINDS[number % len(KINDS)].name, how, f"{seed} {number}")


def write_case(case: Case, path: Path) -> None:
    """Writes the file of a case."""
    kind, draw = BY_NAME[case.kind], random.Random(f"{case.seed} content")
    content = _valid(case.kind)
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


_made: dict[str, Any] = {}


def _valid(name: str) -> Any:
    if name not in _made:
        _made[name] = BY_NAME[name].records()
    return _made[name]


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
    (beside / "tokenizer.model").write_bytes(_valid("tokenizer.model"))
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
        (path.parent / "tokenizer.json").write_bytes(as_object(_valid("tokenizer.json"), path))
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
