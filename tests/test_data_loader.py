"""The loader deals every sequence exactly once, whatever the ranks, and marks documents correctly."""

import threading

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.loader import Batch, Prefetcher, TrainLoader, epoch_keys, permute
from data.shards import TokenSplit

SEQ_LEN = 16


def make_split(num_documents=40, seed=0, shard_sizes=3):
    """A split whose token ids are all different, so that each names its position."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum([3, *rng.integers(2, 40, num_documents)])  # a short one first, where the ring closes
    tokens = np.arange(ends[-1], dtype=np.uint32)
    shards = np.split(tokens, ends[:: len(ends) // shard_sizes][1:])
    return TokenSplit("train", shards, np.stack([ends, ends]), vocab_size=len(tokens))


def make_loader(isolate_documents=True, seed=5, sequences_per_step=8, **split_settings):
    return TrainLoader(make_split(**split_settings), SEQ_LEN, sequences_per_step, seed, isolate_documents)


def sequences_of(loader, step, world_size=1, micro_batch_size=4):
    """All sequences of a step in their global order: tokens and targets (sequences, SEQ_LEN)."""
    num_micro_steps = loader.sequences_per_step // (world_size * micro_batch_size)
    batches = [
        loader.batch(step, rank, world_size, micro_step, micro_batch_size)
        for micro_step in range(num_micro_steps)
        for rank in range(world_size)
    ]
    tokens = torch.cat([batch.tokens.reshape(-1, SEQ_LEN) for batch in batches])
    return tokens, torch.cat([batch.targets.reshape(-1, SEQ_LEN) for batch in batches])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("isolate_documents", [True, False])
def test_ranks_and_micro_batches_deal_the_same_step(world_size, micro_batch_size, isolate_documents):
    loader = make_loader(isolate_documents)
    for step in (0, 3, 1000):
        expected = sequences_of(loader, step)
        dealt = sequences_of(loader, step, world_size, micro_batch_size)
        assert all(torch.equal(a, b) for a, b in zip(dealt, expected, strict=True))


def test_an_epoch_is_disjoint_and_complete():
    loader = make_loader(sequences_per_step=1)
    total, count = loader.split.tokens, loader.sequences_per_epoch
    assert count == total // SEQ_LEN
    for epoch in range(3):
        seen = torch.cat([loader.batch(epoch * count + i, 0, 1, 0, 1).tokens.flatten() for i in range(count)])
        assert len(set(seen.tolist())) == len(seen) == count * SEQ_LEN > total - SEQ_LEN


def test_steps_that_cross_an_epoch_go_on_in_the_next():
    single, wide = make_loader(sequences_per_step=1), make_loader(sequences_per_step=8)
    step = wide.sequences_per_epoch // 8
    assert step * 8 < wide.sequences_per_epoch < step * 8 + 8
    expected = torch.cat([single.batch(step * 8 + i, 0, 1, 0, 1).tokens for i in range(8)])
    assert torch.equal(sequences_of(wide, step)[0], expected)


def test_order_depends_on_seed_and_step_only():
    first, second, other = make_loader(), make_loader(), make_loader(seed=6)
    second.batch(7, 0, 1, 0, 4)  # what was asked before changes nothing
    assert torch.equal(first.batch(3, 0, 1, 1, 4).tokens, second.batch(3, 0, 1, 1, 4).tokens)
    assert not torch.equal(first.batch(3, 0, 1, 1, 4).tokens, other.batch(3, 0, 1, 1, 4).tokens)
    epoch = [make_loader(sequences_per_step=24).starts(step).tolist() for step in range(2)]
    assert sorted(epoch[0]) != epoch[0]
    assert epoch[0] != epoch[1]


@pytest.mark.parametrize("isolate_documents", [True, False])
def test_targets_are_the_next_tokens_of_the_same_document(isolate_documents):
    loader = make_loader(isolate_documents)
    total, ends = loader.split.tokens, set(loader.split.ends.tolist())
    masked = 0
    for step in range(200):  # enough epochs for sequences that go round the end of the stream
        tokens, targets = sequences_of(loader, step)
        assert tokens.dtype == targets.dtype == torch.int64
        following = tokens + 1
        is_last = torch.tensor([[int(p) in ends for p in row] for row in following])
        masked += int(is_last.sum())
        assert torch.equal(targets, torch.where(is_last, -100, following % total))
    assert masked > 1000


def test_cu_seqlens_cut_at_documents_and_sequences():
    loader = make_loader()
    starts_of_documents = {0, *loader.split.ends[:-1].tolist()}
    for step in range(20):
        batch = loader.batch(step, 0, 1, 1, 4)
        tokens = batch.tokens[0].tolist()
        assert batch.tokens.shape == batch.targets.shape == (1, 4 * SEQ_LEN)
        expected = [i for i in range(4 * SEQ_LEN) if i % SEQ_LEN == 0 or tokens[i] in starts_of_documents]
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.tolist() == [*expected, 4 * SEQ_LEN]


def test_without_isolation_rows_are_sequences():
    batch = make_loader(isolate_documents=False).batch(0, 0, 1, 0, 4)
    assert batch.cu_seqlens is None
    assert batch.tokens.shape == batch.targets.shape == (4, SEQ_LEN)


@pytest.mark.parametrize("num_documents", [1, 2, 40])
def test_num_targets_is_what_is_counted(num_documents):
    loader = make_loader(num_documents=num_documents, shard_sizes=1)
    for step in range(50):
        assert loader.num_targets(step) == int((sequences_of(loader, step)[1] != -100).sum())


def test_smallest_split():
    tokens = np.arange(SEQ_LEN + 1, dtype=np.uint16)
    ends = np.array([[SEQ_LEN + 1], [9]])
    split = TokenSplit("train", [tokens], ends, vocab_size=100)
    loader = TrainLoader(split, SEQ_LEN, 1, seed=0)
    for step in range(30):
        assert loader.num_targets(step) == int((loader.batch(step, 0, 1, 0, 1).targets != -100).sum())
    with pytest.raises(DataError, match=r"seq_len=17 needs 18 tokens, the train split has 17"):
        TrainLoader(split, SEQ_LEN + 1, 1, seed=0)


@pytest.mark.parametrize(
    ("rank", "world_size", "micro_step", "size"), [(2, 2, 0, 1), (0, 1, 2, 4), (1, 2, 1, 4)]
)
def test_outside_of_the_step_is_refused(rank, world_size, micro_step, size):
    with pytest.raises(DataError, match="micro_batch_size"):
        make_loader().batch(0, rank, world_size, micro_step, size)


def test_id_outside_of_the_vocabulary_is_refused():
    split = TokenSplit("train", [np.full(100, 7, np.uint16)], np.array([[100], [1]]), vocab_size=7)
    with pytest.raises(DataError, match="holds the token 7, its tokenizer has 7"):
        TrainLoader(split, SEQ_LEN, 1, seed=0).batch(0, 0, 1, 0, 1)


def test_split_reads_across_shards():
    split = make_split()
    assert len(split._shards) > 2
    assert np.array_equal(split.read(0, split.tokens), np.arange(split.tokens))
    documents = list(split)
    assert len(documents) == split.documents
    assert np.array_equal(np.concatenate([ids for ids, _ in documents]), np.arange(split.tokens))
    assert sum(num_bytes for _, num_bytes in documents) == split.bytes


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permute_is_a_bijection(size):
    orders = [permute(np.arange(size), size, epoch_keys(0, epoch)[:-1]).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 16 or orders[0] != orders[1] != orders[2]


def test_permute_of_a_huge_range_needs_no_table():
    size = 10**15 + 7
    index = np.array([0, 1, 2, size - 1])
    moved = permute(index, size, epoch_keys(0, 0)[:-1])
    assert len(set(moved.tolist())) == 4
    assert moved.min() >= 0
    assert moved.max() < size


def test_permute_spreads_neighbours():
    moved = permute(np.arange(10_000), 10_000, epoch_keys(3, 1)[:-1])
    correlation = np.corrcoef(np.arange(10_000), moved)[0, 1]
    assert abs(correlation) < 0.05
    assert abs(np.corrcoef(moved[:-1], moved[1:])[0, 1]) < 0.05


def test_prefetch_keeps_order_and_passes_errors_on():
    def items():
        yield from range(5)
        raise DataError("broken")

    with Prefetcher(items(), depth=2) as reader:
        assert [next(reader) for _ in range(5)] == list(range(5))
        with pytest.raises(DataError, match="broken"):
            next(reader)
        with pytest.raises(StopIteration):
            next(reader)
    assert list(Prefetcher(range(100), depth=3)) == list(range(100))


def test_prefetch_closes_in_the_middle():
    made = []

    def items():
        for i in range(10_000):
            made.append(i)
            yield i

    reader = Prefetcher(items(), depth=2)
    next(reader)
    reader.close()
    assert not reader._thread.is_alive()
    assert len(made) < 10


def test_prefetch_works_ahead():
    second_is_made = threading.Event()

    def items():
        yield 1
        second_is_made.set()
        yield 2

    with Prefetcher(items(), depth=1) as reader:
        assert second_is_made.wait(10)
        assert list(reader) == [1, 2]


def test_squared_lengths_are_those_of_documents_or_of_whole_sequences():
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    assert Batch(tokens, tokens, torch.tensor([0, 2, 2, 12])).sum_of_squared_lengths() == 4 + 100
    assert Batch(tokens.view(3, 4), tokens.view(3, 4), None).sum_of_squared_lengths() == 3 * 16
