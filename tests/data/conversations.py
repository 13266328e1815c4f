"""Random conversations: empty turns, system prompts, tool turns, Chinese, emoji, and odd white space."""

import random

WORDS = ("却说", "曹操", "引兵", "The", "quick", "fox", "😀", "👩🏽‍🚀", "naïve", "café", "x=1984", "answer")
WORDS += ("\n", "\t", "\u3000", "<b>", "&", '"it\'s"', "🇨🇳")


def conversations(number: int, seed: int = 0, tools: bool = True) -> list[list[dict[str, str]]]:
    """So many of them; users and assistants take turns, and with `tools` a tool may speak between two answers."""
    draw = random.Random(seed)
    return [_conversation(draw, tools) for _ in range(number)]


def _conversation(draw: random.Random, tools: bool) -> list[dict[str, str]]:
    talk = [{"role": "system", "content": _text(draw)}] if draw.random() < 0.4 else []
    for _ in range(draw.randint(1, 4)):
        talk += [{"role": "user", "content": _text(draw)}, {"role": "assistant", "content": _text(draw)}]
        if tools and draw.random() < 0.25:
            talk += [{"role": "tool", "content": _text(draw)}, {"role": "assistant", "content": _text(draw)}]
    # Something is said, at last.
    return [*talk[:-1], {"role": "assistant", "content": _text(draw) + "end"}]


def _text(draw: random.Random) -> str:
    if draw.random() < 0.15:
        return ""
    return draw.choice(["", " "]).join(draw.choice(WORDS) for _ in range(draw.randint(1, 12)))
