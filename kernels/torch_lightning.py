"""The PyTorch backend: chunked decayed linear attention on any device, in memory linear in N.

One function, `walk`, carries a state over the rows of every sequence and serves all four passes, since each
gradient is the same walk with the tensors in other roles (derivation in docs/kernels.md):

    o  = walk(q, k, v, S)                dq = walk(do, v, k, Sᵀ)
    dk = walk(v, do, q, dSᵀ, reverse)    dv = walk(k, q, do, dS, reverse)

Rows of all sequences are cut into chunks that never cross a sequence; a block of chunks is worked on as one
batched product, so that neither tokens nor sequences are looped over.

Shapes: q, k (R, H, Dk); v, o (R, H, Dv); state (S, H, Dk, Dv); slopes (H,).
R rows of all sequences, S sequences, H heads, T chunks in a block, C rows in a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import compute_dtype, decay_powers, without_autocast

CHUNK = 64  # rows of the quadratic product
BLOCK = 16  # chunks worked on at once: 1,024 rows stay in cache, whatever N is


class Chunks(NamedTuple):
    """Where each chunk lies, in row order: int64 tensors with one entry per chunk."""

    sequence: Tensor
    row: Tensor  # first row of the chunk
    length: Tensor  # rows in use, 1 to CHUNK
    before: Tensor  # rows of the sequence before the chunk
    after: Tensor  # rows of the sequence after the chunk


def cut_into_chunks(cu_seqlens: Tensor) -> Chunks:
    """Chunks of the sequences that lie in rows cu_seqlens[i] to cu_seqlens[i + 1]."""
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens.diff()
    counts = (lengths + CHUNK - 1) // CHUNK
    sequence = torch.repeat_interleave(counts)
    index = torch.arange(len(sequence), device=sequence.device) - (counts.cumsum(0) - counts)[sequence]
    before = index * CHUNK
    length = (lengths[sequence] - before).clamp(max=CHUNK)
    return Chunks(
        sequence, cu_seqlens[sequence] + before, length, before, lengths[sequence] - before - length
    )


def walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    slopes: Tensor,
    chunks: Chunks,
    initial_state: Tensor | None = None,
    final_state: Tensor | None = None,
    reverse: bool = False,
) -> None:
    """Writes o of the recurrence over all chunks and, where it is given, the final state of each sequence.

    Forwards, row t reads the state that already holds row t. In reverse, for a sequence of n rows,
    o_t = Σ_{u >= t} λ^(u-t) (q_t·k_u) v_u + λ^(n-1-t) q_t·initial, final = λ^n initial + Σ λ^(u+1) k_uᵀ v_u.
    """
    slopes = slopes.to(compute_dtype(q.dtype))
    blocks = list(zip(*(x.split(BLOCK) for x in chunks), strict=True))
    carry = None
    for block in reversed(blocks) if reverse else blocks:
        carry = _walk_block(q, k, v, o, slopes, Chunks(*block), carry, initial_state, final_state, reverse)


def _walk_block(q, k, v, o, slopes, block: Chunks, carry, initial_state, final_state, reverse):
    """Writes the block's rows of o; returns the carry to the next block (see _states_into_chunks)."""
    index = torch.arange(CHUNK, device=q.device)
    row = block.row[:, None] + index  # (T, C)
    valid = index < block.length[:, None]  # (T, C)
    q, k, v = (_gather(x, row, valid) for x in (q, k, v))  # (H, T, C, D)

    distance = index[:, None] - index  # from row to column
    through, to_end = index + 1, block.length[:, None] - 1 - index
    if reverse:
        distance, (out_of_state, into_state) = distance.T, (to_end, through)
    else:
        out_of_state, into_state = through, to_end
    scores = (q @ k.mT).mul_(decay_powers(slopes, distance)[:, None])
    block_o = scores @ v
    local = (k * decay_powers(slopes, into_state.expand_as(valid))[..., None]).mT @ v  # (H, T, Dk, Dv)

    state, carry = _states_into_chunks(local, slopes, block, carry, reverse)
    if initial_state is not None:
        distance = block.after if reverse else block.before
        initial = initial_state[block.sequence].transpose(0, 1).to(local.dtype)
        state += decay_powers(slopes, distance)[..., None, None] * initial
    block_o += (q * decay_powers(slopes, out_of_state.expand_as(valid))[..., None]) @ state
    _scatter(o, row, valid, block_o)

    if final_state is not None:
        ends = (block.before if reverse else block.after) == 0
        state = decay_powers(slopes, block.length)[..., None, None] * state + local
        final_state[block.sequence[ends]] = state[:, ends].transpose(0, 1)
    return carry


def _states_into_chunks(local: Tensor, slopes: Tensor, block: Chunks, carry, reverse: bool):
    """The state each chunk starts from, (H, T, Dk, Dv), without initial states, and the next block's carry.

    A carry is (sequence, rows of it before the border, state there without the initial one).
    """
    edge = 0 if reverse else -1
    same = block.sequence[:, None] == block.sequence
    gap = block.before[:, None] - block.before - block.length  # rows between chunk u (column) and t (row)
    gap = torch.where(same, gap, -1)
    state = decay_powers(slopes, gap.T if reverse else gap) @ local.flatten(2)  # (H, T, Dk·Dv)
    state = state.view_as(local)
    if carry is not None:
        sequence, position, carried = carry
        here = block.before + block.length if reverse else block.before
        gap = torch.where(block.sequence == sequence, position - here if reverse else here - position, -1)
        state += decay_powers(slopes, gap)[..., None, None] * carried[:, None]
    carried = decay_powers(slopes, block.length[edge])[:, None, None] * state[:, edge] + local[:, edge]
    position = block.before[edge] if reverse else block.before[edge] + block.length[edge]
    return state, (block.sequence[edge], position, carried)


def _gather(x: Tensor, row: Tensor, valid: Tensor) -> Tensor:
    """Rows of x as (H, T, C, D) in the compute dtype, zero where a chunk has no row."""
    if valid.all():  # full chunks follow one another
        rows = x[row[0, 0] : row[-1, -1] + 1].unflatten(0, row.shape)
    else:
        rows = torch.where(valid[..., None, None], x[row.clamp(max=x.shape[0] - 1)], 0)
    return rows.permute(2, 0, 1, 3).to(compute_dtype(x.dtype)).contiguous()


def _scatter(x: Tensor, row: Tensor, valid: Tensor, values: Tensor) -> None:
    """Writes values, (H, T, C, D), to the rows of x that the chunks have."""
    values = values.permute(1, 2, 0, 3)
    if valid.all():
        x[row[0, 0] : row[-1, -1] + 1].unflatten(0, row.shape).copy_(values)
    else:
        x[row[valid]] = values[valid].to(x.dtype)


def _rows(x: Tensor) -> Tensor:
    """(B, N, H, D) as (B·N, H, D)."""
    return x.reshape(-1, *x.shape[2:])


def _boundaries(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """cu_seqlens over the rows of all sequences; a batch is B sequences of N rows."""
    if cu_seqlens is not None:
        return cu_seqlens
    return torch.arange(q.shape[0] + 1, device=q.device) * q.shape[1]


def _keep_initial(final_state: Tensor | None, initial_state: Tensor | None) -> None:
    """What a sequence without rows ends with."""
    if final_state is not None:
        final_state.zero_() if initial_state is None else final_state.copy_(initial_state)


@without_autocast
def forward(q, k, v, slopes, initial_state, cu_seqlens, o, final_state, segment_states) -> None:
    """Writes o and, unless None, final_state. Sequences are not cut into segments."""
    chunks = cut_into_chunks(_boundaries(q, cu_seqlens))
    _keep_initial(final_state, initial_state)
    walk(_rows(q), _rows(k), _rows(v), _rows(o), slopes, chunks, initial_state, final_state)


@without_autocast
def backward(
    q, k, v, slopes, initial_state, cu_seqlens, segment_states, grad_o, grad_final, dq, dk, dv, dinitial
) -> None:
    """Writes dq, dk, dv and, unless None, dinitial."""
    chunks = cut_into_chunks(_boundaries(q, cu_seqlens))
    q, k, v, do, dq, dk, dv = (_rows(x) for x in (q, k, v, grad_o, dq, dk, dv))
    state = None if initial_state is None else initial_state.mT
    dstate = None if grad_final is None else grad_final.mT
    _keep_initial(dinitial, grad_final)
    walk(do, v, k, dq, slopes, chunks, state)
    walk(v, do, q, dk, slopes, chunks, dstate, reverse=True)
    walk(k, q, do, dv, slopes, chunks, grad_final, dinitial, reverse=True)
