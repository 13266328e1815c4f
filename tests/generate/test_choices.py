"""Multiple choice against the definition of its three rules."""

import numpy as np
import pytest

from jaxllm.data.choices import Question
from jaxllm.errors import UserError
from jaxllm.generate.choices import ChoiceScore, answer
from jaxllm.generate.likelihood import Likelihood, Scorer

QUESTIONS = [
    Question("却说曹操", ["引兵追赶", "dog", "玄德大惊。玄德大惊。"], 0, "a:1", "a"),
    Question("the quick", ["brown fox", "惊", "x", "lazy dog; User"], 3, "a:2", "a"),
    Question("", ["大", "over the lazy"], 1, "a:3", "a"),
]


class Told(Scorer):
    """Likelihoods from a list."""

    def __init__(self, *nats):
        self.nats = nats

    def pair(self, context, continuation):
        return context, continuation

    def likelihoods(self, pairs, on_done=None):
        self.pairs = pairs
        return [Likelihood(nats, False) for nats in self.nats]


def test_the_three_rules():
    question = Question("p", ["ab", "惊惊惊惊", "abcdef"], 1, "a:1", "a")
    scorer = Told(-2.0, -3.0, -3.6)  # a character: 1, 0.75, 0.6; a byte: 1, 0.25, 0.6
    assert answer(scorer, [question], delimiter="|") == [ChoiceScore(1, 0, 0, 1)]
    assert scorer.pairs == [("p", "|ab"), ("p", "|惊惊惊惊"), ("p", "|abcdef")]
    assert answer(scorer, [question._replace(answer=0)]) == [ChoiceScore(1, 1, 0, 0)]
    assert answer(scorer, [question._replace(answer=2)]) == [ChoiceScore(1, 0, 1, 0)]


def test_a_choice_is_scored_after_its_prompt(run):
    scorer = Scorer(run, 4)
    for question, score in zip(QUESTIONS, answer(scorer, QUESTIONS), strict=True):
        pairs = [scorer.pair(question.prompt, " " + choice) for choice in question.choices]
        nats = np.array([scorer.likelihoods([pair])[0].nats for pair in pairs])
        sizes = [np.ones(len(nats)), [len(c) for c in question.choices], [len(c.encode()) for c in question.choices]]
        assert score == ChoiceScore(1, *(int((nats / size).argmax() == question.answer) for size in sizes))


def test_scores_add_up():
    total = sum([ChoiceScore(1, 0, 1, 1), ChoiceScore(1, 0, 0, 1)], ChoiceScore(2, 1, 0, 1))
    assert total == ChoiceScore(4, 1, 1, 3)
    assert (total.acc, total.acc_norm, total.acc_bytes) == (0.25, 0.25, 0.75)


def test_a_choice_longer_than_the_context_names_file_and_line(run):
    long = Question("a", ["b", "x" * 70], 0, "questions.jsonl:7", "questions.jsonl")
    with pytest.raises(UserError, match=r"questions\.jsonl:7: the continuation has 71 tokens, more than"):
        answer(Scorer(run), [*QUESTIONS, long])
