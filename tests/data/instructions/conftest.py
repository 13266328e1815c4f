"""Conversations to build sets of."""

import random

import pytest

from jaxllm.data.instructions.shapes import Talk

ENGLISH = ["river", "bridge", "stone", "water", "green", "light", "letter", "window", "garden", "music", "paper"]
CHINESE = "山水风云花鸟鱼虫日月星河春夏秋冬东西南北金木火土天地人和书画琴棋诗酒茶香红黄蓝白黑青江湖海洋"


@pytest.fixture
def talk():
    """A conversation of a question and an answer."""

    def make(question: str, answer: str, origin: str = "a.jsonl:1") -> Talk:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Talk(messages, None, origin)

    return make


@pytest.fixture
def sentence():
    """sentence(number, chinese) of 40 words or characters; two of them share next to nothing."""

    def make(number: int, chinese: bool = False) -> str:
        draw = random.Random(number)
        return "".join(draw.choices(CHINESE, k=40)) if chinese else " ".join(draw.choices(ENGLISH, k=40))

    return make
