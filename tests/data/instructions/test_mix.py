"""Weights, the held-out part, and that the seed alone decides."""

from collections import Counter

import pytest

from jaxllm.data.instructions.mix import held_out_targets, hold_out, mix, shares

KEYS = [b"%d" % i for i in range(100)]


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [(10, [1, 1], [5, 5]), (10, [0.7, 0.3], [7, 3]), (10, [1, 1, 1], [4, 3, 3]), (3, [1, 1000], [0, 3]), (0, [1], [0])],
)
def test_shares(total, weights, parts):
    assert shares(total, weights) == parts


def test_counts_as_weights_leave_all_as_it_is():
    assert shares(10**9 + 7, [10**9, 3, 4]) == [10**9, 3, 4]


def test_what_is_little_is_repeated_evenly_and_of_the_rest_a_part_is_taken():
    order = mix([range(3), range(3, 100)], [10, 20], KEYS, seed=0)
    times = Counter(order)
    assert sorted(times[i] for i in range(3)) == [3, 3, 4]
    assert len([i for i in times if i >= 3]) == 20 and max(times[i] for i in range(3, 100)) == 1
    assert order == mix([range(3), range(3, 100)], [10, 20], KEYS, seed=0)
    assert order != mix([range(3), range(3, 100)], [10, 20], KEYS, seed=1)


def test_an_order_by_content_alone():
    """The same examples in another order of reading come out in the same order."""
    names = [KEYS[i] for i in mix([range(100)], [50], KEYS, seed=0)]
    backwards = KEYS[::-1]
    assert names == [backwards[i] for i in mix([range(100)], [50], backwards, seed=0)]


def test_targets_are_parts_of_each_input_and_of_what_is_taken():
    assert held_out_targets([100, 40], 0.1, 140) == [10, 4]
    assert held_out_targets([100, 40], 0.1, 70) == [5, 2]
    assert held_out_targets([3, 4], 0.05, 7) == [0, 1]
    assert held_out_targets([100], 0.0, 100) == [0]


def test_clusters_are_held_out_whole():
    clusters = [i - i % 4 for i in range(100)]
    chosen = hold_out(clusters, [0] * 100, KEYS, [18], seed=0)
    assert sum(chosen) == 16
    assert all(len({chosen[i] for i in range(first, first + 4)}) == 1 for first in range(0, 100, 4))
    assert chosen != hold_out(clusters, [0] * 100, KEYS, [18], seed=1)


def test_a_cluster_of_two_inputs_must_fit_into_both():
    clusters, inputs = [0, 0, 2, 3], [0, 1, 0, 1]
    assert hold_out(clusters, inputs, KEYS, [1, 0], seed=0) == [False, False, True, False]
    assert hold_out(clusters, inputs, KEYS, [2, 2], seed=0) == [True] * 4
