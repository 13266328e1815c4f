"""Rules by which a conversation is left out, each with a name to count it by."""

import itertools
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from jaxllm.data.instructions.languages import Languages
from jaxllm.data.instructions.shapes import Talk
from jaxllm.errors import UserError, did_you_mean

CHAT_MARKERS = re.compile(
    r"<[|｜][\w▁ -]+[|｜]>"  # <|im_start|>, <|endoftext|>, <｜User｜>
    r"|</?(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
    r"|^<s>|</s>$"
    r"|^\#{2,3} ?(?:Instruction|Input|Response|Human|Assistant|User|System|指令|输入|回答|输出)[:：]"
    r"|\n\n(?:Human|Assistant):"
    r"|^Below is an instruction that describes a task\b",
    re.MULTILINE | re.IGNORECASE,
)
PLACEHOLDERS = re.compile(r"\{\{|\{%")
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)


class Rule(NamedTuple):
    """What is left out: `removes(talk)`."""

    name: str
    what: str
    removes: Callable[[Talk], bool]


def not_text(talk: Talk) -> bool:
    return any(not isinstance(message["content"], str) for message in talk.messages)


def empty_question(talk: Talk) -> bool:
    return any(message["role"] == "user" and not message["content"] for message in talk.messages)


def empty_answer(talk: Talk) -> bool:
    answers = [message for message in talk.messages if message["role"] == "assistant"]
    return any(not message["content"] and not message.get("tool_calls") for message in answers)


def unanswered(talk: Talk) -> bool:
    roles = _speakers(talk)
    return roles[-1:] != ["assistant"] or any(pair == ("user", "user") for pair in itertools.pairwise(roles))


def unasked(talk: Talk) -> bool:
    return _speakers(talk)[:1] == ["assistant"]


def chat_marker(talk: Talk) -> bool:
    return any(CHAT_MARKERS.search(text) for text in _texts(talk))


def placeholder(talk: Talk) -> bool:
    return any(PLACEHOLDERS.search(CODE.sub("", text)) for text in _texts(talk))


RULES = (
    Rule("not_text", "a part that is no text, say an image", not_text),
    Rule("empty_question", "a message of the user's without words", empty_question),
    Rule("empty_answer", "an answer without words", empty_answer),
    Rule("unanswered", "a message of the user's that nobody answers", unanswered),
    Rule("unasked", "an answer that comes before any question", unasked),
    Rule("chat_marker", "a chat template's marks, such as <|im_start|>, [INST] or ### Response:", chat_marker),
    Rule("placeholder", "a template's {{ or {% outside code", placeholder),
)


def make_rules(min_length: int, max_length: int, languages: Collection[str], allow: Collection[str]) -> list[Rule]:
    """The rules in their order; a conversation is counted by the first that removes it.

    Args:
      min_length, max_length: in characters of all messages; 0 is no bound.
      languages: two- or three-letter codes; none: any language.
      allow: names of rules that are not applied.

    Raises:
      UserError: a rule or a language that is not known.
    """
    names = [rule.name for rule in RULES]
    if unknown := next((name for name in allow if name not in names), None):
        raise UserError(f"--allow: '{unknown}' is no rule. {did_you_mean(unknown, names)}")
    rules = [rule for rule in RULES if rule.name not in allow]
    if min_length:
        rules.append(Rule("too_short", f"under {min_length:,} characters", lambda t: t.num_characters < min_length))
    if max_length:
        rules.append(Rule("too_long", f"over {max_length:,} characters", lambda t: t.num_characters > max_length))
    if languages:
        known = Languages(languages)
        rules.append(Rule("language", f"not in {', '.join(languages)}", lambda t: known.is_another(t.text)))
    return rules


def _texts(talk: Talk) -> Iterator[str]:
    return (message["content"] for message in talk.messages if isinstance(message["content"], str))


def _speakers(talk: Talk) -> list[str]:
    """Who speaks, the tools and the system left out."""
    return [message["role"] for message in talk.messages if message["role"] in ("user", "assistant")]
