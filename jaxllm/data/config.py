"""The config group `config.data.*`."""

from dataclasses import dataclass

SUPERVISE = ("completions", "all")
TRUNCATION = ("refuse", "cut", "drop")


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes batches."""

    source: str = "text"  # text | jsonl | json | parquet | csv | arrayrecord | tfds:name/config:split | mixture
    path: str = (
        ""  # files, globs, folders, gs://, s3://, joined by commas; mixture: "text:a.txt=0.7,jsonl:b.jsonl.gz=0.3"
    )
    field: str = "text"  # the field of a record (of any kind but text) that holds the text
    fields: str = ""  # of examples, where they have other names: "prompt=question,completion=instances.0.output"
    tokenizer: str = "bpe:8000"  # "bpe:N", "unigram:N": trained; else a folder with tokenizer.json or a .model file
    held_out: str = "0.01"  # for evaluation: a fraction, "file:PATH", or a text from whose first occurrence on; "" none
    length: int = 0  # tokens a sequence; 0: config.model.max_length
    batch_size: int = 32  # sequences a step, over all devices
    packing: str = (
        "concat"  # concat: documents end to end, cut anywhere | best_fit: whole where they fit, padded | none
    )
    chat_template: str = ""  # chatml | llama3 | zephyr | plain | FILE.jinja; "": the tokenizer's own
    supervise: str = "completions"  # of examples: completions, or what the assistant says | all
    truncation: str = "refuse"  # of examples, pairs and prompts longer than a row: refuse | cut | drop
    eval_overlap: int = 0  # tokens that evaluation windows of one document share as context; 0: half the length
    mask_fraction: float = 0.15  # of the tokens, that train_step=mlm hides
    shuffle: bool = True  # a global shuffle, a function of config.seed alone
    cache: str = ""  # folder of the token shards; "": $JAXLLM_CACHE or ~/.cache/jaxllm
