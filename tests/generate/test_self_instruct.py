"""Self-Instruct with a model that is a function from text to text: what it is shown, what passes, and going on."""

import itertools
import random
import re

import pytest

from jaxllm.data.instructions.tasks import Task
from jaxllm.data.rouge import rouge_l
from jaxllm.data.words import words
from jaxllm.errors import UserError
from jaxllm.generate.self_instruct import Prompt, SelfInstruct, Written, parse_answer, parse_list, unfit

SEEDS = [Task(f"Seed s{i} a{i} b{i} c{i}", f"in {i}" if i % 2 else "", f"out {i}", i % 5 == 0) for i in range(20)]
CHINESE = "山水风云花鸟鱼虫日月星河春夏秋冬东西南北金木火土天地人和"


class Fake:
    """A model that is a function from text to text."""

    def __init__(self, function, room=10**6):
        self.function, self.room, self.prompts, self.seeds = function, room, [], []

    def fits(self, prompt: Prompt) -> bool:
        return len(prompt.request) <= self.room

    def write(self, prompts, stop, seed):
        self.prompts += prompts
        self.seeds.append(seed)
        texts = [self.function(f"{prompt.request}\n{prompt.begun}") for prompt in prompts]
        return [Written(text.split(stop)[0], True) for text in texts]


def inventor(prompt: str) -> str:
    """Instructions of words drawn by the prompt, and for each an output."""
    draw = random.Random(prompt)
    if prompt.endswith("\n"):
        return f"Input: {draw.randint(0, 99)}\nOutput: yes {draw.randint(0, 99)}\n\nTask: more"
    first = int(re.findall(r"(\d+)\.$", prompt)[0])
    said = ["".join(draw.choices(CHINESE, k=8)) if draw.random() < 0.5 else f"Do {draw.random()} now" for _ in range(9)]
    return " " + "\n".join(item if i == 0 else f"{first + i}. {item}" for i, item in enumerate(said))


def expand(fake, count, written=(), **how):
    expansion = SelfInstruct(SEEDS, written, fake, **{"num_prompts": 3} | how)
    found = list(itertools.islice(itertools.chain.from_iterable(expansion.round() for _ in range(50)), count))
    return found, expansion


def shown(prompt: Prompt) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", prompt.request, re.MULTILINE)


def test_what_is_found_is_new_and_solved():
    found, expansion = expand(Fake(inventor), 60)
    assert len(found) == 60
    known = [words(seed.instruction) for seed in SEEDS]
    for task, like in found:
        said = words(task.instruction)
        assert max(rouge_l(said, other) for other in known) <= like < 0.7
        assert task.input.isdigit() and re.fullmatch(r"yes \d+", task.output)
        known.append(said)
    assert expansion.rejected["similar"] == sum(expansion.rejected.values())


def test_prompts_show_six_seeds_and_two_of_the_models():
    fake = Fake(inventor)
    found, _ = expand(fake, 60)
    asked = [prompt for prompt in fake.prompts if prompt.begun]
    seeds, written = {seed.instruction for seed in SEEDS}, {task.instruction for task, _ in found}
    assert all(len(shown(prompt)) == 8 and prompt.begun == "9." for prompt in asked)
    assert all(set(shown(prompt)) <= seeds for prompt in asked[:3])
    of_model = [len(set(shown(prompt)) & written) for prompt in asked[3:]]
    assert set(of_model) == {2}
    assert len({prompt.request for prompt in asked}) == len(asked)


def test_outputs_are_written_after_tasks_with_outputs():
    """Drawn are instructions alone; seed tasks of classification are not shown with outputs."""
    fake = Fake(inventor)
    expand(fake, 60)
    solving = [prompt for prompt in fake.prompts if not prompt.begun]
    tasks = [re.findall(r"^Task: (.*)$", prompt.request, re.MULTILINE) for prompt in solving]
    assert {len(task) for task in tasks} == {5}
    classes = {seed.instruction for seed in SEEDS if seed.is_classification}
    assert not classes & {task for shown in tasks for task in shown}
    assert "\n\nTask: Seed s1 a1 b1 c1\nInput: in 1\nOutput: out 1\n\n" in "".join(prompt.request for prompt in solving)
    assert sum(seed is None for seed in fake.seeds) > 0 < sum(seed is not None for seed in fake.seeds)


def test_the_seed_decides_and_a_stopped_run_goes_on():
    found, _ = expand(Fake(inventor), 60)
    assert expand(Fake(inventor), 60)[0] == found != expand(Fake(inventor), 60, seed=1)[0]
    before = [task for task, _ in found[:20]]
    more, _ = expand(Fake(inventor), 40, before)
    everything = [words(task.instruction) for task in [*SEEDS, *before, *(task for task, _ in more)]]
    assert all(rouge_l(a, b) < 0.7 for a, b in itertools.combinations(everything, 2))


def test_a_model_that_repeats_gives_nothing():
    fake = Fake(lambda prompt: f" {SEEDS[0].instruction}\n10. {SEEDS[1].instruction}")
    found, expansion = expand(fake, 1)
    assert found == []
    assert expansion.rejected == {"similar": 50 * 3 * 2}
    assert len({prompt.request for prompt in fake.prompts}) > 100  # it was asked in other words


def test_in_a_short_context_less_is_shown():
    fake = Fake(inventor, room=170)
    expand(fake, 5)
    assert {len(shown(prompt)) for prompt in fake.prompts if prompt.begun} == {4}
    assert {prompt.begun for prompt in fake.prompts} == {"5.", ""}
    with pytest.raises(UserError, match="no room for a prompt with one task"):
        expand(Fake(inventor, room=20), 1)


def test_a_seed_task_with_an_output_is_needed():
    with pytest.raises(UserError, match="one at least must be no classification"):
        SelfInstruct([Task("x", "", "y", True)], [], Fake(inventor))


@pytest.mark.parametrize(
    ("instruction", "rule"),
    [
        ("Write a poem", "too_short"),
        ("写首诗", "too_short"),
        ("写一首诗", ""),
        ("word " * 151, "too_long"),
        ("Describe what this image shows", "keyword"),
        ("Plot the Graphs of both functions", "keyword"),
        ("Tell me how to go to Rome", "keyword"),
        ("描述这张图片的内容", "keyword"),
        ("Explain the mapping of graphite atoms", ""),
    ],
)
def test_unfit(instruction, rule):
    assert unfit(words(instruction)) == rule


@pytest.mark.parametrize(
    ("text", "whole", "items"),
    [
        (" one\n10. two\n11. three", True, ["one", "two", "three"]),
        (" one\n10. two\n11. thr", False, ["one", "two"]),
        (" one\n\n10) two\n  lines\n\nand more\n11、三", True, ["one", "two lines", "三"]),
        (" one\n12. two", True, ["one"]),
        (" one\n12. two", False, ["one"]),
        (" in 1999\n10. costs 3.50\n", True, ["in 1999", "costs 3.50"]),
        ("\n10.  \n11. x", True, ["x"]),
    ],
)
def test_lists(text, whole, items):
    assert parse_list(Written(text, whole), 9) == items


@pytest.mark.parametrize(
    ("text", "whole", "answer", "rule"),
    [
        ("Input: a\nb\nOutput: c\nd", True, ("a\nb", "c\nd"), ""),
        ("\nOutput: c", True, ("", "c"), ""),
        ("输入 Output: c", True, ("", ""), "no_output"),
        ("input：N/A\noutput：三", True, ("", "三"), ""),
        ("Input: a\n", True, ("", ""), "no_output"),
        ("Output:  ", True, ("", ""), "no_output"),
        ("Output: c and", False, ("", ""), "cut_off"),
        ("Output: c\nTask: next", False, ("", "c"), ""),
        ("Output: c\n\nExample 2:\nInput: x\nOutput: y", True, ("", "c"), ""),
        ("Input: Say it.\nOutput: say it", True, ("", ""), "repeats"),
        ("Output: do this", True, ("", ""), "repeats"),
    ],
)
def test_answers(text, whole, answer, rule):
    assert parse_answer(Written(text, whole), "Do this!") == (answer, rule)
