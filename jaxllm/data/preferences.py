"""Preferences: two responses to one prompt, of which the first was preferred, in the formats that users of TRL know.

    {"prompt": …, "chosen": …, "rejected": …}          texts, or lists of messages; the prompt may be text beside lists
    {"chosen": …, "rejected": …}                       whole conversations, or texts, that begin with the same prompt
    and "margin", a number: by how much the chosen is better; and "tools", of conversations

Of texts without a prompt that are dialogues ("\\n\\nHuman: …\\n\\nAssistant: …", Bai et al. 2022), the prompt is what
both share up to an "Assistant:". Of other texts it is what both share, up to white space. With a chat template,
dialogues are conversations. In a conversation or a dialogue one of the two answers may be empty: it ends at once.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.data.chat_template import Message
from jaxllm.data.examples import (
    MISSING,
    Conversation,
    Example,
    PlainText,
    find_field,
    plain,
    read_messages,
    read_tools,
)
from jaxllm.data.sources import Record, text_field
from jaxllm.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(f"({HUMAN}|{ASSISTANT})")


class Pair(NamedTuple):
    """Two examples with the same context."""

    chosen: Example
    rejected: Example
    margin: float


def read_pair(record: Record, fields: Mapping[str, str], *, dialogues: bool) -> Pair:
    """The pair in a record; `fields` as `parse_fields` gives them.

    Args:
      dialogues: texts that are dialogues become conversations.

    Raises:
      UserError: fields that are missing, empty or of kinds that do not go together, no shared beginning, a chosen that
        equals the rejected, a margin that is no number; with file and line.
    """
    where = record.origin
    found = found_fields(record, fields, ("prompt", "chosen", "rejected", "margin", "tools"))
    for name in ("chosen", "rejected"):
        if found.get(name) is None:
            there = ", ".join(map(str, record.value)) or "none"
            raise UserError(
                f"{where}: no field '{fields[name]}', and a preference needs chosen and rejected (its fields are "
                f"{there}). Say which is which, for example --config.data.fields=chosen=better,rejected=worse."
            )
    chosen, rejected, prompt = found["chosen"], found["rejected"], found.get("prompt")
    equal = UserError(f"{where}: '{fields['chosen']}' equals '{fields['rejected']}': there is nothing to prefer.")
    if chosen == rejected:
        raise equal
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise UserError(
            f"{where}: '{fields['chosen']}' is a {type(chosen).__name__} and '{fields['rejected']}' a "
            f"{type(rejected).__name__}: both must be texts, or both lists of messages."
        )
    if isinstance(chosen, list):
        both = _conversations(prompt, chosen, rejected, read_tools(found, where), fields, where)
    else:
        both = _texts(prompt, chosen, rejected, fields, where, dialogues)
    if both[0] == both[1]:  # but for white space around what is said
        raise equal
    return Pair(*both, _margin(found.get("margin"), fields["margin"], where))


def found_fields(record: Record, fields: Mapping[str, str], names: tuple[str, ...]) -> dict[str, Any]:
    """What a record has of these fields, by their names here.

    Raises:
      UserError: a record that is no object.
    """
    if not isinstance(record.value, Mapping):
        raise UserError(f"{record.origin}: a {type(record.value).__name__}, but each record must be an object.")
    values = {name: find_field(record.value, fields[name]) for name in names}
    return {name: plain(value) for name, value in values.items() if value is not MISSING}


def _conversations(
    prompt: Any, chosen: Any, rejected: Any, tools: list[Any] | None, fields: Mapping[str, str], where: str
) -> list[Conversation]:
    said = [read_messages(value, fields[name], where) for name, value in (("chosen", chosen), ("rejected", rejected))]
    if isinstance(prompt, list):
        context = read_messages(prompt, fields["prompt"], where)
        return [Conversation([*context, *messages], len(context), tools) for messages in said]
    shared = _num_shared(*[list(map(_key, messages)) for messages in said])
    if shared in (0, *map(len, said)):
        raise UserError(
            f"{where}: '{fields['chosen']}' and '{fields['rejected']}' share {shared} messages of {len(said[0])} and "
            f"{len(said[1])}: those they share are the prompt, and each must say something after it. Give the prompt "
            f"as a list of messages in '{fields['prompt']}'."
        )
    return [Conversation(messages, shared, tools) for messages in said]


def _num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False)))


def _key(message: Message) -> list[tuple[str, str]]:
    return sorted((key, repr(value)) for key, value in message.items())


def _texts(
    prompt: Any, chosen: Any, rejected: Any, fields: Mapping[str, str], where: str, dialogues: bool
) -> list[Example]:
    texts = [text_field({fields[n]: v}, fields[n], where) for n, v in (("chosen", chosen), ("rejected", rejected))]
    if prompt is not None:
        before = text_field({fields["prompt"]: prompt}, fields["prompt"], where)
    else:
        before = shared_prompt(*texts)
        if not before.strip():
            raise UserError(
                f"{where}: '{fields['chosen']}' and '{fields['rejected']}' begin with nothing that they share and that "
                f"could be the prompt. Give it in a field '{fields['prompt']}' (--config.data.fields=prompt=NAME)."
            )
        texts = [text.removeprefix(before) for text in texts]
    context = read_dialogue_prompt(before)
    if context is None or not any(text.strip() for text in texts):
        for text in texts:
            _refuse_blank(text, before, fields, where)
    if context is None or not dialogues:
        return [PlainText(before, text) for text in texts]
    return [Conversation([*context, *read_dialogue(ASSISTANT + text)], len(context)) for text in texts]


def shared_prompt(first: str, second: str) -> str:
    """What two texts begin with: of dialogues up to an "Assistant:" (nothing without one), of others to white space."""
    shared = first[: _num_shared(first, second)]
    if first.startswith(HUMAN) and second.startswith(HUMAN):
        return shared[: shared.rindex(ASSISTANT) + len(ASSISTANT)] if ASSISTANT in shared else ""
    space = max(shared.rfind(" "), shared.rfind("\n"))
    return shared[: space + 1]


def read_dialogue_prompt(text: str) -> list[Message] | None:
    """The messages of a dialogue in which the assistant is to speak next; None of another text."""
    before = text.rstrip()
    if not (before.startswith(HUMAN) and before.endswith(ASSISTANT)):
        return None
    return read_dialogue(before.removesuffix(ASSISTANT))


def read_dialogue(text: str) -> list[Message]:
    """The messages of "\\n\\nHuman: …\\n\\nAssistant: …"."""
    parts = _TURN.split(text)[1:]
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": "user" if name == HUMAN else "assistant", "content": said.strip()} for name, said in turns]


def _refuse_blank(text: str, prompt: str, fields: Mapping[str, str], where: str) -> None:
    if not text.strip():
        raise UserError(
            f"{where}: one of '{fields['chosen']}' and '{fields['rejected']}' says nothing after the prompt "
            f"{prompt[-40:]!r}, so there is nothing to prefer."
        )


def _margin(value: Any, field: str, where: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where}: '{field}' is {value!r}, but must be a number.")
    return float(value)
