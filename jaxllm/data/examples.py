"""Examples to learn from: records in the formats that users of TRL know.

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}      and "tools"
    {"prompt": …, "completion": …}                        two texts, or two lists of messages
    {"instruction": …, "input": …, "output": …}           the input may be empty or missing
    {"text": …}
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}          ShareGPT's messages

A record is of the first of these formats whose fields it has. `config.data.fields` says which fields of a record those
are where they have other names.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data.chat_template import Message
from jaxllm.data.sources import Record, text_field
from jaxllm.errors import UserError, did_you_mean

FIELDS = ("messages", "tools", "prompt", "completion", "instruction", "input", "output", "text")
PAIR_FIELDS = ("chosen", "rejected", "margin")  # and prompt: data/preferences.py
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
OTHER_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
MISSING = object()


class Conversation(NamedTuple):
    """Messages, which a chat template writes."""

    messages: list[Message]
    num_context: int = 0  # so many of them are context, whoever speaks
    tools: list[Any] | None = None

    @property
    def texts(self) -> Iterator[str]:
        return (message["content"] for message in self.messages if isinstance(message.get("content"), str))


class PlainText(NamedTuple):
    """A text as it stands; the prompt is context."""

    prompt: str
    completion: str

    @property
    def texts(self) -> Iterator[str]:
        yield self.prompt + self.completion


Example = Conversation | PlainText


def parse_fields(value: str, text: str = "text") -> dict[str, str]:
    """{"prompt": "question", …} of `config.data.fields`, "prompt=question,completion=answer".

    A name may lead into a record: "instances.0.output". `text` is the name of the field "text".

    Raises:
      UserError: a field that no format has, or one without a name.
    """
    named = {field: field for field in (*FIELDS, *PAIR_FIELDS)} | {"text": text}
    for part in filter(None, map(str.strip, value.split(","))):
        field, _, name = part.partition("=")
        if field not in named:
            raise UserError(f"config.data.fields: '{field}' is a field of no format. {did_you_mean(field, named)}")
        if not name:
            raise UserError(f"config.data.fields={value!r}: write for example prompt=question,completion=answer.")
        named[field] = name
    return named


def read_example(record: Record, fields: Mapping[str, str]) -> Example:
    """The example in a record; `fields` as `parse_fields` gives them.

    Raises:
      UserError: a record of no format, unknown roles, or what is to be learned missing or empty; with file and line.
    """
    where = record.origin
    if not isinstance(record.value, Mapping):
        raise UserError(f"{where}: a {type(record.value).__name__}, but each example must be an object.")
    found = {
        field: plain(value) for field in FIELDS if (value := find_field(record.value, fields[field])) is not MISSING
    }
    if "messages" in found:
        return Conversation(read_messages(found["messages"], fields["messages"], where), 0, read_tools(found, where))
    if "conversations" in record.value:
        return Conversation(read_sharegpt(plain(record.value), where), 0, read_tools(found, where))
    if "prompt" in found or "completion" in found:
        return _prompt_and_completion(found, fields, where)
    if "instruction" in found or "output" in found:
        return _instruction(found, fields, where)
    if "text" in found:
        text = text_field({fields["text"]: found["text"]}, fields["text"], where)
        return PlainText("", _not_empty(text, fields["text"], where))
    raise UserError(
        f"{where}: no example: its fields are {', '.join(map(str, record.value)) or 'none'}. Wanted: messages; or "
        "conversations; or prompt and completion; or instruction and output; or text. Say which is which, for example "
        "--config.data.fields=prompt=question,completion=answer."
    )


def _prompt_and_completion(found: Mapping[str, Any], fields: Mapping[str, str], where: str) -> Example:
    prompt, completion = _both(found, fields, ("prompt", "completion"), where)
    if isinstance(prompt, list) and isinstance(completion, list):
        context = read_messages(prompt, fields["prompt"], where)
        learned = read_messages(completion, fields["completion"], where)
        return Conversation([*context, *learned], len(context), read_tools(found, where))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise UserError(
            f"{where}: '{fields['prompt']}' is a {type(prompt).__name__} and '{fields['completion']}' a "
            f"{type(completion).__name__}: both must be texts, or both lists of messages."
        )
    texts = [text_field({fields[f]: found[f]}, fields[f], where) for f in ("prompt", "completion")]
    return PlainText(texts[0], _not_empty(texts[1], fields["completion"], where))


def _instruction(found: Mapping[str, Any], fields: Mapping[str, str], where: str) -> Conversation:
    _both(found, fields, ("instruction", "output"), where)
    given = {"input": ""} | {field: value for field, value in found.items() if value is not None}
    names = ("instruction", "input", "output")
    instruction, further, output = (text_field({fields[f]: given[f]}, fields[f], where) for f in names)
    said = with_input(instruction, further)
    answer = _not_empty(output, fields["output"], where)
    return Conversation([{"role": "user", "content": said}, {"role": "assistant", "content": answer}])


def with_input(instruction: str, further: str) -> str:
    """What the user says who gives an instruction and an input, which may be empty."""
    return f"{instruction}\n{further}" if further else instruction


def _both(found: Mapping[str, Any], fields: Mapping[str, str], names: tuple[str, str], where: str) -> list[Any]:
    for name, other in (names, names[::-1]):
        if found.get(name) is None:
            raise UserError(f"{where}: no field '{fields[name]}' beside '{fields[other]}'. See config.data.fields.")
    return [found[name] for name in names]


def _not_empty(text: str, field: str, where: str) -> str:
    if not text.strip():
        raise UserError(f"{where}: '{field}' is empty, so there is nothing to learn.")
    return text


def read_sharegpt(record: Mapping[str, Any], where: str) -> list[Message]:
    """The messages in `record["conversations"]`; a system prompt that stands beside them comes first.

    Raises:
      UserError: as `read_messages`.
    """
    messages, system = read_messages(record["conversations"], "conversations", where), record.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def read_messages(value: Any, field: str, where: str) -> list[Message]:
    """A list of messages; those of ShareGPT, {"from": …, "value": …}, with roles and names of fields as the others.

    Raises:
      UserError: no list of messages, or one with an unknown role or no content; with its number.
    """
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        # A list of objects as TensorFlow Datasets keeps it: an object of lists.
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        what = "is empty" if value == [] else f"is a {type(value).__name__}"
        raise UserError(f"{where}: '{field}' {what}, but must be a list of messages.")
    return [_message(message, f"{where}: message {number} of '{field}'") for number, message in enumerate(value, 1)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} is a {type(message).__name__}, but must be an object with role and content.")
    if "from" in message and "role" not in message:
        message = {"role": OTHER_ROLES.get(str(message["from"]), message["from"]), "content": message.get("value")}
    role = message.get("role")
    if role not in ROLES:
        known = OTHER_ROLES.get(str(role))
        hint = f"Write '{known}'." if known else did_you_mean(str(role), ROLES)
        raise UserError(f"{where}: {'no role' if role is None else f'the role {role!r} is unknown'}. {hint}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if content is None:
        raise UserError(f"{where} ({role}) has no content.")
    if not isinstance(content, list):  # a list of parts is the template's affair
        text_field(message, "content", where)
    return message


def read_tools(found: Mapping[str, Any], where: str) -> list[Any] | None:
    """found["tools"], of a conversation: a list, or the JSON of one."""
    tools = found.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError as error:
            raise UserError(f"{where}: 'tools' is no JSON: {error}.") from error
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{where}: 'tools' is a {type(tools).__name__}, but must be a list.")
    return tools or None


def find_field(record: Mapping[str, Any], name: str) -> Any:
    """record[name], or what the parts of "a.0.b" lead to; MISSING where there is nothing."""
    if name in record:
        return record[name]
    found: Any = record
    for part in name.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return MISSING
    return found


def plain(value: Any) -> Any:
    """Without the bytes and arrays of TensorFlow Datasets."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    return value
