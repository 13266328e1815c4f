"""Masked rows: how many tokens, which and what becomes of them; and that they hang on seed and row number alone."""

import itertools

import numpy as np
import pytest

from jaxllm.data.batch import Batch, Vocabulary, row_random
from jaxllm.data.config import DataConfig
from jaxllm.data.dataset import prepare
from jaxllm.data.loader import LocalBatches
from jaxllm.data.masking import MASKED_ROWS, MaskedBatch, mask_tokens
from jaxllm.data.packing import empty_row
from jaxllm.errors import UserError
from tests.data.test_loader import sharding

VOCABULARY = Vocabulary(size=500, mask_id=4, special_ids=(0, 2, 3, 4))
LENGTH, BATCH = 16, 8


def row(random: np.random.Generator, length: int = 100) -> Batch:
    """Two documents with bos (2) and eos (3), the second cut, then padding (0)."""
    first, second = length // 3, length - length // 3 - 7
    tokens = random.integers(5, 500, length).astype(np.int32)
    tokens[[0, first]], tokens[first - 1], tokens[-7:] = 2, 3, 0
    positions = np.concatenate([np.arange(first), np.arange(second), np.zeros(7, int)]).astype(np.int32)
    segments = np.repeat([1, 2, 0], [first, second, 7]).astype(np.int32)
    return Batch(tokens, positions, segments, positions > 0)


@pytest.fixture(scope="module")
def many():
    """(rows, what became of them), 4,000 rows of 90 ordinary tokens each."""
    random = np.random.default_rng(0)
    rows = [row(random) for _ in range(4000)]
    made = [mask_tokens(row, row_random(0, i), VOCABULARY, DataConfig()) for i, row in enumerate(rows)]
    return tuple(kind(*map(np.stack, zip(*part, strict=True))) for kind, part in ((Batch, rows), (MaskedBatch, made)))


def test_the_share_of_chosen_tokens_and_what_becomes_of_them(many):
    """15 %; of these 80 %, 10 %, 10 %; within four standard deviations."""
    rows, made = many
    ordinary = ~np.isin(rows.tokens, VOCABULARY.special_ids)
    chosen = made.loss_mask
    assert chosen.sum() / ordinary.sum() == pytest.approx(0.15, abs=4 * 0.5 / 90 / 4000**0.5)  # to round is all chance
    count = chosen.sum()
    masked = made.tokens[chosen] == VOCABULARY.mask_id
    kept = made.tokens[chosen] == rows.tokens[chosen]
    for part, share in ((masked, 0.8 + 0.1 / 500), (kept, 0.1 + 0.1 / 500), (~masked & ~kept, 0.1 * 498 / 500)):
        assert part.mean() == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)
    replaced = made.tokens[chosen][~masked & ~kept]
    assert len(np.unique(replaced)) > 495 and replaced.min() == 0 and replaced.max() == 499
    places = chosen.sum(0)[ordinary.all(0)]  # each place as often as any other
    assert np.abs(places - places.mean()).max() < 5 * (0.15 * 0.85 * 4000) ** 0.5


def test_nothing_else_changes(many):
    rows, made = many
    np.testing.assert_array_equal(made.targets, rows.tokens)
    np.testing.assert_array_equal(made.positions, rows.positions)
    np.testing.assert_array_equal(made.segment_ids, rows.segment_ids)
    np.testing.assert_array_equal(made.tokens[~made.loss_mask], rows.tokens[~made.loss_mask])
    special = np.isin(rows.tokens, VOCABULARY.special_ids) | (rows.positions == 0)
    assert not made.loss_mask[special].any()


@pytest.mark.parametrize(("fraction", "expected"), [(0.15, 1), (0.01, 1), (0.9, 2)])
def test_a_row_of_a_few_tokens_has_one_chosen_at_least(fraction, expected):
    tokens = np.array([2, 7, 8, 3, 0], np.int32)
    short = Batch(tokens, np.array([0, 1, 2, 3, 0], np.int32), np.array([1, 1, 1, 1, 0], np.int32), tokens > 2)
    counts = {
        mask_tokens(short, row_random(0, i), VOCABULARY, DataConfig(mask_fraction=fraction)).loss_mask.sum()
        for i in range(40)
    }
    assert max(counts) == expected and min(counts) >= 1
    assert not mask_tokens(empty_row(5, 0), row_random(0, 0), VOCABULARY, DataConfig()).loss_mask.any()


def test_what_is_drawn_is_fixed_for_good():
    """Another version of this program or of NumPy must hide the same tokens: held-out losses could not be compared."""
    plain = Batch(
        np.arange(5, 37, dtype=np.int32), np.arange(32, dtype=np.int32), np.ones(32, np.int32), np.arange(32) > 0
    )
    made = mask_tokens(plain, row_random(1 << 32, 7), VOCABULARY, DataConfig())
    changed = np.flatnonzero(made.loss_mask)
    assert dict(zip(changed.tolist(), made.tokens[changed].tolist(), strict=True)) == {
        5: 4,
        17: 4,
        21: 151,
        24: 4,
        25: 111,
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("masked")
    text = "".join(f"dog {i} fox 曹操 {'over ' * (i % 11)}lazy\n" for i in range(300))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return DataConfig(path=str(folder / "text.txt"), cache=str(folder / "cache"), tokenizer="bpe:300", held_out="0.2")


@pytest.fixture(scope="module")
def dataset(config):
    return prepare(config, length=LENGTH, kind=MASKED_ROWS, progress=False)


def take(batches, count=None):
    with_end = itertools.islice(batches, count)
    return [MaskedBatch(*map(np.asarray, batch)) for batch in with_end]


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


def test_a_tokenizer_trained_for_it_has_a_mask_token(config, dataset):
    tokenizer = dataset.tokenizer
    assert tokenizer.vocab_size == 300 and tokenizer.mask_id == tokenizer.specials["<mask>"] == 4
    assert tokenizer.mask_id not in tokenizer.encode("a <mask> b")
    assert prepare(config, length=LENGTH, progress=False).tokenizer.mask_id is None  # pretraining: as it was


def test_batches_are_the_same_on_every_mesh_and_for_all_processes(dataset):
    expected = take(dataset.train_loader(sharding(1, 1, 1), batch_size=BATCH, seed=3), 4)
    assert all((batch.tokens != batch.targets).any() for batch in expected)
    for shape in [(8, 1, 1), (2, 2, 2), (1, 8, 1)]:
        loader = dataset.train_loader(sharding(*shape), batch_size=BATCH, seed=3)
        first = next(loader)
        assert isinstance(first, MaskedBatch) and first.targets.sharding == sharding(*shape)
        assert [leaf.dtype for leaf in first] == [np.int32] * 4 + [bool]
        assert same([MaskedBatch(*map(np.asarray, first)), *take(loader, 3)], expected)
        loader.close()
    rows = dataset.train_loader(sharding(1, 1, 1), batch_size=BATCH, seed=3)._rows
    halves = [LocalBatches(rows, BATCH, range(start, start + 4), batches=4) for start in (0, 4)]
    together = [MaskedBatch(*map(np.concatenate, zip(*(h[i] for h in halves), strict=True))) for i in range(4)]
    assert same(together, expected)


def test_restore_goes_on_bit_for_bit(dataset):
    count = 3 * dataset.rows_an_epoch() // BATCH
    expected = take(dataset.train_loader(sharding(1, 1, 1), batch_size=BATCH, seed=3), count)
    for done in (1, count // 2):
        first = dataset.train_loader(sharding(2, 1, 1), batch_size=BATCH, seed=3)
        take(first, done)
        again = dataset.train_loader(sharding(4, 2, 1), batch_size=BATCH, seed=3)
        again.restore(first.state())
        assert same(take(again, count - done), expected[done:])


def test_another_epoch_or_seed_hides_other_tokens(config):
    """Without shuffling the rows of each epoch are the same, and what is hidden in them is not."""
    data = prepare(DataConfig(**{**vars(config), "shuffle": False}), length=LENGTH, kind=MASKED_ROWS, progress=False)
    size = data.rows_an_epoch()
    rows = data.train_loader(sharding(1, 1, 1), batch_size=1, seed=3)._rows
    other = data.train_loader(sharding(1, 1, 1), batch_size=1, seed=4)._rows
    for i in (0, 1, 2):
        for again in (rows[i + size], other[i]):
            np.testing.assert_array_equal(again.targets, rows[i].targets)
            assert not np.array_equal(again.tokens, rows[i].tokens) or not np.array_equal(
                again.loss_mask, rows[i].loss_mask
            )


def test_the_held_out_rows_are_the_same_in_every_evaluation(dataset):
    expected = take(dataset.eval_batches(sharding(1, 1, 1), batch_size=BATCH))
    assert same(take(dataset.eval_batches(sharding(4, 2, 1), batch_size=BATCH)), expected)
    halves = take(dataset.eval_batches(sharding(1, 1, 1), batch_size=BATCH // 2))
    whole = [np.concatenate([batch.tokens for batch in batches]) for batches in (expected, halves)]
    rows = min(map(len, whole))
    np.testing.assert_array_equal(whole[0][:rows], whole[1][:rows])


def test_a_held_out_token_counts_at_most_once(dataset):
    """Windows overlap, but what was context in one is not asked for again; about 15 % of all are asked for."""
    tokens = dataset.held_out[0].read(0, dataset.held_out[0].index.tokens)
    batches = take(dataset.eval_batches(sharding(1, 1, 1), batch_size=BATCH))
    asked = np.concatenate([batch.targets[batch.loss_mask] for batch in batches])
    counts, available = (np.bincount(ids, minlength=300) for ids in (asked, tokens))
    assert (counts <= available).all()
    assert 0.1 < len(asked) / len(tokens) < 0.2


def test_a_tokenizer_without_a_mask_token_is_refused(config, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    with_own = DataConfig(**{**vars(config), "tokenizer": str(tmp_path / "tokenizer")})
    with pytest.raises(UserError, match=r"has no mask token \(<mask>, or \[MASK\]\).*\n?.*--special_tokens '<mask>'"):
        prepare(with_own, length=LENGTH, kind=MASKED_ROWS, progress=False)
