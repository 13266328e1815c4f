"""What can be wrong with `config.data` before any text is read."""

from collections.abc import Sequence

from jaxllm.config import one_of
from jaxllm.data.batch import BatchKind
from jaxllm.data.chat_template import named_template
from jaxllm.data.config import SUPERVISE, TRUNCATION, DataConfig
from jaxllm.data.examples import parse_fields
from jaxllm.data.packing import check_packing
from jaxllm.data.sources import Component, kind_of, open_source
from jaxllm.errors import UserError


def check_data(config: DataConfig, length: int, kind: BatchKind) -> None:
    """Raises a UserError where rows of `length` tokens of this kind cannot be made as `config` says."""
    check_packing(config, kind)
    check_records(config)
    if kind.examples == 2 and config.supervise != "completions":
        raise UserError(
            f"config.data.supervise={config.supervise}: of pairs the responses are compared, not the prompt that both "
            "have. Set it to completions."
        )
    if length < 2:
        raise UserError(f"config.data.length={length} must be 2 or more.")
    if not 0 <= config.eval_overlap < length:
        raise UserError(
            f"config.data.eval_overlap={config.eval_overlap} must be less than the {length} tokens of a row. "
            f"0 stands for half of them, {length // 2}."
        )


def check_records(config: DataConfig) -> None:
    """Raises a UserError where `config` does not say how records are read."""
    one_of("config.data.supervise", config.supervise, SUPERVISE)
    one_of("config.data.truncation", config.truncation, TRUNCATION)
    parse_fields(config.fields)
    named_template(config.chat_template)


def refuse_held_out_in_training(path: str, components: Sequence[Component], field: str) -> None:
    """A glob or a folder easily takes the held-out file in; every figure of an evaluation would then be flattered."""
    source = open_source(kind_of(path), path, field, "config.data.held_out")
    held_out_files = {file.real_path for file in getattr(source, "files", ())}
    trained_on = [file for c in components for file in getattr(c.source, "files", ())]
    if shared := [str(file.path) for file in trained_on if file.real_path in held_out_files]:
        raise UserError(
            f"config.data.held_out='file:{path}': {shared[0]} is also one of the files that are trained on. "
            "Move it out of config.data.path."
        )
