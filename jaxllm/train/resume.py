"""What may differ between a run and the flags that go on with it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.data.tokenizer_training import parse_tokenizer
from jaxllm.errors import UserError
from jaxllm.train.config import Config, config_dict

# Another value makes another model, another order of tokens or another optimizer state. (data.source, data.path,
# data.field and data.held_out may name the same text in another place: the loader compares the tokens themselves.)
BREAKING = (
    "train_step",
    "seed",
    "model.",
    "adapter.",
    "data.length",
    "data.packing",
    "data.shuffle",
    "data.chat_template",
    "data.supervise",
    "data.truncation",
    "optimizer.name",
    "train.reference",
    "dpo.loss",
    "dpo.reference",
    "ppo.epochs",
    "grpo.epochs",
    "rollout.prompts",
    "rollout.samples",
)
# Of the model and its adapter these change nothing that is learned.
HARMLESS = (
    "model.dropout",
    "model.attention_dropout",
    "model.neftune_alpha",
    "model.z_loss",
    "model.init_std",
    "adapter.dropout",
    "adapter.init_from",
)


def differences(stored: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Field -> (value in the checkpoint, value now), of every field that differs.

    A field that the checkpoint is too old to have had its default then.
    """
    before, now = dict(_flat(config_dict(Config()))) | dict(_flat(stored)), dict(_flat(config_dict(config)))
    return {name: (before.get(name), now.get(name)) for name in now | before if before.get(name) != now.get(name)}


def refuse_breaking(changed: Mapping[str, tuple[Any, Any]], workdir: Path) -> None:
    """Lets a run go on only where its model, tokenizer, data order and optimizer stay what they are.

    Raises:
      UserError: they do not; it names each field.
    """
    breaking = [name for name in changed if name.startswith(BREAKING) and name not in HARMLESS]
    if "data.tokenizer" in changed and not _same_tokenizer(changed["data.tokenizer"][1], workdir):
        breaking.append("data.tokenizer")
    if breaking:
        adapts = changed.get("adapter.kind", ("", "none"))[1] != "none"
        hint = f" (of an adapter, {workdir}/adapters/NAME)" if adapts else ""
        lines = [
            f"config.{name}: {changed[name][0]!r} in the checkpoint, {changed[name][1]!r} now" for name in breaking
        ]
        raise UserError(
            f"{workdir} holds another run. Set back what differs, or give another --workdir{hint}:\n  "
            + "\n  ".join(lines)
        )


def _same_tokenizer(name: str, workdir: Path) -> bool:
    if parse_tokenizer(name) is not None:  # one to be trained anew
        return False
    return load_tokenizer(name).fingerprint == load_tokenizer(workdir / "tokenizer").fingerprint


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
