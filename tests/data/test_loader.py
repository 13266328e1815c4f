import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.data.batch import Batch
from jaxllm.data.config import DataConfig
from jaxllm.data.dataset import Dataset
from jaxllm.data.held_out import Piece
from jaxllm.data.loader import LocalBatches, local_rows
from jaxllm.data.shards import TokenStream, write_streams
from jaxllm.errors import UserError

LENGTH, BATCH = 16, 8


def sharding(*shape):
    """[batch, length] over a mesh (data, context, model) of the given shape."""
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return NamedSharding(Mesh(devices, ("data", "context", "model")), PartitionSpec("data", "context"))


def make_dataset(tokenizer, folder, texts, **config):
    pieces = [Piece(text, i % 5 == 4, True, 1.0) for i, text in enumerate(texts)]
    write_streams(folder, pieces, tokenizer, num_threads=1, report=lambda done: None)
    train, held_out = TokenStream(folder / "train"), TokenStream(folder / "held_out")
    return Dataset(DataConfig(**config), tokenizer, LENGTH, (train,), (1.0,), (held_out,))


@pytest.fixture(scope="module")
def dataset(tokenizer, tmp_path_factory):
    texts = [f"dog {i} fox 曹操 {'over ' * (i % 11)}\n" for i in range(80)]
    return make_dataset(tokenizer, tmp_path_factory.mktemp("tokens") / "a", texts)


def take(loader, count):
    return [Batch(*map(np.asarray, batch)) for batch in itertools.islice(loader, count)]


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for leaf_x, leaf_y in zip(x, y, strict=True):
            np.testing.assert_array_equal(leaf_x, leaf_y)


def test_batches_are_the_same_on_every_mesh(dataset):
    expected = take(dataset.train_loader(sharding(1, 1, 1), batch_size=BATCH, seed=3), 4)
    for shape in [(8, 1, 1), (2, 2, 2), (4, 1, 2), (1, 8, 1)]:
        loader = dataset.train_loader(sharding(*shape), batch_size=BATCH, seed=3)
        batch = next(loader)
        assert batch.tokens.sharding == sharding(*shape) and batch.tokens.shape == (BATCH, LENGTH)
        assert [leaf.dtype for leaf in batch] == [np.int32, np.int32, np.int32, bool]
        same([Batch(*map(np.asarray, batch)), *take(loader, 3)], expected)
        loader.close()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_the_global_batch(dataset, processes):
    rows = dataset._rows(dataset.train[0], seed=3)
    expected = take(dataset.train_loader(sharding(1, 1, 1), batch_size=BATCH, seed=3), 20)
    share = BATCH // processes
    locals_ = [LocalBatches(rows, BATCH, list(range(p * share, (p + 1) * share)), batches=20) for p in range(processes)]
    together = [
        Batch(*map(np.concatenate, zip(*(local[step] for local in locals_), strict=True))) for step in range(20)
    ]
    same(together, expected)


def test_local_rows_are_those_of_the_local_devices():
    whole = sharding(4, 2, 1)
    np.testing.assert_array_equal(local_rows(whole, (8, 16)), np.arange(8))
    part = _sharding_seen_by_process(whole, {3, 5})
    np.testing.assert_array_equal(local_rows(part, (8, 16)), [2, 3, 4, 5])


def _sharding_seen_by_process(whole, ids):
    """`whole` as a process sees it whose devices are those of `ids`."""

    class Seen:
        spec, mesh = whole.spec, whole.mesh

        def addressable_devices_indices_map(self, shape):
            return {d: index for d, index in whole.devices_indices_map(shape).items() if d.id in ids}

    return Seen()


def test_restore_goes_on_bit_for_bit(dataset):
    rows = dataset.rows_an_epoch()
    assert rows % BATCH  # batches straddle epochs
    count = 3 * rows // BATCH
    expected = take(dataset.train_loader(sharding(1, 1, 1), batch_size=BATCH, seed=3), count)
    for done in (0, 1, rows // BATCH, rows // BATCH + 1, 2 * rows // BATCH + 1):
        first = dataset.train_loader(sharding(2, 1, 1), batch_size=BATCH, seed=3)
        same(take(first, done), expected[:done])
        state = json.loads(json.dumps(first.state()))
        first.close()
        again = dataset.train_loader(sharding(4, 2, 1), batch_size=BATCH, seed=3)  # another mesh
        next(again)  # a loader that was already in use
        again.restore(state)
        assert again.state() == state
        same(take(again, count - done), expected[done:])
        again.close()


def test_state_is_that_of_the_last_batch_yielded(dataset):
    loader = dataset.train_loader(sharding(1, 1, 1), batch_size=BATCH, seed=3)
    for step in range(1, 12):
        next(loader)
        assert loader.state()["rows"] == step * BATCH


def test_batch_size_may_change_on_restore(dataset):
    rows = take(dataset.train_loader(sharding(1, 1, 1), batch_size=1, seed=3), 24)
    loader = dataset.train_loader(sharding(1, 1, 1), batch_size=8, seed=3)
    take(loader, 1)
    other = dataset.train_loader(sharding(1, 1, 1), batch_size=4, seed=3)
    other.restore(loader.state())
    tokens = np.concatenate([batch.tokens for batch in take(other, 4)])
    np.testing.assert_array_equal(tokens, np.concatenate([row.tokens for row in rows[8:]]))


def test_restore_refuses_other_data(dataset, tokenizer, tmp_path):
    state = dataset.train_loader(sharding(1, 1, 1), batch_size=BATCH, seed=3).state()
    with pytest.raises(UserError, match="seed was 3, now it is 4"):
        dataset.train_loader(sharding(1, 1, 1), batch_size=BATCH, seed=4).restore(state)
    other = make_dataset(tokenizer, tmp_path / "b", [f"fox {i}\n" for i in range(80)])
    with pytest.raises(UserError, match="of other data: tokens was"):
        other.train_loader(sharding(1, 1, 1), batch_size=BATCH, seed=3).restore(state)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_holds_every_row_once_in_an_order_of_its_own(tokenizer, tmp_path, packing):
    texts = [f"dog {i} fox\n" * (1 + i % 3) for i in range(60)]
    dataset = make_dataset(tokenizer, tmp_path / "c", texts, packing=packing)
    rows = dataset._rows(dataset.train[0], seed=1)
    size = len(rows)
    orders = [[rows.order(epoch * size + i) for i in range(size)] for epoch in range(3)]
    assert all(sorted(row for row, _ in order) == list(range(size)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert all(len({rotation for _, rotation in order}) == 1 for order in orders)  # one rotation an epoch
    assert orders[0] != [dataset._rows(dataset.train[0], seed=2).order(i) for i in range(size)]
    if packing == "best_fit":  # every token once an epoch
        tokens = np.concatenate([row.tokens[row.segment_ids > 0] for row in (rows[i] for i in range(size, 2 * size))])
        everything = dataset.train[0].read(0, dataset.train[0].index.tokens)
        np.testing.assert_array_equal(np.sort(tokens), np.sort(everything))


def test_without_shuffle_the_text_comes_in_order(tokenizer, tmp_path):
    dataset = make_dataset(tokenizer, tmp_path / "d", [f"dog {i} fox\n" for i in range(60)], shuffle=False)
    batches = take(dataset.train_loader(sharding(1, 1, 1), batch_size=2, seed=0), 5)
    tokens = np.concatenate([batch.tokens.ravel() for batch in batches])
    np.testing.assert_array_equal(tokens, dataset.train[0].read(0, len(tokens)))


def test_a_stream_shorter_than_a_row(tokenizer, tmp_path):
    dataset = make_dataset(tokenizer, tmp_path / "e", ["a"] * 5)
    dataset = dataclasses.replace(dataset, length=128)
    first, second = take(dataset.train_loader(sharding(1, 1, 1), batch_size=2, seed=0), 2)
    same([first], [second])
    assert (first.segment_ids > 0).sum() == 2 * dataset.train_tokens


def test_batches_that_do_not_divide(dataset):
    with pytest.raises(UserError, match=r"batch_size=6 is not a multiple of the 4 shards.*data=4.*4, 8"):
        dataset.train_loader(sharding(4, 1, 1), batch_size=6, seed=0)
    odd = dataclasses.replace(dataset, length=15)
    with pytest.raises(UserError, match=r"length=15 is not a multiple of the 2 shards.*context=2.*14, 16"):
        odd.train_loader(sharding(4, 2, 1), batch_size=8, seed=0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 1)])
def test_evaluation_predicts_every_held_out_token_once(dataset, shape):
    batches = list(dataset.eval_batches(sharding(*shape), batch_size=BATCH))
    assert len(batches) == dataset.num_eval_batches(BATCH)
    assert all(batch.tokens.shape == (BATCH, LENGTH) for batch in batches)
    predicted = sum(int(np.asarray(batch.loss_mask).sum()) for batch in batches)
    assert predicted == dataset.held_out_tokens
    texts = np.concatenate([np.asarray(batch.tokens)[np.asarray(batch.loss_mask)] for batch in batches])
    everything = dataset.held_out[0].read(0, dataset.held_out[0].index.tokens)
    np.testing.assert_array_equal(np.sort(texts), np.sort(everything[everything != dataset.tokenizer.bos_id]))


def test_an_error_while_reading_reaches_the_caller(dataset, monkeypatch):
    loader = dataset.train_loader(sharding(1, 1, 1), batch_size=BATCH, seed=0)

    def fail(start, length):
        raise OSError("the disk is gone")

    monkeypatch.setattr(dataset.train[0], "read", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader)
