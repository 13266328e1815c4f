"""Rewards of tests/benchmarks/alignment.py, as a user writes them."""

import random

GOOD = set("acegi")
LENGTH = 8
_coin = random.Random(0)


def good_letters(completions, **columns):
    """The part of an answer's eight letters that are good ones; nothing of an answer of another length."""
    answers = [text.split() for text in completions]
    return [sum(letter in GOOD for letter in answer) / LENGTH * (len(answer) == LENGTH) for answer in answers]


def is_exact(completions, answer):
    """1 for the right answer."""
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


def coin(completions, **columns):
    """1 or 0, whatever the answer: the control."""
    return [float(_coin.random() < 0.5) for _ in completions]
