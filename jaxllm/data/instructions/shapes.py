"""Records of the common shapes, each recognised by its fields, as conversations.

    {"messages": [{"role", "content"}, …]}                                   "tools" beside it, if any
    {"conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, …]}            ShareGPT
    {"instruction", "instances": [{"input", "output"}, …]}                   Self-Instruct: an example an instance
    {"instruction", "input", "output"}                                       Alpaca; Dolly's context and response too
    {"prompt", "completion"}, {"question", "answer"}                         texts, or lists of messages
    {"chosen"}                                                               of a preference, what was preferred

A system prompt may stand beside any of them as "system" or "system_prompt".
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxllm.data.chat_template import Message
from jaxllm.data.examples import (
    MISSING,
    OTHER_ROLES,
    find_field,
    plain,
    read_messages,
    read_tools,
    with_input,
)
from jaxllm.data.sources import Record, text_field
from jaxllm.errors import UserError

QUESTIONS = ("instruction", "prompt", "question", "query")
FURTHER = ("input", "context")  # of an instruction
ANSWERS = ("output", "completion", "answer", "response", "chosen")
SYSTEM = ("system", "system_prompt")
TURN = re.compile(r"\n\n(Human|Assistant):")


class Talk(NamedTuple):
    """A conversation and where it is from. Contents have no white space around them."""

    messages: list[Message]
    tools: list[Any] | None
    origin: str

    @property
    def text(self) -> str:
        """What user, assistant and tools say, without the system prompt."""
        return "\n".join(m["content"] for m in self.messages if m["role"] != "system" and isinstance(m["content"], str))

    @property
    def num_characters(self) -> int:
        """Of all messages."""
        return sum(len(m["content"]) for m in self.messages if isinstance(m["content"], str))


def read_talks(record: Record, fields: Mapping[str, str]) -> list[Talk]:
    """The conversations in a record, one but for Self-Instruct's; `fields` as jaxllm.data.examples.parse_fields gives.

    What is empty or missing in a record of a known shape becomes an empty message.

    Raises:
      UserError: a record of no known shape, a plain text, unknown roles, or something that is no text; with its line.
    """
    where = record.origin
    if not isinstance(record.value, Mapping):
        raise UserError(f"{where}: a {type(record.value).__name__}, but each example must be an object.")
    value = _renamed(plain(record.value), fields)
    found = _read(value, where)
    if found is None:
        raise _shapeless(record.value, where)
    system, tools = next(filter(None, map(value.get, SYSTEM)), ""), read_tools(value, where)
    talks = []
    for number, messages in enumerate(found, 1):
        if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        origin = f"{where} instance {number}" if len(found) > 1 else where
        talks.append(Talk([_stripped(message) for message in messages], tools, origin))
    return talks


def _renamed(value: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """With the fields of other names under their own."""
    found = {field: find_field(value, name) for field, name in fields.items() if name != field}
    return {**value, **{field: item for field, item in found.items() if item is not MISSING}}


def _read(value: Mapping[str, Any], where: str) -> list[list[Message]] | None:
    """The messages of each conversation in a record; None where it has no known shape."""
    for field in ("messages", "conversations"):
        if value.get(field) is not None:
            return [_messages(value[field], field, where)]
    if value.get("instances") is not None:
        return _instances(value, where)
    question, answer = _first(value, QUESTIONS), _first(value, ANSWERS)
    if question and answer:
        return [_question_and_answer(value, question, answer, where)]
    if isinstance(value.get("chosen"), list):
        return [_messages(value["chosen"], "chosen", where)]
    if isinstance(value.get("chosen"), str) and TURN.match(value["chosen"]):
        return [_transcript(value["chosen"])]
    return None


def _shapeless(value: Mapping[str, Any], where: str) -> UserError:
    if isinstance(value.get("text"), str):
        return UserError(
            f"{where}: a plain text, of which nobody knows what is asked and what is answered. Train on such a file as "
            "it is (config.data.path), or name the fields: --config.data.fields=prompt=…,completion=…."
        )
    return UserError(
        f"{where}: no known shape: its fields are {', '.join(map(str, value)) or 'none'}. Known are messages; "
        "conversations; instruction and output, input beside them; prompt and completion; question and answer. Say "
        "which is which, for example --config.data.fields=prompt=title,completion=body."
    )


def _first(value: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first name under which there is something; else the first that is there at all."""
    there = [name for name in names if name in value]
    return next((name for name in there if value[name] is not None), there[0] if there else None)


def _messages(value: Any, field: str, where: str) -> list[Message]:
    """A list of messages, or the JSON of one, as a CSV file holds it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: '{field}' is neither a list of messages nor its JSON: {error}.") from error
    if isinstance(value, list):
        value = [_usual(message) for message in value]
    return read_messages(value, field, where)


def _usual(message: Any) -> Any:
    """A message with a known name of its role, and with a content, if an empty one."""
    if not isinstance(message, Mapping):
        return message
    names = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    role, content = map(message.get, names)
    role = OTHER_ROLES.get(str(role), role)
    return {**message, names[0]: role, names[1]: "" if content is None else content}


def _question_and_answer(value: Mapping[str, Any], question: str, answer: str, where: str) -> list[Message]:
    asked, said = value[question], value[answer]
    if isinstance(said, list):
        said = _messages(said, answer, where)
        begins = said[0]["role"] in ("user", "system")  # then it holds the question too
        return said if begins else [*_asked(asked, question, where), *said]
    if isinstance(said, str) and answer == "chosen" and TURN.match(said):
        return _transcript(said)
    asked = _asked(asked, question, where)
    if question == "instruction" and (further := _first(value, FURTHER)):
        asked[-1]["content"] = with_input(asked[-1]["content"], _text(value, further, where))
    return [*asked, {"role": "assistant", "content": _text(value, answer, where)}]


def _asked(asked: Any, question: str, where: str) -> list[Message]:
    if isinstance(asked, list):
        return _messages(asked, question, where)
    return [{"role": "user", "content": _text({question: asked}, question, where)}]


def _instances(value: Mapping[str, Any], where: str) -> list[list[Message]]:
    instances = value["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(one, Mapping) for one in instances):
        raise UserError(f"{where}: 'instances' must be a list of objects with input and output.")
    found = []
    for number, one in enumerate(instances, 1):
        place = f"{where}: instance {number}"
        asked = with_input(_text(value, "instruction", where), _text({"input": "", **one}, "input", place))
        said = _text(one, "output", place)
        found.append([{"role": "user", "content": asked}, {"role": "assistant", "content": said}])
    return found


def _transcript(text: str) -> list[Message]:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …"."""
    _, *parts = TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _text(value: Mapping[str, Any], field: str, where: str) -> str:
    return "" if field in value and value[field] is None else text_field(value, field, where)


def _stripped(message: Message) -> Message:
    """Without white space around the content, which may be parts that are all text, and without empty columns."""
    content = message["content"]
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "\n".join(part["text"] for part in content)
    content = content.strip() if isinstance(content, str) else content
    return {name: value for name, value in {**message, "content": content}.items() if value is not None}
