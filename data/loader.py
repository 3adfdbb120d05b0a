"""Deterministic batches of fixed-length sequences out of a split.

The split's documents form one ring of T tokens. Each epoch cuts it into T // L sequences of L = seq_len
inputs (targets are the next tokens) from a start of its own, and visits them in an order of its own. Both
depend on (seed, epoch) only, so the sequences of a step are a pure function of (seed, step), whatever the
number of ranks.

M micro_batch_size, L seq_len, T tokens of the split.
"""

import hashlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from data.errors import DataError
from data.shards import TokenSplit

IGNORED_TARGET = -100
FEISTEL_ROUNDS = 4
CLOSE_SECONDS = 2.0
Item = TypeVar("Item")


class Batch(NamedTuple):
    """What one rank trains on in one micro-step.

    With isolated documents tokens and targets are (1, M * L) and `cu_seqlens` holds the boundaries of
    documents and sequences, int32 (num_sequences + 1,), from 0 to M * L. Otherwise they are (M, L) and
    `cu_seqlens` is None. A target is -100 where the next token belongs to another document.
    """

    tokens: torch.Tensor  # int64
    targets: torch.Tensor  # int64
    cu_seqlens: torch.Tensor | None

    def sum_of_squared_lengths(self) -> int:
        """Sum of squared document lengths, or of sequence lengths without isolation.

        The cost of softmax attention grows with it.
        """
        if self.cu_seqlens is None:
            return self.tokens.numel() * self.tokens.shape[1]
        return int(self.cu_seqlens.diff().long().square().sum())


class TrainLoader:
    """Batches of a split. Holds no state: every method is a pure function of its arguments.

    `ramp` gives the number of sequences of each of the first steps, before `sequences_per_step` applies.
    """

    def __init__(
        self,
        split: TokenSplit,
        seq_len: int,
        sequences_per_step: int,
        seed: int,
        isolate_documents: bool = True,
        ramp: Sequence[int] = (),
    ):
        if split.tokens < seq_len + 1:
            raise DataError(
                f"seq_len={seq_len} needs {seq_len + 1} tokens, the {split.name} split has {split.tokens}:"
                f" lower seq_len or give more text"
            )
        self.split = split
        self.seq_len = seq_len
        self.sequences_per_step = sequences_per_step
        self.seed = seed
        self.isolate_documents = isolate_documents
        self.sequences_per_epoch = split.tokens // seq_len
        self._ramp_ends = np.cumsum([0, *ramp])

    def sequences(self, step: int) -> tuple[int, int]:
        """Numbers of the first sequence of a step and of the next one, counted from the start of training."""
        return self._first_sequence(step), self._first_sequence(step + 1)

    def _first_sequence(self, step: int) -> int:
        in_ramp = min(step, len(self._ramp_ends) - 1)
        return int(self._ramp_ends[in_ramp]) + (step - in_ramp) * self.sequences_per_step

    def batch(self, step: int, rank: int, world_size: int, micro_step: int, micro_batch_size: int) -> Batch:
        """The sequences (micro_step * world_size + rank) * M + [0, M) of a step."""
        first = (micro_step * world_size + rank) * micro_batch_size
        starts = self.starts(step)
        if not (0 <= rank < world_size and 0 <= first <= len(starts) - micro_batch_size):
            raise DataError(
                f"micro_batch_size={micro_batch_size}: micro-step {micro_step} of rank {rank}/{world_size} is"
                f" outside the {len(starts)} sequences of a step"
            )
        return self._assemble(starts[first : first + micro_batch_size])

    def num_targets(self, step: int) -> int:
        """Number of targets other than -100 in the whole step, over all ranks and micro-steps."""
        starts = self.starts(step)
        masked = self._count_ends(starts + self.seq_len) - self._count_ends(starts)
        return len(starts) * self.seq_len - int(masked.sum())

    def starts(self, step: int) -> np.ndarray:
        """Where each sequence of a step starts in the ring of tokens, int64 (num_sequences,)."""
        order = np.arange(*self.sequences(step))
        starts = np.empty_like(order)
        epochs = order // self.sequences_per_epoch
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            keys = epoch_keys(self.seed, int(epoch))
            offset = int(keys[-1]) % self.split.tokens
            index = permute(order[chosen] % self.sequences_per_epoch, self.sequences_per_epoch, keys[:-1])
            starts[chosen] = (offset + index * self.seq_len) % self.split.tokens
        return starts

    def _count_ends(self, positions: np.ndarray) -> np.ndarray:
        """Number of document ends in (0, position] of the unrolled ring, for positions below 2 T."""
        rounds, rest = np.divmod(positions, self.split.tokens)
        return rounds * self.split.documents + np.searchsorted(self.split.ends, rest, side="right")

    def _ends_after(self, start: int) -> np.ndarray:
        """Document ends in (start, start + L], relative to start."""
        T, stop = self.split.tokens, start + self.seq_len
        ends = self.split.ends
        before_wrap = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop, "right")]
        after_wrap = ends[: np.searchsorted(ends, stop - T, "right")] + T
        return np.concatenate([before_wrap, after_wrap]) - start

    def _read_ring(self, start: int, num_tokens: int) -> np.ndarray:
        stop = start + num_tokens
        if stop <= self.split.tokens:
            return self.split.read(start, stop)
        return np.concatenate(
            [self.split.read(start, self.split.tokens), self.split.read(0, stop - self.split.tokens)]
        )

    def _assemble(self, starts: np.ndarray) -> Batch:
        M, L = len(starts), self.seq_len
        rows = np.stack([self._read_ring(start, L + 1) for start in starts.tolist()])  # (M, L + 1)
        tokens, targets = rows[:, :-1].copy(), rows[:, 1:].copy()  # (M, L)
        is_boundary = np.zeros(M * L + 1, bool)
        is_boundary[::L] = True
        for row, start in enumerate(starts.tolist()):
            ends = self._ends_after(start)  # in [1, L]
            targets[row, ends - 1] = IGNORED_TARGET
            is_boundary[row * L + ends] = True
        if not self.isolate_documents:
            return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), None)
        cu_seqlens = np.flatnonzero(is_boundary).astype(np.int32)
        return Batch(
            torch.from_numpy(tokens.reshape(1, M * L)),
            torch.from_numpy(targets.reshape(1, M * L)),
            torch.from_numpy(cu_seqlens),
        )


def shorten(batch: Batch, seq_len: int) -> Batch:
    """The same tokens and targets in sequences of `seq_len`, which divides that of the batch."""
    if batch.cu_seqlens is None:
        return Batch(batch.tokens.view(-1, seq_len), batch.targets.view(-1, seq_len), None)
    cuts = torch.arange(0, batch.tokens.shape[1] + 1, seq_len, dtype=torch.int32)
    return batch._replace(cu_seqlens=torch.cat([batch.cu_seqlens, cuts]).unique())


def epoch_keys(seed: int, epoch: int) -> np.ndarray:
    """Independent random numbers of an epoch, uint64 (FEISTEL_ROUNDS + 1,)."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * (FEISTEL_ROUNDS + 1)).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed random permutation of [0, size) sends each index; int64 in and out, no table.

    A Feistel network (Luby and Rackoff 1988) permutes the next power of four; values outside [0, size) go
    through it again until they are inside (cycle walking, Black and Rogaway 2002).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    value = index.astype(np.uint64)
    outside = np.ones(len(value), bool)
    while outside.any():
        value[outside] = _feistel(value[outside], half_bits, keys)
        outside = value >= size
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Prefetcher(Generic[Item]):
    """Iterates over an iterable in a thread that runs up to `depth` items ahead.

    An exception of the iterable is raised where its item would have come. Use it as a context manager, or
    call `close`, so that the thread ends.
    """

    _END = object()

    def __init__(self, iterable: Iterable[Item], depth: int):
        self._queue: queue.Queue = queue.Queue(depth)
        self._taken: tuple | None = None  # taken from the queue by `ready` and not yet returned
        self._closed = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._fill, args=(iterable,), name="prefetch", daemon=True)
        self._thread.start()

    def _fill(self, iterable: Iterable[Item]) -> None:
        try:
            for item in iterable:
                if not self._put((item, None)):
                    return
            self._put((self._END, None))
        except BaseException as error:
            self._put((self._END, error))

    def _put(self, entry: tuple) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Item]:
        return self

    def ready(self, timeout_seconds: float) -> bool:
        """Wait up to `timeout_seconds` for the next item, the end or an error; whether it has come."""
        if self._taken is None and not self._finished:
            try:
                self._taken = self._queue.get(timeout=max(timeout_seconds, 1e-3))
            except queue.Empty:
                return False
        return True

    def __next__(self) -> Item:
        if self._finished:
            raise StopIteration
        item, error = self._taken or self._queue.get()
        self._taken = None
        if item is self._END:
            self.close()
            if error is not None:
                raise error
            raise StopIteration
        return item

    def close(self) -> None:
        """Stop the thread and drop the items read ahead."""
        self._finished = True
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)  # it may hang in a read from a slow disk

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(self, *_) -> None:
        self.close()
