"""Reward functions of the user's: how they are called, and what is said of those that go wrong."""

import textwrap

import numpy as np
import pytest

from jaxllm.data.prompts import Prompt
from jaxllm.errors import UserError
from jaxllm.generate.continuous import Answer
from jaxllm.rollout.rewards import Answered, call_reward, parse_rewards
from jaxllm.rollout.verdict import judge_answers
from jaxllm.rollout.writer import Written
from jaxllm.steps.rollout_config import RolloutConfig

ANSWERED = Answered(["a", "b", "c"], ["one", "two", "three"], {"answer": ["one", "2", "three"], "hint": [1, 2, 3]})
FUNCTIONS = """
def exact(completions, answer):
    return [float(a == b) for a, b in zip(completions, answer)]

def whole(prompts, completions, **columns):
    assert sorted(columns) == ["answer", "hint"]
    return [len(p) + len(c) for p, c in zip(prompts, completions)]

def raises(completions):
    return [1 / (len(text) - 5) for text in completions]

def nan(completions):
    return [1.0, float("nan"), 2.0]

def short(completions):
    return [1.0, 2.0]

def one(completions):
    return 1.0

def words(completions):
    return ["good", "bad", "good"]

def needs(completions, solution):
    return [0.0] * 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(textwrap.dedent(FUNCTIONS))
    return path


def call(file, name):
    (function,) = parse_rewards(f"{file}:{name}")
    return call_reward(function, ANSWERED)


def test_functions_get_the_columns_they_name(file):
    np.testing.assert_array_equal(call(file, "exact"), [1, 0, 1])
    np.testing.assert_array_equal(call(file, "whole"), [4, 4, 6])


@pytest.mark.parametrize("name, says", [
    ("raises", r"rewards\.py:10: ZeroDivisionError.*\nAnswer 3 of 3: prompt 'c', answer 'three'"),
    ("nan", r"rewards\.py:nan returned nan, which is no finite number\.\nAnswer 2 of 3: prompt 'b', answer 'two'"),
    ("short", r"returned 2 rewards for 3 answers"),
    ("one", r"returned 1.0 for 3 answers"),
    ("words", r"returned 'good', which is no finite number"),
    ("needs", r"takes 'solution', which the prompts do not have. There are prompts, completions, answer, hint"),
])  # fmt: skip
def test_what_goes_wrong_is_named_with_the_sample(file, name, says):
    with pytest.raises(UserError, match=says) as raised:
        call(file, name)
    assert len(str(raised.value).splitlines()) <= 2


@pytest.mark.parametrize("value, says", [
    ("exact", "must be FILE.py:NAME"),
    ("{file}:exact=much", "must be a number, not 'much'"),
    ("{file}:exakt", "Did you mean 'exact'"),
    ("nowhere.py:exact", "no such file"),
    ("{file}:exact,{file}:exact=2", "two functions have one name"),
])  # fmt: skip
def test_bad_fields(file, value, says):
    with pytest.raises(UserError, match=says):
        parse_rewards(value.format(file=file))


def test_rewards_are_weighed_cut_and_answers_must_end(file):
    """Two functions and a reward model; a clip; a penalty for the answer that was cut."""
    prompts = [
        Prompt([1], text, {"answer": a, "hint": 0}) for text, a in zip("abc", ["one", "2", "three"], strict=True)
    ]
    answers = [Answer([5], [0.0], reason) for reason in ("stop", "length", "stop")]
    written = Written(answers, ANSWERED.completions, 1.0, 0.0)
    config = RolloutConfig(reward_model="runs/x", reward_model_weight=2.0, reward_clip=3.0, missing_end_penalty=0.5)
    functions = parse_rewards(f"{file}:exact=1.5,{file}:whole=0.5")
    verdict = judge_answers(config, functions, prompts, written, np.float32([0.1, -3.0, 9.0]))
    np.testing.assert_allclose(verdict.rewards, [3.0, -3.0 - 0.5, 3.0])
    assert verdict.is_whole.tolist() == [True, False, True]
    unclipped = judge_answers(RolloutConfig(reward_model="x"), functions[:1], prompts, written, np.float32([0, 1, 2]))
    np.testing.assert_allclose(unclipped.rewards, [1.5, 1.0, 3.5])
    assert unclipped.record["reward_exact"] == pytest.approx(2 / 3) and unclipped.record["reward_model"] == 1
