"""Self-Instruct (Wang et al. 2022, section 2): a model writes new instructions after a few examples, then solves them.

A round has two steps. Several prompts, each with 6 seed tasks and 2 of those written before, ask for further
instructions; those pass that are long enough, need neither pictures nor files, and are new: ROUGE-L under a threshold
with every one that is there. Then each is shown after a few tasks with input and output, and the model writes its own,
the input first. The paper's other way, for classification the output first, is left out: seed tasks that are marked as
classification serve in the first step alone. The prompts are worded anew.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from jaxllm.data.instructions.tasks import Task
from jaxllm.data.rouge import rouge_l
from jaxllm.data.words import words
from jaxllm.errors import UserError

SHOWN, SHOWN_OF_MODEL = 8, 2  # instructions in a prompt, and how many of them a model wrote
ASKED = 8  # instructions that a prompt asks for
SHOWN_WITH_OUTPUT = 4  # tasks in a prompt for an output
NUM_WORDS = (4, 150)  # of an instruction; each Chinese character is a word
# What a model of texts cannot do. A plural in s is meant too.
KEYWORDS = ("image", "picture", "photo", "graph", "chart", "diagram", "map", "file", "video", "draw", "plot", "go to")
KEYWORDS += ("图片", "图像", "照片", "图表", "地图", "文件", "视频")

INSTRUCTIONS = "This list has {count} tasks of many kinds. Write those that are missing.\n\n{tasks}"
OUTPUT = "For each task, give an input where it needs one, and the output.\n\n{tasks}"
NEXT_ITEM = re.compile(r"\n\s*(\d{1,4})\s*[.)．、:：][ \t]*")
ANSWER = re.compile(r"\s*(?:Input\s*[:：](?P<input>.*?)\n\s*)?Output\s*[:：](?P<output>.*)", re.DOTALL | re.IGNORECASE)
NEXT_TASK = re.compile(r"\n\s*(?:Task|Input|Example)\b[^\n:：]{0,9}[:：].*", re.DOTALL | re.IGNORECASE)
NO_INPUT = ("", "none", "n/a", "no input", "<noinput>", "无")


class Prompt(NamedTuple):
    """What the model is asked, and how its answer begins."""

    request: str
    begun: str = ""


class Written(NamedTuple):
    """What a model wrote after a prompt."""

    text: str
    whole: bool  # false where it was cut off: it was too long


class Writer(Protocol):
    """A model."""

    def fits(self, prompt: Prompt) -> bool: ...  # whether it leaves room for an answer

    def write(self, prompts: Sequence[Prompt], stop: str, seed: int | None) -> list[Written]:
        """What the model writes after each prompt, up to the text `stop`: drawn by `seed`, or the most probable."""
        ...


class Found(NamedTuple):
    """A new task."""

    task: Task
    rouge_l: float  # with the instruction it is most like


class SelfInstruct:
    """Writes new tasks. `rejected` counts by rule what was left out, instructions and outputs."""

    def __init__(
        self,
        seeds: Sequence[Task],
        written: Sequence[Task],
        writer: Writer,
        *,
        rouge: float = 0.7,
        num_prompts: int = 8,
        seed: int = 0,
    ):
        """
        Args:
          seeds: tasks that people wrote.
          written: tasks of an earlier call, to go on from.
          rouge: an instruction is left out from this ROUGE-L on.
          num_prompts: for instructions, at once.
          seed: of which tasks a prompt shows.

        Raises:
          UserError: no seed task that is no classification.
        """
        self._seeds, self._written, self._writer = list(seeds), list(written), writer
        self._solved = [task for task in seeds if not task.is_classification]
        if not self._solved:
            raise UserError("of the seed tasks one at least must be no classification.")
        self._rouge, self._num_prompts, self._seed = rouge, num_prompts, seed
        self._known = [words(task.instruction) for task in [*seeds, *written]]
        self._fruitless = 0  # rounds since something new was found
        self.rejected: Counter[str] = Counter()

    def round(self) -> Iterator[Found]:
        """The new tasks of one round, each as soon as it is there.

        Raises:
          UserError: the model's context has no room for one task.
        """
        draw = random.Random(f"{self._seed} {len(self._written)} {self._fruitless}")
        self._fruitless += 1
        prompts = [self._ask_for_instructions(draw) for _ in range(self._num_prompts)]
        numbers = [int(prompt.begun.removesuffix(".")) for prompt in prompts]
        texts = self._writer.write(prompts, f"\n{SHOWN + ASKED + 1}.", draw.randrange(1 << 31))
        items = [item for text, number in zip(texts, numbers, strict=True) for item in parse_list(text, number)]
        new = [(item, like) for item in items if (like := self._new(item)) is not None]
        for start in range(0, len(new), self._num_prompts):
            yield from self._solve(new[start : start + self._num_prompts], draw)

    def _new(self, instruction: str) -> float | None:
        """The ROUGE-L with the most similar instruction; None where it is rejected. A new one is known from now on."""
        said = words(instruction)
        like = max(rouge_l(said, known) for known in self._known)
        if rule := unfit(said) or ("similar" if like >= self._rouge else ""):
            self.rejected[rule] += 1
            return None
        self._known.append(said)
        return like

    def _solve(self, new: Sequence[tuple[str, float]], draw: random.Random) -> Iterator[Found]:
        prompts = [self._ask_for_output(instruction, draw) for instruction, _ in new]
        for (instruction, like), text in zip(new, self._writer.write(prompts, "\nTask:", None), strict=True):
            given, rule = parse_answer(text, instruction)
            if rule:
                self.rejected[rule] += 1
                continue
            task = Task(instruction, *given)
            self._written.append(task)
            self._fruitless = 0
            yield Found(task, like)

    def _ask_for_instructions(self, draw: random.Random) -> Prompt:
        of_model = draw.sample(self._written, min(SHOWN_OF_MODEL, len(self._written)))
        shown = draw.sample(self._seeds, min(SHOWN - len(of_model), len(self._seeds))) + of_model
        draw.shuffle(shown)

        def prompt(tasks: Sequence[Task]) -> Prompt:
            lines = [f"{number}. {_one_line(task.instruction)}" for number, task in enumerate(tasks, 1)]
            return Prompt(INSTRUCTIONS.format(count=SHOWN + ASKED, tasks="\n".join(lines)), f"{len(tasks) + 1}.")

        return self._longest(prompt, shown)

    def _ask_for_output(self, instruction: str, draw: random.Random) -> Prompt:
        shown = draw.sample(self._solved, min(SHOWN_WITH_OUTPUT, len(self._solved)))

        def prompt(tasks: Sequence[Task]) -> Prompt:
            shown = [*map(_with_output, tasks), f"Task: {instruction}"]
            return Prompt(OUTPUT.format(tasks="\n\n".join(shown)))

        return self._longest(prompt, shown)

    def _longest(self, prompt: Callable[[Sequence[Task]], Prompt], shown: Sequence[Task]) -> Prompt:
        """The prompt with as many of the tasks, and at least one, as leave room for an answer."""
        for count in range(len(shown), 0, -1):
            if self._writer.fits(longest := prompt(shown[:count])):
                return longest
        raise UserError(
            "the model's context has no room for a prompt with one task, and for an answer. Take a model with a longer "
            "one, shorter seed tasks, or a smaller --max_new_tokens."
        )


def unfit(instruction: Sequence[str]) -> str:
    """The rule by which an instruction, in words, is left out; empty where it is not."""
    fewest, most = NUM_WORDS
    if len(instruction) < fewest:
        return "too_short"
    if len(instruction) > most:
        return "too_long"
    text = f" {' '.join(instruction)} "
    return "keyword" if any(keyword in text for keyword in _KEYWORDS) else ""


def parse_list(written: Written, number: int) -> list[str]:
    """The items of a numbered list that goes on within item `number`; one that was cut off is left out."""
    first, *rest = NEXT_ITEM.split(written.text)
    items = [first, *rest[1::2]][: None if written.whole else -1]
    numbers = [number, *map(int, rest[::2])]
    in_order = itertools.takewhile(lambda i: numbers[i] == number + i, range(len(items)))
    paragraphs = [items[i].strip().split("\n\n")[0] for i in in_order]
    return [line for line in map(_one_line, paragraphs) if line]


def parse_answer(written: Written, instruction: str) -> tuple[tuple[str, str], str]:
    """((input, output), "") of what a model wrote for a task; or, with the rule, why it is left out."""
    found = ANSWER.match(written.text)
    if found is None:
        return ("", ""), "no_output"
    given = NEXT_TASK.sub("", found["input"] or "").strip()
    given = "" if given.casefold() in NO_INPUT else given
    output = NEXT_TASK.sub("", found["output"])
    if not written.whole and output == found["output"]:
        return ("", ""), "cut_off"
    output = output.strip()
    if not output:
        return ("", ""), "no_output"
    if words(output) in (words(given), words(instruction)):
        return ("", ""), "repeats"
    return (given, output), ""


def _with_output(task: Task) -> str:
    lines = [f"Task: {_one_line(task.instruction)}", f"Input: {task.input}", f"Output: {task.output}"]
    return "\n".join(lines if task.input else [lines[0], lines[2]])


def _one_line(text: str) -> str:
    return " ".join(text.split())


_KEYWORDS = [f" {' '.join(words(keyword))}{plural} " for keyword in KEYWORDS for plural in ("", "s")]
