"""Multiple-choice questions: one JSON object a line, in the spellings that public test sets use."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.data import files
from jaxllm.data.sources import read_records, text_field
from jaxllm.errors import UserError

SPELLINGS = {
    "prompt": ("prompt", "question", "query", "context", "ctx"),
    "choices": ("choices", "options", "endings"),
    "answer": ("answer", "label", "gold", "target", "answerKey"),
}


class Question(NamedTuple):
    """A prompt, what may follow it, and what should."""

    prompt: str
    choices: list[str]
    answer: int  # the index of the right choice
    origin: str  # for messages: "test.jsonl:17"
    file: str


def read_questions(paths: str) -> list[Question]:
    """The questions of jsonl files (plain, .gz or .zst), globs or folders, joined by commas.

    A record holds a prompt, choices and an answer, each by one of its `SPELLINGS`. Choices are a list of texts, or an
    object {"text": [...], "label": [...]}. The answer is the text of a choice, else its label, else its index from 0
    (a number, or written as one), else its letter from A.

    Raises:
      UserError: nothing there, or a record that is no question, with file and line.
    """
    found = files.find_files(paths, (".jsonl", ".ndjson"), "questions")
    questions = [_question(record, where, str(file.path)) for file in found for record, where, _ in read_records(file)]
    if not questions:
        raise UserError(f"{paths}: no question: there is nothing in it.")
    return questions


def _question(record: Any, where: str, file: str) -> Question:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a {type(record).__name__}, but each line must be an object with a prompt.")
    prompt, choices, answer = (_field(record, name, where) for name in SPELLINGS)
    prompt = text_field({"prompt": prompt}, "prompt", where)
    labels: Any = ()
    if isinstance(choices, Mapping):
        choices, labels = choices.get("text"), choices.get("label")
    if not isinstance(choices, list):
        raise UserError(f"{where}: the choices are a {type(choices).__name__}, but must be a list of texts.")
    choices = [text_field({"choice": choice}, "choice", where) for choice in choices]
    if "" in choices:
        raise UserError(f"{where}: choice {choices.index('')} is empty.")
    if len(choices) < 2:
        raise UserError(f"{where}: there must be two choices or more; here are {len(choices)}.")
    return Question(
        prompt, choices, _answer(answer, choices, labels if isinstance(labels, list) else (), where), where, file
    )


def _field(record: Mapping[str, Any], name: str, where: str) -> Any:
    for spelling in SPELLINGS[name]:
        if spelling in record:
            return record[spelling]
    raise UserError(
        f"{where}: no field '{name}' (nor {', '.join(SPELLINGS[name][1:])}). There are: {', '.join(record) or 'none'}."
    )


def _answer(answer: Any, choices: Sequence[str], labels: Sequence[Any], where: str) -> int:
    """The index of the right choice."""
    for names in (choices, labels):
        if answer in names:
            return names.index(answer)
    index = answer
    if isinstance(answer, str):
        letter = len(answer) == 1 and "A" <= answer <= "Z"
        index = ord(answer) - ord("A") if letter else int(answer) if answer.isdecimal() else answer
    if not isinstance(index, int) or isinstance(index, bool):
        raise UserError(f"{where}: the answer {answer!r} is neither a choice nor the index of one.")
    if not 0 <= index < len(choices):
        raise UserError(f"{where}: the answer {answer!r} is out of range: there are {len(choices)} choices, from 0 on.")
    return index
