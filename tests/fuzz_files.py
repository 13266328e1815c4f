"""Valid files of every kind that jaxllm reads: what tests/fuzz_data.py spoils."""

import csv
import io
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

NUMBER = 24  # records of a file

Records = list[dict[str, Any]]


class Kind(NamedTuple):
    """A kind of file: how it is called and written, and how a run that reads it is configured."""

    name: str
    records: Callable[[], Any]
    write: Callable[[Any, Path], bytes]  # of records; the path is where they will lie
    fields: dict[str, str]  # of config.data
    step: str = "pretrain"


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

_made: dict[str, Any] = {}


def valid_content(name: str) -> Any:
    """What a file of this kind holds, before it is written; made once."""
    if name not in _made:
        _made[name] = BY_NAME[name].records()
    return _made[name]
