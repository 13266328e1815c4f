"""Words and ROUGE-L in several scripts."""

import random

import pytest

from jaxllm.data.rouge import rouge_l
from jaxllm.data.words import words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The quick-brown FOX's 2nd.", ["the", "quick", "brown", "fox", "s", "2nd"]),
        ("却说曹操，GPT４大惊。", ["却", "说", "曹", "操", "gpt4", "大", "惊"]),
        ("한국어 문장, ひらがな", ["한국어", "문장", "ひ", "ら", "が", "な"]),
        ("Straße ÉCOLE snake_case", ["strasse", "école", "snake", "case"]),
        ("?! …", []),
    ],
)
def test_words(text, found):
    assert words(text) == found


def longest_common(a, b):
    """By the table."""
    row = [0] * (len(b) + 1)
    for one in a:
        before = row
        row = [0]
        for i, other in enumerate(b):
            row.append(before[i] + 1 if one == other else max(before[i + 1], row[i]))
    return row[-1]


def test_rouge_l_by_its_formula():
    draw = random.Random(0)
    for _ in range(200):
        a, b = (draw.choices("abcde", k=draw.randint(1, 12)) for _ in range(2))
        common = longest_common(a, b)
        precision, recall = common / len(a), common / len(b)
        f1 = 2 * precision * recall / (precision + recall) if common else 0.0
        assert rouge_l(a, b) == pytest.approx(f1)
        assert rouge_l(a, b, at_least=0.5) == pytest.approx(f1 if f1 >= 0.5 else 0)
    assert rouge_l([], []) == rouge_l(["a"], []) == 0


def test_rouge_l_is_the_usual_one():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    a, b = "Give three tips for staying healthy, please.", "Give me two tips to stay healthy"
    assert rouge_l(words(a), words(b)) == pytest.approx(scorer.score(a, b)["rougeL"].fmeasure)
