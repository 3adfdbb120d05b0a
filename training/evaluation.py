"""Scoring documents: loss, perplexity and bits per byte at a sequence length.

A document is [BOS] its tokens [EOS]. Every token of it and EOS is scored exactly once, BOS never; nothing is
seen across documents. What a token is predicted from depends on the window rule:

disjoint   the document is cut into windows of `seq_len` inputs, each from a fresh state; the last is shorter
strided    windows of `seq_len` inputs overlap: after the first, each scores the next `stride` targets, all of
           them predicted from more than `seq_len - stride` inputs
streaming  all that comes before it in the document: the state is carried from chunk to chunk, at constant
           memory with linear attention; equal to one disjoint window over the whole document

Only the first window of a document starts with BOS. Losses are in nats per scored token. Bytes and words are
those of the scored text: its UTF-8, and what whitespace separates in it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.cross_entropy import IGNORED
from models.transnormer import DecodeState
from training.distributed import World
from training.errors import SettingError

WINDOWS = ("disjoint", "strided", "streaming")
BOOTSTRAP_SAMPLES = 1000
LONGEST_CHARACTER = 4  # bytes in UTF-8


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
        loss_by_position: (first position, tokens, mean loss) for positions in the window in powers of two:
            0, 1, 2–3, 4–7, … inputs before the one that predicts; in the document for streaming.
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
    inputs: np.ndarray
    targets: np.ndarray  # IGNORED where another window scores it

    @property
    def num_scored(self) -> int:
        return int(np.count_nonzero(self.targets != IGNORED))


def documents_of(split, tokenizer, max_tokens: int = 0) -> list[EvalDocument]:
    """Documents of a prepared split, in stored order, up to `max_tokens` scored tokens (0: all).

    The last document is cut at the limit where it would pass it, and counts the bytes that remain.
    """
    documents: list[EvalDocument] = []
    left = max_tokens or sys.maxsize - 1
    for ids, num_bytes in split:
        if left < 1:
            break
        kept = min(len(ids), left + 1)
        ids, rest = ids[:kept], ids[kept:]
        text = tokenizer.decode(ids.tolist())
        if len(rest):
            num_bytes = _bytes_of_cut(ids.tolist(), rest.tolist(), tokenizer)
        documents.append(EvalDocument(ids, num_bytes, len(text.split())))
        left -= len(ids) - 1
    return documents


def describe_unknown(split, tokenizer) -> str:
    """A line on the text of a prepared split that the tokenizer can't express; empty if there is none."""
    if tokenizer.unk_id < 0:
        return ""
    unknown = total = 0
    for ids, _ in split:
        unknown += int(np.count_nonzero(ids == tokenizer.unk_id))
        total += len(ids) - 1
    if not unknown:
        return ""
    return (
        f"{unknown:,} of {total:,} tokens of the text to score stand for what the tokenizer can't express: "
        "losses and bits per byte are too low to be compared with those of another tokenizer"
    )


def _bytes_of_cut(ids: list[int], rest: list[int], tokenizer) -> int:
    """Bytes of the text of `ids`, which `rest` follows; the cut may lie within a character.

    Then the tokens on both sides of it are bytes: as many of `rest` are missing from `ids` as it takes for
    the texts of both sides to be the whole text. Some tokenizers drop a text's first space.
    """
    everything = tokenizer.decode(ids + rest)
    for missing in range(LONGEST_CHARACTER):
        begun = tokenizer.decode(ids + rest[:missing])
        left = everything.removeprefix(begun)
        endings = (left, left.removeprefix(" "))
        if everything.startswith(begun) and tokenizer.decode(rest[missing:]) in endings:
            return len(begun.encode()) - missing
    return len(tokenizer.decode(ids).encode())


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
        seq_len: window in tokens (streaming: the largest chunk, which matters by rounding only).
        stride: strided: targets scored a window; default half of seq_len.
        batch_tokens: tokens of a forward pass, at least one window.
        progress: called with the tokens that all ranks together have scored since the last call.

    Raises:
        SettingError: no document reaches seq_len, nothing can be scored, or the stride leaves targets out.
    """
    lengths = [len(document.ids) - 1 for document in documents]
    if not documents or max(lengths) < 1:
        raise SettingError("data: no text to score.")
    if window != "streaming" and max(lengths) < seq_len:
        raise SettingError(
            f"a length of {seq_len} is longer than the longest document ({max(lengths)} tokens): "
            f"use a shorter one, a longer text, or window=streaming."
        )
    stride = resolve_stride(seq_len, window, stride)
    if stride is not None and stride > seq_len:
        raise SettingError(
            f"stride={stride} is longer than the length, {seq_len}: targets would be left out."
        )
    tally = _Tally(lengths)
    with torch.no_grad():
        if window == "streaming":
            chunk_tokens = min(seq_len, batch_tokens)
            long = [index for index, length in enumerate(lengths) if length > chunk_tokens]
            windows = _windows(documents, chunk_tokens, None)
            short = (window for window in windows if lengths[window.document] <= chunk_tokens)
            _score_windows(forward, short, batch_tokens, world, tally, progress)
            _stream(forward, documents, long, chunk_tokens, world, tally, progress)
        else:
            windows = _windows(documents, seq_len, stride)
            _score_windows(forward, windows, max(batch_tokens, seq_len), world, tally, progress)
    return _summarize(tally, documents, seq_len, window, stride, world)


def resolve_stride(seq_len: int, window: str, stride: int | None) -> int | None:
    """Targets that a strided window scores, half of its length unless it is given; None for other rules."""
    return (stride or max(seq_len // 2, 1)) if window == "strided" else None


def _windows(documents: list[EvalDocument], seq_len: int, stride: int | None) -> Iterator[_Window]:
    for index, document in enumerate(documents):
        ids, scored = document.ids, 0  # targets 1 … scored have been scored
        while scored < len(ids) - 1:
            new = seq_len if stride is None or scored == 0 else stride
            stop = min(scored + new, len(ids) - 1)  # last input of the window
            start = max(stop - seq_len, 0) if stride is not None else scored
            targets = ids[start + 1 : stop + 1].copy()
            targets[: scored - start] = IGNORED
            yield _Window(index, ids[start:stop], targets)
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
    """Score packed windows; the batches go around the ranks, and each rank makes as many calls.

    On a GPU a batch is filled up by a sequence that is not scored: one shape, so one compilation.
    """
    batches = list(_packed(windows, batch_tokens))
    for first in range(0, len(batches), world.size):
        mine = first + world.rank
        batch = batches[mine] if mine < len(batches) else batches[0]  # keep step with the others
        lengths = [len(window.inputs) for window in batch]
        inputs = np.concatenate([window.inputs for window in batch])
        targets = np.concatenate([window.targets for window in batch])
        bounds = np.cumsum([0, *lengths], dtype=np.int32)
        padding = batch_tokens - len(inputs) if world.device.type == "cuda" else 0
        losses = forward(
            _row(np.pad(inputs, (0, padding)), world),
            _row(np.pad(targets, (0, padding), constant_values=IGNORED), world),
            cu_seqlens=torch.from_numpy(np.append(bounds, len(inputs) + padding)).int().to(world.device),
            reduction="none",
        )[0, : len(inputs)]
        if mine < len(batches):
            document = np.repeat([window.document for window in batch], lengths)
            position = np.arange(len(targets)) - np.repeat(bounds[:-1], lengths)
            scored = targets != IGNORED
            tally.add(document[scored], position[scored], losses.cpu().numpy()[scored])
        if progress:
            done = batches[first : first + world.size]
            progress(sum(window.num_scored for batch in done for window in batch))


def _stream(
    forward, documents, chosen: list[int], chunk_tokens: int, world: World, tally: _Tally, progress
) -> None:
    """Score the chosen documents with a carried state, one a rank at a time, the longest first."""
    chosen = sorted(chosen, key=lambda document: -len(documents[document].ids))
    for first in range(0, len(chosen), world.size):
        together = chosen[first : first + world.size]
        mine = together[world.rank] if world.rank < len(together) else None
        ids = documents[together[0] if mine is None else mine].ids
        longest = len(documents[together[0]].ids) - 1
        state = DecodeState()
        for start in range(0, longest, chunk_tokens):
            stop = min(start + chunk_tokens, len(ids) - 1)
            counts = mine is not None and start < stop
            part = slice(start, stop)
            if not counts:  # nothing left here, but the others still need this rank
                part, state = slice(0, 1), DecodeState()
            losses, state = forward(
                _row(ids[:-1][part], world),
                _row(ids[1:][part], world),
                state=state,
                reduction="none",
            )
            if counts:
                tally.add(np.full(stop - start, mine), np.arange(start, stop), losses[0].cpu().numpy())
            if progress:
                ends = (min(start + chunk_tokens, len(documents[other].ids) - 1) for other in together)
                progress(sum(max(end - start, 0) for end in ends))


def _row(ids: np.ndarray, world: World) -> torch.Tensor:
    """ids (N,) as a batch of one, (1, N), on this rank's device."""
    return torch.from_numpy(ids.copy())[None].to(world.device)


class _Tally:
    """Summed losses by document and by position, in fp64."""

    def __init__(self, lengths: list[int]) -> None:
        self.by_document = np.zeros(len(lengths))
        self.tokens = np.zeros(len(lengths))
        num_buckets = max(lengths).bit_length() + 1
        self.by_position = np.zeros(num_buckets)
        self.position_tokens = np.zeros(num_buckets)

    def add(self, document: np.ndarray, position: np.ndarray, losses: np.ndarray) -> None:
        """Losses of scored tokens, their documents and their positions, each (num_tokens,)."""
        losses = losses.astype(np.float64)
        bucket = np.ceil(np.log2(position + 1)).astype(int)
        for sums, counts, index in (
            (self.by_document, self.tokens, document),
            (self.by_position, self.position_tokens, bucket),
        ):
            sums += np.bincount(index, losses, len(sums))
            counts += np.bincount(index, minlength=len(counts))

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
        means.append(float(weights @ tally.by_document) / max(float(weights @ tally.tokens), 1.0))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
