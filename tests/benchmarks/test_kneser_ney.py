"""The baseline of the Sanguo benchmark computes what the paper says."""

import math

import pytest

from tests.benchmarks.kneser_ney import KneserNey

TEXT = "却说曹操却说玄德。却说曹操大喜,曹操曰"
VOCABULARY = TEXT + "未见之字"


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("context", ["", "却", "却说", "却说曹操", "字", "字操", "曰"])
def test_probabilities_of_all_characters_sum_to_one(order, context):
    model = KneserNey(TEXT, order, VOCABULARY)
    assert math.fsum(model.probability(c, context) for c in set(VOCABULARY)) == pytest.approx(1, abs=1e-12)


def test_bigram_by_hand():
    """abacab: bigrams ab 2, ba 1, ac 1, ca 1; found before a: b and c, before b: a, before c: a. D = 0.5."""
    model = KneserNey("abacab", 2, "abcd", discount=0.5)
    a = 1.5 / 4 + 0.5 * 3 / 4 / 4
    b = 0.5 / 4 + 0.5 * 3 / 4 / 4
    d = 0.5 * 3 / 4 / 4
    assert model.probability("a", "") == pytest.approx(a)
    assert model.probability("d", "") == pytest.approx(d)
    assert model.probability("b", "a") == pytest.approx(1.5 / 3 + 0.5 * 2 / 3 * b)
    assert model.probability("d", "ca") == pytest.approx(0.5 * 2 / 3 * d)
    assert model.probability("a", "b") == pytest.approx(0.5 / 1 + 0.5 * 1 / 1 * a)
    assert model.probability("b", "d") == pytest.approx(b), "an unseen context tells nothing"
    expected = -(math.log2(a) + math.log2(model.probability("b", "a")) + math.log2(d)) / 3
    # "d" after "b", which has been seen only before "a":
    expected += (math.log2(d) - math.log2(0.5 * d)) / 3
    assert model.bits_per_character("abd") == pytest.approx(expected)


def test_lower_orders_count_contexts_and_the_highest_occurrences():
    """With the trigrams of "xyxyxyzy": after "y" the bigram counts what came before "yx" ({x}) and "yz" ({x})."""
    model = KneserNey("xyxyxyzy", 3, "xyz", discount=0.5)
    bigram = model.probability("z", "y")  # context "y" alone: the bigram level is the last
    unigram = model.probability("z", "")
    assert bigram == pytest.approx(0.5 / 2 + 0.5 * 2 / 2 * unigram)
    assert model.probability("z", "xy") == pytest.approx(0.5 / 3 + 0.5 * 2 / 3 * bigram)


def test_a_longer_text_of_the_same_kind_is_cheaper_than_uniform():
    model = KneserNey(TEXT * 20, 4, VOCABULARY)
    assert model.bits_per_character(TEXT) < 1 < math.log2(len(set(VOCABULARY)))
