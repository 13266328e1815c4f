"""Exact and near duplicates, against a comparison of all pairs."""

import itertools

import pytest

from jaxllm.data.instructions.duplicates import TOGETHER, bands, exact_key, group, question_key, shingles, similarity
from jaxllm.data.instructions.shapes import Talk


def changed(text: str, places: int, chinese: bool) -> str:
    """With other words at the end."""
    parts = list(text) if chinese else text.split()
    parts[-places:] = [("龘" if chinese else "zebra")] * places
    return ("" if chinese else " ").join(parts)


@pytest.fixture
def talks(talk, sentence) -> list[Talk]:
    """40 conversations, and of each of them one in which 1 to 8 words at the end are others."""
    made = []
    for number in range(40):
        chinese = number % 2 == 1
        text = sentence(number, chinese)
        made += [talk(text, "yes"), talk(changed(text, 1 + number % 8, chinese), "yes")]
    return made


def test_exact_but_for_case_and_white_space(talk):
    assert exact_key(talk("What  is IT?", "a\nb")) == exact_key(talk("what is it?", "A b"))
    assert exact_key(talk("what is it?", "a")) != exact_key(talk("what is it", "a"))
    one = talk("a", "b")
    said_by_others = [dict(message, role="user") for message in one.messages]
    assert exact_key(one) != exact_key(one._replace(messages=said_by_others))
    assert question_key(talk("A  b", "x")) == question_key(talk("a b", "y")) != question_key(talk("a c", "x"))


def test_shingles_of_both_scripts():
    assert shingles("One two, three FOUR") == {"one two three", "two three four"}
    assert shingles("却说曹操GPT4") == {"却 说 曹", "说 曹 操", "曹 操 gpt4"}
    assert shingles("Yes") == {"yes"} and shingles("?!") == {"?!"} != shingles("...")


@pytest.mark.parametrize("near", [0.75, 0.8, 0.85])
def test_near_duplicates_are_those_of_all_pairs(talks, near):
    groups = group(talks, near)
    expected, stay = {}, []
    for i, one in enumerate(talks):
        twin = next((j for j in stay if similarity(one, talks[j]) >= near), None)
        if twin is None:
            stay.append(i)
        else:
            expected[i] = twin
    assert groups.duplicate_of == expected
    assert 0 < len(expected) < 40


def test_the_like_belong_together(talks):
    cluster = group(talks, 1).cluster
    assert group(talks, 1).duplicate_of == {}
    like = [(i, j) for i, j in itertools.combinations(range(80), 2) if similarity(talks[i], talks[j]) >= TOGETHER]
    assert {(i, j) for i, j in itertools.combinations(range(80), 2) if cluster[i] == cluster[j]} == set(like)
    assert 10 < len(like) < 40


def test_answers_to_one_question_belong_together(talk, sentence):
    talks = [talk("Tell me a story!", sentence(1)), talk(sentence(2), "yes"), talk("tell me  a story!", sentence(3))]
    assert group(talks, 0.8) == ({}, [0, 1, 0])


def test_chains_belong_together(talk):
    """The first and the last share little, but each is near the next."""
    parts = [f"w{i}" for i in range(60)]
    talks = [talk(" ".join(parts[start : start + 40]), "") for start in range(0, 16, 2)]
    assert similarity(talks[0], talks[-1]) < 0.5
    assert set(group(talks, 1).cluster) == {0}


def test_bands_miss_next_to_nothing_at_the_threshold():
    for threshold in (0.5, 0.8, 0.95):
        number, rows = bands(threshold)
        assert number * rows <= 128
        assert (1 - threshold**rows) ** number <= 1e-4
