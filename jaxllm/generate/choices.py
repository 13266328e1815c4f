"""Multiple choice: the model's answer is the choice that it finds most probable after the prompt."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from jaxllm.data.choices import Question
from jaxllm.errors import UserError
from jaxllm.generate.likelihood import Likelihood, Pair, Scorer


@dataclass(frozen=True)
class ChoiceScore:
    """Questions answered right, by three rules that lm-evaluation-harness names `acc`, `acc_norm` and `acc_bytes`."""

    questions: int
    right: int  # by the log-likelihood of the choice
    right_by_characters: int  # by that divided by the characters of the choice
    right_by_bytes: int  # by that divided by its UTF-8 bytes

    def __add__(self, other: "ChoiceScore") -> "ChoiceScore":
        """The score of both together."""
        mine, others = asdict(self), asdict(other)
        return ChoiceScore(**{name: mine[name] + others[name] for name in mine})

    def __str__(self) -> str:
        return f"{self.questions:,} questions"

    @property
    def acc(self) -> float:
        return self.right / self.questions

    @property
    def acc_norm(self) -> float:
        return self.right_by_characters / self.questions

    @property
    def acc_bytes(self) -> float:
        return self.right_by_bytes / self.questions

    def as_dict(self) -> dict[str, float]:
        """All of it, ready for JSON."""
        return {name: getattr(self, name) for name in ("acc", "acc_norm", "acc_bytes")} | asdict(self)


def answer(
    scorer: Scorer, questions: Sequence[Question], *, delimiter: str = " ", on_done: Callable[[int], None] | None = None
) -> list[ChoiceScore]:
    """The score of each question, in their order; `sum` of them is that of the whole.

    Args:
      delimiter: stands between prompt and choice; its tokens are a part of the choice, its length is not.
      on_done: called with the number of choices done since it was called last.

    Raises:
      UserError: a choice longer than the model's context, with the question's file and line.
    """
    pairs = [_pair(scorer, question, delimiter + choice) for question in questions for choice in question.choices]
    results = iter(scorer.likelihoods(pairs, on_done))
    return [_score(question, [next(results) for _ in question.choices]) for question in questions]


def _pair(scorer: Scorer, question: Question, continuation: str) -> Pair:
    try:
        return scorer.pair(question.prompt, continuation)
    except UserError as error:
        raise UserError(f"{question.origin}: {error}") from None


def _score(question: Question, likelihoods: Sequence[Likelihood]) -> ChoiceScore:
    nats = np.array([likelihood.nats for likelihood in likelihoods])
    characters = np.array([len(choice) for choice in question.choices])
    size = np.array([len(choice.encode()) for choice in question.choices])
    best = (nats.argmax(), (nats / characters).argmax(), (nats / size).argmax())
    return ChoiceScore(1, *(int(choice == question.answer) for choice in best))
