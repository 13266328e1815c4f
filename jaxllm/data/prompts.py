"""Sets of prompts, for what a model itself writes after them.

    {"prompt": …}                                     a text, or a list of messages; {"prompt", "completion"} too
    {"messages": […]}                                 all up to the last of the assistant's messages
    {"instruction": …, "input": …}, {"chosen": …, "rejected": …}, as examples and preferences have them
    and "tools", of conversations

A text that is a dialogue is a conversation where there is a chat template, as in data/preferences.py. All other fields
of a record are its columns, which reward functions get. Prompts are few and short: they are held in memory.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxllm.data.chat_template import ChatTemplate, Message
from jaxllm.data.check_config import check_records, refuse_held_out_in_training
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import (
    Conversation,
    parse_fields,
    plain,
    read_messages,
    read_sharegpt,
    read_tools,
    with_input,
)
from jaxllm.data.held_out import HeldOut, read_held_out, split_records
from jaxllm.data.open_tokenizer import load_with_template, nothing_to_train_on
from jaxllm.data.preferences import found_fields, read_dialogue_prompt, read_pair
from jaxllm.data.sources import Record, Source, kind_of, open_components, open_source, text_field
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.data.tokenizer_training import parse_tokenizer
from jaxllm.errors import UserError


class Prompt(NamedTuple):
    """What a model is to answer."""

    ids: list[int]  # with all that comes before the answer
    text: str  # as it is encoded: of a conversation what the chat template writes
    columns: dict[str, Any]  # the other fields of its record


@dataclass(frozen=True)
class PromptSet:
    """Prompts, in a global order that is a function of the seed and the epoch alone; of a mixture by its weights."""

    tokenizer: Tokenizer
    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    shuffle: bool
    cut: int = 0  # so many lost their beginning
    dropped: int = 0  # so many were too long
    sizes: tuple[int, ...] = ()  # of a mixture: how many of the prompts that are trained on each component has
    weights: tuple[float, ...] = ()  # and how often its prompts come

    def at(self, position: int, seed: int) -> Prompt:
        """The prompt that comes at `position`, of all epochs end to end."""
        return self.train[_order(self.sizes or (len(self.train),), self.weights, seed, self.shuffle)[position]]

    @functools.cached_property
    def identity(self) -> str:
        """A digest of the prompts that are trained on, and of their order."""
        told = [[prompt.ids for prompt in self.train], self.shuffle, *self.sizes, *self.weights]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def describe(self) -> list[str]:
        """Lines to print at the start of a run."""
        lines = [f"tokenizer: {self.tokenizer.vocab_size:,} pieces"]
        for name, prompts in (("train", self.train), ("held out", self.held_out)):
            sizes = [len(prompt.ids) for prompt in prompts]
            shown = f", {np.mean(sizes):.1f} tokens on average, at most {max(sizes):,}" if sizes else ""
            lines.append(f"{name}: {len(sizes):,} prompts{shown}")
        if self.cut or self.dropped:
            lines.append(f"prompts too long: {self.cut:,} lost their beginning, {self.dropped:,} left out")
        return lines


class _Order(grain.MapDataset[int]):
    """The numbers from `first` to `first` + `count`, epoch after epoch without end."""

    def __init__(self, first: int, count: int, seed: int, shuffle: bool):
        super().__init__()
        self._first, self._count, self._seed, self._shuffle = first, count, seed, shuffle

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, number = divmod(index, self._count)
        return self._first + int(_permutation(self._count, epoch, self._seed)[number] if self._shuffle else number)


@functools.lru_cache(maxsize=4)
def _order(sizes: tuple[int, ...], weights: tuple[float, ...], seed: int, shuffle: bool) -> grain.MapDataset[int]:
    starts = np.cumsum([0, *sizes])[:-1].tolist()
    parts = [_Order(start, size, seed, shuffle) for start, size in zip(starts, sizes, strict=True)]
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


@functools.lru_cache(maxsize=16)
def _permutation(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.RandomState(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(count)


def prepare_prompts(config: DataConfig, *, max_prompt_length: int) -> PromptSet:
    """Reads and encodes the prompts of `config`.

    Args:
      max_prompt_length: tokens; what of a row an answer leaves. A longer prompt is refused, or as `config.truncation`
        says it is left out ("drop") or loses its beginning ("cut").

    Raises:
      UserError: everything that can be wrong with config, files and records; a prompt that is too long.
    """
    if parse_tokenizer(config.tokenizer) is not None:
        raise UserError(
            f"config.data.tokenizer={config.tokenizer} would be trained on prompts. A model that answers has its own: "
            "--config.data.tokenizer=WORKDIR/tokenizer."
        )
    check_records(config)
    held_out, components = read_held_out(config.held_out), open_components(config)
    if held_out.kind == "marker":
        raise UserError("config.data.held_out of prompts is a fraction or file:PATH, not a text to search for.")
    if held_out.kind == "file":
        refuse_held_out_in_training(held_out.path, components, config.field)
    reader = _Reader(config, load_with_template(config.tokenizer, config), max_prompt_length)
    train, test = [], []
    for component in components:
        split = list(reader.read(component.source, held_out))
        train.append([prompt for prompt, is_held_out in split if not is_held_out])
        test += [prompt for prompt, is_held_out in split if is_held_out]
    if held_out.kind == "file":
        source = open_source(kind_of(held_out.path), held_out.path, config.field, "config.data.held_out")
        test = [prompt for prompt, _ in reader.read(source, HeldOut())]
    if not all(train):
        raise reader.nothing_fits() if reader.dropped else nothing_to_train_on(config)
    if held_out.kind != "none" and not test:
        raise UserError(f"config.data.held_out={config.held_out!r} holds out no prompt: there are too few.")
    mixture = {"sizes": tuple(map(len, train)), "weights": tuple(component.weight for component in components)}
    return PromptSet(
        reader.tokenizer,
        tuple(itertools.chain(*train)),
        tuple(test),
        config.shuffle,
        reader.cut,
        reader.dropped,
        **(mixture if len(components) > 1 else {}),
    )


class _Reader:
    """Records to prompts; counts those that are too long."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, max_length: int):
        self._config, self.tokenizer, self._max_length = config, tokenizer, max_length
        self.cut = self.dropped = 0

    def read(self, source: Source, held_out: HeldOut) -> Iterator[tuple[Prompt, bool]]:
        fields = parse_fields(self._config.fields, text=source.field)
        for record, is_held_out in split_records(source, held_out):
            prompt = self._prompt(record, fields)
            if prompt is not None:
                yield prompt, is_held_out

    def _prompt(self, record: Record, fields: Mapping[str, str]) -> Prompt | None:
        template = self.tokenizer.chat_template
        said, used = read_prompt(record, fields, dialogues=template is not None)
        if isinstance(said, str):
            text, ids = said, self.tokenizer.encode(said)
            ids = ids if self.tokenizer.bos_id is None else [self.tokenizer.bos_id, *ids]
        elif template is None:
            raise UserError(
                f"{record.origin}: a conversation needs a chat template, and the tokenizer has none. Set "
                "config.data.chat_template to the one that the model was trained with."
            )
        else:
            found = found_fields(record, fields, ("tools",))
            text = _rendered(template, said, read_tools(found, record.origin), record.origin)
            ids = self.tokenizer.encode(text, special=True)
        if not ids:
            raise UserError(f"{record.origin}: the prompt is empty, and this tokenizer has no token to begin with.")
        columns = {str(name): plain(value) for name, value in record.value.items() if str(name) not in used}
        return self._fitted(Prompt(ids, text, columns), record.origin)

    def _fitted(self, prompt: Prompt, origin: str) -> Prompt | None:
        too_many = len(prompt.ids) - self._max_length
        if too_many <= 0:
            return prompt
        if self._config.truncation == "drop":
            self.dropped += 1
            return None
        if self._config.truncation == "cut":
            self.cut += 1
            begin = prompt.ids[:1] if prompt.ids[0] == self.tokenizer.bos_id else []
            return prompt._replace(ids=[*begin, *prompt.ids[too_many + len(begin) :]])
        raise UserError(
            f"{origin}: this prompt has {len(prompt.ids):,} tokens, and a row has room for {self._max_length:,} before "
            "an answer of config.rollout.max_new_tokens. Raise config.data.length, lower max_new_tokens, or set "
            "config.data.truncation to cut (their beginnings) or drop (them)."
        )

    def nothing_fits(self) -> UserError:
        """What to say where all prompts of a source were left out."""
        return UserError(
            f"config.data.path={self._config.path}: no prompt is short enough for the {self._max_length:,} tokens "
            "that a row has before an answer. Raise config.data.length, or lower config.rollout.max_new_tokens."
        )


def _rendered(template: ChatTemplate, said: list[Message], tools: list[Any] | None, origin: str) -> str:
    try:
        return template.render(said, add_generation_prompt=True, **({"tools": tools} if tools else {})).text
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error


def read_prompt(record: Record, fields: Mapping[str, str], *, dialogues: bool) -> tuple[str | list[Message], set[str]]:
    """The prompt in a record, and the names of the record's fields that it is in.

    Args:
      fields: as `parse_fields` gives them.
      dialogues: texts that are dialogues become conversations.

    Raises:
      UserError: no prompt in it; with file and line.
    """
    where, value = record.origin, record.value
    names = ("prompt", "messages", "chosen", "rejected", "instruction", "input")
    found = {name: got for name, got in found_fields(record, fields, names).items() if got is not None}
    prompt, is_pair = found.get("prompt"), "chosen" in found and "rejected" in found
    if isinstance(prompt, list):
        return read_messages(prompt, fields["prompt"], where), {fields["prompt"]}
    if prompt is not None and not (is_pair and isinstance(found["chosen"], list)):
        text = text_field({fields["prompt"]: prompt}, fields["prompt"], where)
        return (dialogues and read_dialogue_prompt(text)) or text, {fields["prompt"]}
    if "messages" in found:
        return _asked(read_messages(found["messages"], fields["messages"], where), where), {fields["messages"]}
    if "conversations" in value:
        return _asked(read_sharegpt(plain(value), where), where), {"conversations"}
    if "chosen" in found:
        example = read_pair(record, fields, dialogues=dialogues).chosen
        used = {fields["prompt"], fields["chosen"], fields["rejected"]}
        if isinstance(example, Conversation):
            return example.messages[: example.num_context], used
        return example.prompt, used
    if "instruction" in found:
        said = with_input(*(str(found.get(name, "")) for name in ("instruction", "input")))
        return [{"role": "user", "content": said}], {fields["instruction"], fields["input"]}
    raise UserError(
        f"{where}: no prompt: its fields are {', '.join(map(str, value)) or 'none'}. Wanted: prompt; or messages; or "
        "chosen and rejected; or instruction. Say which is which, for example --config.data.fields=prompt=question."
    )


def _asked(messages: list[Message], where: str) -> list[Message]:
    """Up to the last answer, without it."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    asked = messages[: answers[-1]] if answers and answers[-1] == len(messages) - 1 else messages
    if not asked:
        raise UserError(f"{where}: nobody says anything before the assistant does, so there is no prompt.")
    return asked
