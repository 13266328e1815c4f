"""Sets of prompts, for what a model itself writes after them.

    {"prompt": …}                                     a text, or a list of messages; {"prompt", "completion"} too
    {"messages": […]}                                 all up to the last of the assistant's messages
    {"instruction": …, "input": …}, {"chosen": …, "rejected": …}, as examples and preferences have them

All other fields of a record are its columns, which reward functions get. Prompts are few and short: they are held in
memory.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data.chat_template import Message
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import (
    MISSING,
    Conversation,
    find_field,
    parse_fields,
    plain,
    read_messages,
    read_sharegpt,
    with_input,
)
from jaxllm.data.held_out import HeldOut, read_held_out, split_records
from jaxllm.data.open_tokenizer import load_with_template, nothing_to_train_on
from jaxllm.data.preferences import read_pair
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
    """Prompts, in a global order that is a function of the seed and the epoch alone."""

    tokenizer: Tokenizer
    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    shuffle: bool
    cut: int = 0  # so many lost their beginning
    dropped: int = 0  # so many were too long

    def at(self, position: int, seed: int) -> Prompt:
        """The prompt that comes at `position`, of all epochs end to end."""
        epoch, number = divmod(position, len(self.train))
        return self.train[self._order(epoch, seed)[number] if self.shuffle else number]

    def _order(self, epoch: int, seed: int) -> np.ndarray:
        return _permutation(len(self.train), epoch, seed)

    @functools.cached_property
    def identity(self) -> str:
        """A digest of the prompts that are trained on, and of their order."""
        told = [[prompt.ids for prompt in self.train], self.shuffle]
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


@functools.lru_cache(maxsize=4)
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
    tokenizer, held_out = load_with_template(config.tokenizer, config), read_held_out(config.held_out)
    if held_out.kind == "marker":
        raise UserError("config.data.held_out of prompts is a fraction or file:PATH, not a text to search for.")
    sources = [component.source for component in open_components(config)]
    reader = _Reader(config, tokenizer, max_prompt_length)
    split = [found for source in sources for found in reader.read(source, held_out)]
    train, test = ([prompt for prompt, is_held_out in split if is_held_out == wanted] for wanted in (False, True))
    if held_out.kind == "file":
        source = open_source(kind_of(held_out.path), held_out.path, config.field)
        test = [prompt for prompt, _ in reader.read(source, HeldOut("none"))]
    if not train:
        raise nothing_to_train_on(config)
    return PromptSet(tokenizer, tuple(train), tuple(test), config.shuffle, reader.cut, reader.dropped)


class _Reader:
    """Records to prompts; counts those that are too long."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, max_length: int):
        self._config, self._tokenizer, self._max_length = config, tokenizer, max_length
        self.cut = self.dropped = 0

    def read(self, source: Source, held_out: HeldOut) -> Iterator[tuple[Prompt, bool]]:
        fields = parse_fields(self._config.fields, text=source.field)
        for record, is_held_out in split_records(source, held_out):
            prompt = self._prompt(record, fields)
            if prompt is not None:
                yield prompt, is_held_out

    def _prompt(self, record: Record, fields: Mapping[str, str]) -> Prompt | None:
        template = self._tokenizer.chat_template
        said, used = read_prompt(record, fields, dialogues=template is not None)
        if isinstance(said, str):
            text, ids = said, self._tokenizer.encode(said)
            ids = ids if self._tokenizer.bos_id is None else [self._tokenizer.bos_id, *ids]
        elif template is None:
            raise UserError(
                f"{record.origin}: a conversation needs a chat template, and the tokenizer has none. Set "
                "config.data.chat_template to the one that the model was trained with."
            )
        else:
            text = template.render(said, add_generation_prompt=True).text
            ids = self._tokenizer.encode(text, special=True)
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
            return prompt._replace(ids=prompt.ids[too_many:])
        raise UserError(
            f"{origin}: this prompt has {len(prompt.ids):,} tokens, and a row has room for {self._max_length:,} before "
            "an answer of config.rollout.max_new_tokens. Raise config.data.length, lower max_new_tokens, or set "
            "config.data.truncation to cut (their beginnings) or drop (them)."
        )


def read_prompt(record: Record, fields: Mapping[str, str], *, dialogues: bool) -> tuple[str | list[Message], set[str]]:
    """The prompt in a record, and the names of the record's fields that it is in.

    Args:
      fields: as `parse_fields` gives them.
      dialogues: texts that are dialogues become conversations.

    Raises:
      UserError: no prompt in it; with file and line.
    """
    where, value = record.origin, record.value
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: a {type(value).__name__}, but each record must be an object.")
    has = lambda name: find_field(value, fields[name]) not in (MISSING, None)  # noqa: E731
    get: Callable[[str], Any] = lambda name: plain(find_field(value, fields[name]))  # noqa: E731
    if has("prompt"):
        prompt, used = get("prompt"), {fields["prompt"]}
        if isinstance(prompt, list):
            return read_messages(prompt, fields["prompt"], where), used
        return text_field({fields["prompt"]: prompt}, fields["prompt"], where), used
    if has("messages"):
        return _asked(read_messages(get("messages"), fields["messages"], where), where), {fields["messages"]}
    if "conversations" in value:
        return _asked(read_sharegpt(plain(value), where), where), {"conversations"}
    if has("chosen"):
        example = read_pair(record, fields, dialogues=dialogues).chosen
        used = {fields["chosen"], fields["rejected"]}
        if isinstance(example, Conversation):
            return example.messages[: example.num_context], used
        return example.prompt, used
    if has("instruction"):
        parts = [get(name) if has(name) else "" for name in ("instruction", "input")]
        named = {fields["instruction"], fields["input"]}
        return [{"role": "user", "content": with_input(*map(str, parts))}], named
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
