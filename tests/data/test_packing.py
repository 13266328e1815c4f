import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.data.packing import BestFit, Concat, EvaluationWindows, best_fit_decreasing, fill_row

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)
LENGTHS = st.integers(2, 24)
PAD = -1


def starts_of(sizes):
    return np.concatenate([[0], np.cumsum(sizes)])


def stream_of(sizes):
    """Distinct tokens, so that each can be found again; and the document of each token."""
    return np.arange(sum(sizes)), np.repeat(np.arange(len(sizes)), sizes)


def rows_of(packing, sizes, length, rotation=0):
    tokens, _ = stream_of(sizes)
    spans = [packing.spans(row, rotation) for row in range(packing.num_rows)]
    return [fill_row(lambda start, n: tokens[start : start + n], row, length, PAD) for row in spans]


def check_row(row, documents):
    """Segments count up, positions start at 0, padding comes last, no segment mixes documents or skips a token."""
    used = row.segment_ids > 0
    count = int(used.sum())
    assert used[:count].all()
    assert (row.tokens[~used] == PAD).all() and (row.tokens[used] != PAD).all()
    assert not row.loss_mask[~used].any() and (row.positions[~used] == 0).all()
    assert row.segment_ids.max(initial=0) == len(set(row.segment_ids[used]))
    for segment in set(row.segment_ids[used]):
        inside = row.segment_ids == segment
        tokens = row.tokens[inside]
        assert (np.diff(np.flatnonzero(inside)) == 1).all() and (np.diff(tokens) == 1).all()
        assert len(set(documents[tokens])) == 1
        np.testing.assert_array_equal(row.positions[inside], np.arange(len(tokens)))
        assert not row.loss_mask[inside][0]


@given(SIZES, LENGTHS, st.integers(0, 10**9))
def test_concat(sizes, length, rotation):
    packing = Concat(starts_of(sizes), length)
    tokens, documents = stream_of(sizes)
    rows = rows_of(packing, sizes, length, rotation)
    seen = np.concatenate([row.tokens[row.segment_ids > 0] for row in rows])
    assert len(set(seen)) == len(seen)
    if len(tokens) >= length:
        assert len(seen) == len(tokens) // length * length  # all but the tail
        tail = (rotation + len(seen) + np.arange(len(tokens) - len(seen))) % len(tokens)
        assert set(tail) == set(tokens) - set(seen)  # which is what comes before the start of the ring
    else:
        assert sorted(seen) == tokens.tolist()
    for row in rows:
        check_row(row, documents)
        first = np.diff(row.segment_ids, prepend=0) != 0
        np.testing.assert_array_equal(row.loss_mask, (row.segment_ids > 0) & ~first)


def test_concat_by_hand():
    rows = rows_of(Concat(starts_of([3, 4, 2]), 4), [3, 4, 2], 4, rotation=2)
    np.testing.assert_array_equal([row.tokens for row in rows], [[2, 3, 4, 5], [6, 7, 8, 0]])
    np.testing.assert_array_equal([row.segment_ids for row in rows], [[1, 2, 2, 2], [1, 2, 2, 3]])
    np.testing.assert_array_equal([row.positions for row in rows], [[0, 0, 1, 2], [0, 0, 1, 0]])
    np.testing.assert_array_equal([row.loss_mask for row in rows], [[0, 0, 1, 1], [0, 0, 1, 0]])


@given(SIZES, LENGTHS)
def test_best_fit(sizes, length):
    packing = BestFit(starts_of(sizes), length)
    tokens, documents = stream_of(sizes)
    rows = rows_of(packing, sizes, length)
    seen = np.concatenate([row.tokens[row.segment_ids > 0] for row in rows])
    assert sorted(seen) == tokens.tolist()
    for row in rows:
        check_row(row, documents)
        first = np.diff(row.segment_ids, prepend=0) != 0
        np.testing.assert_array_equal(row.loss_mask, (row.segment_ids > 0) & ~first)
    firsts = np.concatenate([row.tokens[np.flatnonzero(np.diff(row.segment_ids, prepend=0) > 0)] for row in rows])
    pieces = np.bincount(documents[firsts], minlength=len(sizes))
    assert pieces.tolist() == [-(-size // length) for size in sizes]  # cut only where they must be


@given(st.lists(st.integers(1, 12), max_size=60), st.integers(12, 20))
def test_best_fit_decreasing_is_what_its_name_says(sizes, capacity):
    """Against the definition, bin by bin."""
    room, bins = [], []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [b for b in range(len(room)) if room[b] >= sizes[item]]
        if fits:
            chosen = min(fits, key=lambda b: room[b])
        else:
            chosen = len(room)
            room.append(capacity)
            bins.append([])
        room[chosen] -= sizes[item]
        bins[chosen].append(item)
    items, ends = best_fit_decreasing(np.array(sizes, np.int64), capacity)
    packed = np.split(items, ends[:-1]) if len(ends) else []
    assert sorted(items) == list(range(len(sizes)))
    assert sorted(sum(sizes[i] for i in found) for found in packed) == sorted(capacity - r for r in room)


@given(SIZES, LENGTHS, st.data())
def test_evaluation_windows(sizes, length, data):
    overlap = data.draw(st.integers(1, length - 1))
    packing = EvaluationWindows(starts_of(sizes), length, overlap)
    tokens, documents = stream_of(sizes)
    rows = rows_of(packing, sizes, length)
    for row in rows:
        check_row(row, documents)
    predicted = np.concatenate([row.tokens[row.loss_mask] for row in rows])
    assert sorted(predicted) == sorted(set(tokens) - set(starts_of(sizes)[:-1]))
    starts = starts_of(sizes)[documents]
    for row in rows:  # a predicted token sees its whole document so far, or at least `overlap` tokens of it
        for position, token in zip(row.positions[row.loss_mask], row.tokens[row.loss_mask], strict=True):
            assert position >= min(overlap, token - starts[token])


def test_evaluation_overlap_must_fit():
    for overlap in (0, 8):
        with pytest.raises(ValueError, match="does not lie between 1 and 7"):
            EvaluationWindows(starts_of([20]), 8, overlap)
