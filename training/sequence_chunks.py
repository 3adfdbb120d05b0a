"""Gradients of a micro-batch whose activations don't fit: computed in chunks of its tokens, exactly.

Attention carries one state of constant size from token to token, so a sequence may be cut anywhere. A first
pass keeps only the states at the cuts. A second goes backwards over the chunks: each is computed again from
the state it starts with, and hands that state's gradient to the chunk before it; the last is computed once.
Shapes: B batch, N sequence, C tokens of a chunk, S packed sequences; a layer's state is (B or S, H, Dk, Dv).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.loader import Batch
from models.config import ModelConfig
from models.transnormer import DecodeState


class Chunk(NamedTuple):
    """Tokens [start, stop) of a batch, whose first sequence may have begun before and last may go on after.

    Attributes:
        tokens, targets: (B, C) int64.
        cu_seqlens: (S + 1,) int32, the parts of packed sequences in this chunk; None for one part a row.
        position: of each part's first token in its sequence: a number, or (S,) int64.
        goes_on: the last sequence crosses the end of this chunk.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    position: int | Tensor
    goes_on: bool


def cut(batch: Batch, chunk_tokens: int) -> list[Chunk]:
    """Chunks of at most `chunk_tokens` tokens in all rows together; only the first may be shorter."""
    num_rows, length = batch.tokens.shape
    step = max(1, chunk_tokens // num_rows)
    starts = [0, *range(length % step or step, length, step)]
    stops = [*starts[1:], length]
    return [_part(batch, start, stop) for start, stop in zip(starts, stops, strict=True)]


def _part(batch: Batch, start: int, stop: int) -> Chunk:
    tokens, targets = batch.tokens[:, start:stop], batch.targets[:, start:stop]
    if batch.cu_seqlens is None:
        return Chunk(tokens, targets, None, start, stop < batch.tokens.shape[1])
    bounds = batch.cu_seqlens
    before = start - int(bounds[bounds <= start].max())  # tokens of the first sequence that came earlier
    goes_on = not bool((bounds == stop).any())
    inside = bounds[(bounds > start) & (bounds < stop)].unique() - start
    if len(inside) == 0:
        return Chunk(tokens, targets, None, before, goes_on)
    cu_seqlens = torch.cat([inside.new_tensor([0]), inside, inside.new_tensor([stop - start])])
    position = torch.zeros(len(cu_seqlens) - 1, dtype=torch.int64)
    position[0] = before
    return Chunk(tokens, targets, cu_seqlens, position, goes_on)


def backward_in_chunks(
    engine: Any, config: ModelConfig, chunks: list[Chunk], scale: float, device: torch.device, is_last: bool
) -> Tensor:
    """Accumulate the gradients of `scale` times the summed loss. Returns the loss, fp32 nats.

    Args:
        engine: DeepSpeed's, around a TransNormer; its backward is called once a chunk.
        is_last: this micro-batch is the step's last, after which gradients are reduced.
    """
    chunks = [_to(chunk, device) for chunk in chunks]
    borders = [_zero_states(config, len(chunks[0].tokens), device)]  # what each chunk starts from
    with torch.no_grad():
        for chunk in chunks[:-1]:
            inputs = {"cu_seqlens": chunk.cu_seqlens, "state": _start(chunk, borders[-1])}
            _, state = engine(chunk.tokens, last_only=True, **inputs)
            borders.append(_end(state) if chunk.goes_on else borders[0])
    total = torch.zeros((), device=device)
    gradients: list[Tensor] = []
    for index in reversed(range(len(chunks))):
        chunk, border = chunks[index], [x.detach().requires_grad_() for x in borders.pop()]
        engine.set_gradient_accumulation_boundary(is_last and index == 0)
        inputs = {"cu_seqlens": chunk.cu_seqlens, "state": _start(chunk, border)}
        loss, state = engine(chunk.tokens, chunk.targets, **inputs)
        objective = loss * scale
        if chunk.goes_on:  # a product whose derivative by the state is the gradient handed back
            objective += sum((x * g).sum() for x, g in zip(_end(state), gradients, strict=True))
        engine.backward(objective, scale_wrt_gas=False)
        gradients = [x.grad for x in border if x.grad is not None]
        total += loss.detach()
    return total


def _to(chunk: Chunk, device: torch.device) -> Chunk:
    def moved(x: Any) -> Any:
        return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

    return Chunk(*map(moved, chunk))


def _zero_states(config: ModelConfig, num_rows: int, device: torch.device) -> list[Tensor]:
    """Each layer's (B, H, Dk, Dv) before the first token."""
    shapes = [
        (num_rows, config.num_heads, config.qk_dim(layer), config.head_dim)
        for layer in range(config.num_layers)
    ]
    return [torch.zeros(shape, device=device) for shape in shapes]


def _start(chunk: Chunk, border: list[Tensor]) -> DecodeState:
    """Packed sequences after the first start from zero."""
    if chunk.cu_seqlens is None:
        return DecodeState(chunk.position, border)
    num_new = len(chunk.cu_seqlens) - 2
    layers = [torch.cat([x, x.new_zeros(num_new, *x.shape[1:])]) for x in border]
    for x in layers:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return DecodeState(chunk.position, layers)


def _end(state: DecodeState) -> list[Tensor]:
    """The states of the rows, or of the last packed sequence."""
    packed = isinstance(state.position, Tensor)
    return [x[-1:] if packed else x for x in state.layers]
