"""Scoring documents: loss, perplexity and bits per byte at a sequence length.

A document is [BOS] tokens [EOS]; every token but BOS is scored exactly once, given what its window shows:

disjoint   windows of `seq_len` inputs, each from a fresh state
strided    windows of `seq_len` inputs that overlap; only their last `stride` targets are scored
streaming  one window as long as the document: the state is carried from chunk to chunk of `seq_len`

Losses are in nats. Bytes are those of the UTF-8 text of the scored documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from models.layers import IGNORED
from models.transnormer import DecodeState
from training.distributed import World
from training.errors import SettingError

WINDOWS = ("disjoint", "strided", "streaming")
BOOTSTRAP_SAMPLES = 1000


@dataclass(slots=True)
class EvalDocument:
    """ids int64 (num_tokens,) with BOS and EOS; bytes and whitespace-separated words of its text."""

    ids: np.ndarray
    num_bytes: int
    num_words: int


@dataclass(slots=True)
class EvalResult:
    """One text scored at one length.

    Attributes:
        loss: mean nats a token; loss_low and loss_high bound it at 95 % (bootstrap over documents, null
            for a single one).
        word_perplexity: exp of the summed loss over whitespace-separated words.
        loss_by_position: (first position, tokens, mean loss) for positions in powers of two.
    """

    seq_len: int
    window: str
    stride: int | None
    tokens: int
    bytes: int
    words: int
    documents: int
    loss: float
    loss_low: float | None
    loss_high: float | None
    perplexity: float
    word_perplexity: float | None
    bits_per_byte: float
    loss_by_position: list[tuple[int, int, float]] = field(default_factory=list)


@dataclass(slots=True)
class _Window:
    document: int
    start: int  # position of the first input in the document
    inputs: np.ndarray
    targets: np.ndarray  # IGNORED where another window scores it


def documents_of(split, tokenizer, max_tokens: int = 0) -> list[EvalDocument]:
    """Documents of a prepared split, in stored order, up to `max_tokens` scored tokens (0: all).

    The last document is cut at the limit where it would pass it, and counts the bytes that remain.
    """
    documents: list[EvalDocument] = []
    left = max_tokens or math.inf
    for ids, num_bytes in split:
        if left < 1:
            break
        cut = len(ids) - 1 > left
        if cut:
            ids = ids[: int(left) + 1]
        text = tokenizer.decode(ids.tolist())
        num_bytes = len(text.encode()) if cut else num_bytes
        documents.append(EvalDocument(ids, num_bytes, len(text.split())))
        left -= len(ids) - 1
    return documents


def evaluate(
    forward: Callable,
    documents: list[EvalDocument],
    seq_len: int,
    world: World,
    *,
    window: str = "disjoint",
    stride: int | None = None,
    batch_tokens: int = 16384,
    progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Score documents at one length, sharing the work over ranks; every rank gets the result.

    Args:
        forward: the model, called as `TransNormer` is; on every rank equally often (ZeRO 3 needs that).
        seq_len: window in tokens (streaming: the chunk, which changes no number).
        stride: strided: targets scored a window; default half of seq_len.
        batch_tokens: tokens of a forward pass, at least one window.

    Raises:
        SettingError: no document reaches seq_len, or nothing can be scored.
    """
    lengths = [len(document.ids) - 1 for document in documents]
    if not documents or max(lengths) < 1:
        raise SettingError("data: no text to score.")
    if window != "streaming" and max(lengths) < seq_len:
        raise SettingError(
            f"seq_lens={seq_len} is longer than the longest document ({max(lengths)} tokens): "
            f"use a shorter length, a longer text, or window=streaming."
        )
    stride = (stride or max(seq_len // 2, 1)) if window == "strided" else None
    tally = _Tally(lengths)
    with torch.no_grad():
        if window == "streaming":
            _stream(forward, documents, seq_len, world, tally, progress)
        else:
            windows = _windows(documents, seq_len, stride)
            _score_windows(forward, windows, max(batch_tokens, seq_len), world, tally, progress)
    return _summarize(tally, documents, seq_len, window, stride, world)


def _windows(documents: list[EvalDocument], seq_len: int, stride: int | None) -> Iterator[_Window]:
    for index, document in enumerate(documents):
        ids, scored = document.ids, 0  # targets 1 … scored have been scored
        while scored < len(ids) - 1:
            new = seq_len if stride is None or scored == 0 else stride
            stop = min(scored + new, len(ids) - 1)  # last input of the window
            start = max(stop - seq_len, 0) if stride is not None else scored
            targets = ids[start + 1 : stop + 1].copy()
            targets[: scored - start] = IGNORED
            yield _Window(index, start, ids[start:stop], targets)
            scored = stop


def _packed(windows: Iterable[_Window], batch_tokens: int) -> Iterator[list[_Window]]:
    """Group windows into batches of at most `batch_tokens` tokens, in order."""
    batch: list[_Window] = []
    size = 0
    for window in windows:
        if batch and size + len(window.inputs) > batch_tokens:
            yield batch
            batch, size = [], 0
        batch.append(window)
        size += len(window.inputs)
    if batch:
        yield batch


def _score_windows(forward, windows, batch_tokens: int, world: World, tally: _Tally, progress) -> None:
    batches = list(_packed(windows, batch_tokens))
    rounds = math.ceil(len(batches) / world.size)
    for index in range(rounds):
        mine = index * world.size + world.rank
        batch = batches[mine] if mine < len(batches) else batches[0]  # keep step with the others
        tokens = torch.from_numpy(np.concatenate([window.inputs for window in batch]))[None]
        targets = torch.from_numpy(np.concatenate([window.targets for window in batch]))[None]
        bounds = np.cumsum([0] + [len(window.inputs) for window in batch], dtype=np.int32)
        losses = forward(
            tokens.to(world.device),
            targets.to(world.device),
            cu_seqlens=torch.from_numpy(bounds).to(world.device),
            reduction="none",
        )[0].cpu()
        if mine < len(batches):
            for window, part in zip(batch, losses.split([len(w.inputs) for w in batch]), strict=True):
                tally.add(window.document, window.start, part.numpy(), window.targets != IGNORED)
        if progress:
            progress(sum(len(window.inputs) for window in batch) * world.size)


def _stream(forward, documents, chunk_tokens: int, world: World, tally: _Tally, progress) -> None:
    rounds = math.ceil(len(documents) / world.size)
    chunks_of = [math.ceil((len(document.ids) - 1) / chunk_tokens) for document in documents]
    for index in range(rounds):
        in_round = range(index * world.size, min((index + 1) * world.size, len(documents)))
        mine = index * world.size + world.rank
        state = DecodeState()
        ids = documents[mine].ids if mine < len(documents) else documents[0].ids
        for chunk in range(max(chunks_of[document] for document in in_round)):
            start = chunk * chunk_tokens
            inputs = ids[start : min(start + chunk_tokens, len(ids) - 1)]
            counts = mine < len(documents) and len(inputs) > 0
            if not counts:  # nothing left here, but the others still need this rank
                inputs, start, state = ids[:1], 0, DecodeState()
            targets = torch.from_numpy(ids[start + 1 : start + len(inputs) + 1].copy())[None]
            losses, state = forward(
                torch.from_numpy(inputs.copy())[None].to(world.device),
                targets.to(world.device),
                state=state,
                reduction="none",
            )
            if counts:
                tally.add(mine, start, losses[0].cpu().numpy(), np.ones(len(inputs), bool))
            if progress:
                progress(len(inputs) * world.size)


class _Tally:
    """Summed losses by document and by position, in fp64."""

    def __init__(self, lengths: list[int]) -> None:
        self.by_document = np.zeros(len(lengths))
        self.tokens = np.zeros(len(lengths))
        num_buckets = max(lengths).bit_length() + 1
        self.by_position = np.zeros(num_buckets)
        self.position_tokens = np.zeros(num_buckets)

    def add(self, document: int, start: int, losses: np.ndarray, scored: np.ndarray) -> None:
        """Losses of consecutive positions from `start` on, of which `scored` count."""
        losses = losses.astype(np.float64)[scored]
        positions = np.arange(start, start + len(scored))[scored]
        self.by_document[document] += losses.sum()
        self.tokens[document] += len(losses)
        bucket = np.ceil(np.log2(positions + 1)).astype(int)
        np.add.at(self.by_position, bucket, losses)
        np.add.at(self.position_tokens, bucket, 1)

    def reduce(self, world: World) -> None:
        """Sum over ranks."""
        arrays = (self.by_document, self.tokens, self.by_position, self.position_tokens)
        total = np.array(world.sum(np.concatenate(arrays).tolist()))
        parts = np.split(total, np.cumsum([len(array) for array in arrays])[:-1])
        self.by_document, self.tokens, self.by_position, self.position_tokens = parts


def _summarize(
    tally: _Tally, documents: list[EvalDocument], seq_len: int, window: str, stride: int | None, world: World
) -> EvalResult:
    tally.reduce(world)
    total, tokens = float(tally.by_document.sum()), int(tally.tokens.sum())
    num_bytes, words = sum(d.num_bytes for d in documents), sum(d.num_words for d in documents)
    low, high = _bootstrap(tally)
    return EvalResult(
        seq_len=seq_len,
        window=window,
        stride=stride,
        tokens=tokens,
        bytes=num_bytes,
        words=words,
        documents=len(documents),
        loss=total / tokens,
        loss_low=low,
        loss_high=high,
        perplexity=_exp(total / tokens),
        word_perplexity=_exp(total / words) if words else None,
        bits_per_byte=total / math.log(2) / max(num_bytes, 1),
        loss_by_position=[
            (int(2**bucket // 2), int(count), float(summed / count))
            for bucket, (summed, count) in enumerate(
                zip(tally.by_position, tally.position_tokens, strict=True)
            )
            if count
        ],
    )


def _bootstrap(tally: _Tally) -> tuple[float | None, float | None]:
    """95 % interval of the mean loss, resampling whole documents with a fixed seed."""
    count = len(tally.tokens)
    if count < 2:
        return None, None
    random = np.random.default_rng(0)
    means = []
    for _ in range(BOOTSTRAP_SAMPLES):
        weights = np.bincount(random.integers(0, count, count), minlength=count)
        means.append((weights @ tally.by_document) / max(weights @ tally.tokens, 1))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
