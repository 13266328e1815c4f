"""Each rule on what it removes and on what looks like it."""

import pytest

from jaxllm.data.instructions.filters import RULES, make_rules
from jaxllm.data.instructions.shapes import Talk
from jaxllm.errors import UserError

GERMAN = "Der Hund läuft am frühen Morgen durch den Wald, und niemand weiß genau, wohin er eigentlich will."
ENGLISH = "The dog runs through the wood early in the morning, and nobody knows exactly where it wants to go."
CHINESE = "清晨，那只狗穿过树林奔跑着，没有人知道它究竟想要到哪里去，也没有人去问它为什么要跑。"


def removed_by(talk: Talk, **settings) -> str | None:
    how = {"min_length": 0, "max_length": 0, "languages": [], "allow": []} | settings
    return next((rule.name for rule in make_rules(**how) if rule.removes(talk)), None)


def roles(*spoken: tuple[str, object]) -> Talk:
    return Talk([{"role": role, "content": content} for role, content in spoken], None, "a:1")


@pytest.mark.parametrize(
    ("spoken", "rule"),
    [
        ((("user", [{"type": "image"}]), ("assistant", "x")), "not_text"),
        ((("user", ""), ("assistant", "x")), "empty_question"),
        ((("user", "x"), ("assistant", "")), "empty_answer"),
        ((("user", "x"),), "unanswered"),
        ((("user", "x"), ("user", "y"), ("assistant", "z")), "unanswered"),
        ((("user", "x"), ("assistant", "y"), ("user", "z")), "unanswered"),
        ((("system", "s"),), "unanswered"),
        ((("assistant", "x"), ("user", "y"), ("assistant", "z")), "unasked"),
        ((("system", "s"), ("user", "x"), ("tool", "t"), ("assistant", "y")), None),
    ],
)
def test_turns(spoken, rule):
    assert removed_by(roles(*spoken)) == rule
    assert rule is None or removed_by(roles(*spoken), allow=[rule.name for rule in RULES]) is None


def test_a_call_of_a_tool_is_an_answer():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    assert removed_by(Talk([{"role": "user", "content": "x"}, call], None, "a:1")) is None


MARKS = (
    "<|im_start|>user",
    "a<|endoftext|>",
    "<｜User｜>x",
    "<start_of_turn>model",
    "[INST] x [/INST]",
    "<<SYS>>",
    "x</s>",
)
HEADS = ("### Response:\nx", "x\n### Instruction: y", "### 回答：x", "x\n\nHuman: y")


@pytest.mark.parametrize(
    "text", [*MARKS, *HEADS, "Below is an instruction that describes a task, paired with an input."]
)
def test_chat_markers(talk, text):
    assert removed_by(talk("x", text)) == removed_by(talk(text, "x")) == "chat_marker"


@pytest.mark.parametrize(
    "text",
    ["a <b> and x | y", "### Results\nx", "[INSTALL] it", "if a < b or c |> d", "HTML: <s>x</s> is struck"],
)
def test_what_is_no_chat_marker(talk, text):
    assert removed_by(talk("how so?", f"well, {text}")) is None


def test_placeholders(talk):
    assert removed_by(talk("Dear {{name}},", "x")) == "placeholder"
    assert removed_by(talk("x", "{% if y %}")) == "placeholder"
    assert removed_by(talk("x", "write `{{ name }}`, or\n```jinja\n{% if y %}\n```\nand {y: {z: 1}}")) is None


def test_lengths_are_those_of_all_messages(talk):
    assert removed_by(talk("四个字了", "四个字了"), min_length=9) == "too_short"
    assert removed_by(talk("四个字了", "四个字了"), min_length=8, max_length=8) is None
    assert removed_by(talk("四个字了", "四个字了"), max_length=7) == "too_long"


@pytest.mark.parametrize(("text", "code"), [(GERMAN, "de"), (ENGLISH, "en"), (CHINESE, "zh")])
def test_languages(talk, text, code):
    one = talk(text, text)
    assert removed_by(one, languages=[code]) is None
    assert removed_by(one, languages=["en", "zh", "de"]) is None
    assert removed_by(one, languages=["fr"]) == "language"


def test_what_has_no_language_stays(talk):
    assert removed_by(talk("12 + 7", "19"), languages=["zh"]) is None


def test_mistakes():
    with pytest.raises(UserError, match=r"--allow: 'empty' is no rule. Did you mean 'empty_"):
        make_rules(0, 0, [], ["empty"])
    with pytest.raises(UserError, match="--languages: 'english' is no language"):
        make_rules(0, 0, ["english"], [])
