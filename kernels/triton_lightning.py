"""Triton kernels of decayed linear attention, tiled as Lightning Attention-2 (arXiv 2401.04658).

One kernel, `walk_kernel`, serves all four passes: each gradient is the same walk with the tensors in other
roles (derivation in docs/kernels.md). Where it fits, `dk_dv_kernel` does the two reverse ones at once. A
program takes one (sequence, segment, head, value block) and keeps its state in registers, transposed, so that
it is the left operand of the matrix instruction. Where sequences and heads are few, sequences are cut into
segments: `segment_state_kernel` computes what each segment adds to the state, `scan_states_kernel` the state
after each, and the walk then runs on all segments at once.

Rows past a sequence's end are cut off by the tensor descriptors: loads give zero, stores write nothing.
Packed sequences without states of their own are walked as one, whatever their lengths: a chunk may hold
several, and `starts` tells where each row's begins.

Shapes: q, k (B, N, H, Dk); v, o (B, N, H, Dv); slopes (H,); states (S, H, Dk, Dv), those after all segments
but the last (S, P - 1, H, Dk, Dv). B batch, N rows, H heads, S sequences (B, or those of cu_seqlens), P
segments; tiles have C rows (a chunk), BK and BV columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import MAX_PARTS, STATE_BLOCK, Warps, choose_launch, num_parts, padded

LOG2_E = tl.constexpr(1.4426950408889634)
RUNTIME_SIZES = ["N", "P", "T", "H"]  # a new value never recompiles
BOUNDS_BLOCK = 1024  # rows whose sequence one program looks up; a multiple of every chunk


@triton.jit
def decay_powers(log2_decay, distance):
    """λ^distance, 0 where distance is negative. Written directly: λ^-t overflows fp32 within one chunk."""
    return tl.where(distance >= 0, tl.exp2(log2_decay * tl.maximum(distance, 0).to(tl.float32)), 0.0)


@triton.jit
def rows_in_range(log2_decay):
    """Rows after which λ^t is below 2^-64, nothing beside what follows in an fp32 sum; at most 2^30."""
    return tl.minimum(64.0 / tl.maximum(-log2_decay, 1e-7), 1 << 30).to(tl.int32)


@triton.jit
def state_scale(log2_decay, C: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr):
    """What the state in registers is divided by: with SPLIT the mean weight of a chunk's rows, see add_rows.

    Of λ^0 to λ^(C-1), in reverse λ^1 to λ^C; at least 2^-64, so that a quotient fits in bf16.
    """
    scale = 1.0
    if SPLIT:
        distance = tl.arange(0, C) + (1 if REVERSE else 0)
        scale = tl.maximum(tl.sum(decay_powers(log2_decay, distance), axis=0) / C, 1 / 2**64)
    return scale


@triton.jit
def add_rows(b_s, b_k, b_v, decay, weight, scale, SPLIT: tl.constexpr, PACKED: tl.constexpr):
    """decay · b_s + Σ_i (weight_i / scale) v_iᵀ k_i, with b_k [C, BK], b_v [C, BV], weight [C].

    Rounding weight · v to 16 bits costs as much accuracy as rounding the output does. With SPLIT the rows
    are added once without a weight, exactly, and once with the small rest, weight / scale - 1. Not for fp16,
    whose range is too small for a state over the scale of a head that decays fast. Rows without a weight, as
    those of other packed sequences, are left out of both: much larger ones would leave their rounding.
    """
    b_s *= decay
    if SPLIT:
        if PACKED:
            b_v = tl.where((weight > 0)[:, None], b_v, 0.0)
        b_s = tl.dot(tl.trans(b_v), b_k, b_s, input_precision="ieee")
        weight = weight / scale - 1.0
    b_vt = (tl.trans(b_v) * weight[None, :]).to(b_k.dtype)  # [BV, C]
    return tl.dot(b_vt, b_k, b_s, input_precision="ieee")


@triton.jit
def program_indices(P, H, num_value_blocks: tl.constexpr):
    """Sequence, segment (in the order of the walk), head and value block of this program."""
    i_v = tl.program_id(0) % num_value_blocks
    i_h = tl.program_id(0) // num_value_blocks % H
    i_segment = tl.program_id(0) // num_value_blocks // H
    return i_segment // P, i_segment % P, i_h, i_v


@triton.jit
def sequence_rows(cu_seqlens, i_seq, N):
    """Batch index of a sequence, its first row there and its number of rows, kept inside the tensor."""
    i_b = i_seq
    begin = i_seq * 0
    length = begin + N
    if cu_seqlens is not None:
        i_b = begin
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_seq), 0), N)
        length = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_seq + 1), begin), N) - begin
    return i_b, begin, length


@triton.jit
def segment_chunks(i_p, length, P, C: tl.constexpr):
    """First chunk of a segment and the one after its last; the two are equal for an empty segment."""
    num_chunks = tl.cdiv(length, C)
    per_segment = tl.cdiv(num_chunks, P)
    first = tl.minimum(i_p * per_segment, num_chunks)
    return first, tl.minimum(first + per_segment, num_chunks)


@triton.jit
def chunk_weights(starts, log2_decay, row, num_rows, o_c):
    """Of a chunk of num_rows rows from `row` on: (start, through, to_end, decay).

    start: where each row's packed sequence begins, counted from `row` (nothing without `starts`). through: a
    row's weight of the state before the chunk; to_end: its weight in the state after the chunk; decay: that
    of one state in the other. Each is 0 where a sequence begins in between.
    """
    start = o_c
    through = decay_powers(log2_decay, o_c + 1)
    to_end = decay_powers(log2_decay, num_rows - 1 - o_c)
    decay = tl.exp2(log2_decay * num_rows)
    if starts is not None:
        start = tl.load(starts + row + o_c) - row
        start_last = tl.load(starts + row + num_rows - 1) - row
        through = tl.where(start < 0, through, 0.0)
        to_end = tl.where(o_c >= start_last, to_end, 0.0)
        decay = tl.where(start_last < 0, decay, 0.0)
    return start, through, to_end, decay


@triton.jit
def describe_rows(x, strides, i_b, i_h, begin, length, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Descriptor of one head's rows [begin, begin + length), moved in (C, BLOCK) tiles."""
    stride_b, stride_n, stride_h = strides
    stride_b = (stride_b.to(tl.int64) - 3 >> 1) * 8
    stride_n = (stride_n.to(tl.int64) - 3 >> 1) * 8
    stride_h = (stride_h.to(tl.int64) - 3 >> 1) * 8
    shape = [tl.maximum(length, 1), D]  # an empty sequence is never moved, but its descriptor must be valid
    x += i_b * stride_b + begin * stride_n + i_h * stride_h
    return tl.make_tensor_descriptor(x, shape, [stride_n, 1], [C, BLOCK])


@triton.jit
def state_tile(
    i_v, Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Offsets and mask of a (BV, BK) tile of a state that is stored (Dk, Dv), or (Dv, Dk) if TRANSPOSED."""
    o_k = tl.arange(0, BK)[None, :]
    o_v = i_v * BV + tl.arange(0, BV)[:, None]
    offsets = o_v * Dk + o_k if TRANSPOSED else o_k * Dv + o_v
    return offsets, (o_k < Dk) & (o_v < Dv)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def walk_kernel(
    q, k, v, o, slopes, initial_state, final_state, segment_states, cu_seqlens, starts,
    q_strides, k_strides, v_strides, o_strides, N, P, H,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SPLIT: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """o_t = q_t S_t with S_t = λ S_{t-1} + k_tᵀ v_t over one segment; REVERSE walks from the last row on.

    In reverse o_t = Σ_{u >= t} λ^(u-t) (q_t·k_u) v_u + λ^(n-1-t) q_t·initial, for a segment of n rows, and
    final = λ^n initial + Σ λ^(u+1) k_uᵀ v_u. Grid: S·P·H·cdiv(Dv, BV), value blocks innermost.
    """
    i_seq, i_p, i_h, i_v = program_indices(P, H, tl.cdiv(Dv, BV))
    i_b, begin, length = sequence_rows(cu_seqlens, i_seq, N)
    first, last = segment_chunks(P - 1 - i_p if REVERSE else i_p, length, P, C)

    d_q = describe_rows(q, q_strides, i_b, i_h, begin, length, Dk, C, BK)
    d_k = describe_rows(k, k_strides, i_b, i_h, begin, length, Dk, C, BK)
    d_v = describe_rows(v, v_strides, i_b, i_h, begin, length, Dv, C, BV)
    d_o = describe_rows(o, o_strides, i_b, i_h, begin, length, Dv, C, BV)

    offsets, mask = state_tile(i_v, Dk, Dv, BK, BV, TRANSPOSED)
    whole = (i_seq * H + i_h).to(tl.int64) * (Dk * Dv) + offsets
    before = ((i_seq * (P - 1) + i_p - 1) * H + i_h).to(tl.int64) * (Dk * Dv) + offsets
    b_s = tl.zeros([BV, BK], dtype=tl.float32)
    if i_p > 0:
        b_s = tl.load(segment_states + before, mask, other=0.0)
    elif initial_state is not None:
        b_s = tl.load(initial_state + whole, mask, other=0.0)

    log2_decay = -tl.load(slopes + i_h) * LOG2_E
    scale = state_scale(log2_decay, C, SPLIT, REVERSE)
    b_s /= scale
    o_c = tl.arange(0, C)
    distance = o_c[None, :] - o_c[:, None]  # [C of k, C of q]
    b_decay = decay_powers(log2_decay, -distance if REVERSE else distance)
    for i in range(first, last):
        row = (first + last - 1 - i if REVERSE else i) * C
        num_rows = tl.minimum(length - row, C)
        start, through, to_end, decay = chunk_weights(starts, log2_decay, row, num_rows, o_c)
        b_weight = b_decay
        if starts is not None:
            if REVERSE:
                b_weight = tl.where(o_c[None, :] >= start[:, None], b_decay, 0.0)
            else:
                b_weight = tl.where(o_c[:, None] >= start[None, :], b_decay, 0.0)
        b_q = d_q.load([row, 0])  # [C, BK]
        b_k = d_k.load([row, 0])  # [C, BK]
        b_v = d_v.load([row, i_v * BV])  # [C, BV]
        b_p = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * b_weight  # [C of k, C of q]
        b_o = tl.dot(b_s.to(b_q.dtype), tl.trans(b_q), input_precision="ieee")  # [BV, C]
        b_o *= (to_end if REVERSE else through)[None, :] * scale
        b_o = tl.dot(tl.trans(b_v), b_p.to(b_v.dtype), b_o, input_precision="ieee")
        d_o.store([row, i_v * BV], tl.trans(b_o).to(b_q.dtype))
        weight = through if REVERSE else to_end
        b_s = add_rows(b_s, b_k, b_v, decay, weight, scale, SPLIT, starts is not None)
    if final_state is not None and i_p == P - 1:
        tl.store(final_state + whole, b_s * scale, mask)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def dk_dv_kernel(
    q, k, v, do, dk, dv, slopes, grad_final, grad_initial, segment_grads, cu_seqlens, starts,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides, N, P, H,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """dk and dv in one reverse walk: walk_kernel's passes for both, with one state for the two.

    The state is the gradient of S after the chunk, transposed. BV covers Dv. Grid: S·P·H.
    """
    i_seq, i_p, i_h, _ = program_indices(P, H, 1)
    i_b, begin, length = sequence_rows(cu_seqlens, i_seq, N)
    first, last = segment_chunks(P - 1 - i_p, length, P, C)
    d_q = describe_rows(q, q_strides, i_b, i_h, begin, length, Dk, C, BK)
    d_k = describe_rows(k, k_strides, i_b, i_h, begin, length, Dk, C, BK)
    d_v = describe_rows(v, v_strides, i_b, i_h, begin, length, Dv, C, BV)
    d_do = describe_rows(do, do_strides, i_b, i_h, begin, length, Dv, C, BV)
    d_dk = describe_rows(dk, dk_strides, i_b, i_h, begin, length, Dk, C, BK)
    d_dv = describe_rows(dv, dv_strides, i_b, i_h, begin, length, Dv, C, BV)

    offsets, mask = state_tile(0, Dk, Dv, BK, BV, False)
    whole = (i_seq * H + i_h).to(tl.int64) * (Dk * Dv) + offsets
    before = ((i_seq * (P - 1) + i_p - 1) * H + i_h).to(tl.int64) * (Dk * Dv) + offsets
    b_ds = tl.zeros([BV, BK], dtype=tl.float32)
    if i_p > 0:
        b_ds = tl.load(segment_grads + before, mask, other=0.0)
    elif grad_final is not None:
        b_ds = tl.load(grad_final + whole, mask, other=0.0)

    log2_decay = -tl.load(slopes + i_h) * LOG2_E
    scale = state_scale(log2_decay, C, SPLIT, True)
    b_ds /= scale
    o_c = tl.arange(0, C)
    b_decay = decay_powers(log2_decay, o_c[:, None] - o_c[None, :])  # [C of q, C of k]
    for i in range(first, last):
        row = (first + last - 1 - i) * C
        num_rows = tl.minimum(length - row, C)
        start, through, to_end, decay = chunk_weights(starts, log2_decay, row, num_rows, o_c)
        b_weight = b_decay
        if starts is not None:
            b_weight = tl.where(o_c[None, :] >= start[:, None], b_decay, 0.0)
        b_k = d_k.load([row, 0])  # [C, BK]
        b_q = d_q.load([row, 0])  # [C, BK]
        b_v = d_v.load([row, 0])  # [C, BV]
        b_do = d_do.load([row, 0])  # [C, BV]
        b_dst = b_ds.to(b_k.dtype)  # [BV, BK]
        b_p = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * b_weight  # [C of q, C of k]
        b_dv = tl.dot(b_dst, tl.trans(b_k), input_precision="ieee") * (to_end[None, :] * scale)  # [BV, C]
        b_dv = tl.dot(tl.trans(b_do), b_p.to(b_do.dtype), b_dv, input_precision="ieee")
        d_dv.store([row, 0], tl.trans(b_dv).to(b_v.dtype))
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee") * b_weight  # [C of q, C of k]
        b_dk = tl.dot(tl.trans(b_dst), tl.trans(b_v), input_precision="ieee") * (
            to_end[None, :] * scale
        )  # [BK, C]
        b_dk = tl.dot(tl.trans(b_q), b_dp.to(b_q.dtype), b_dk, input_precision="ieee")
        d_dk.store([row, 0], tl.trans(b_dk).to(b_k.dtype))
        b_ds = add_rows(b_ds, b_q, b_do, decay, through, scale, SPLIT, starts is not None)
    if grad_initial is not None and i_p == P - 1:
        tl.store(grad_initial + whole, b_ds * scale, mask)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def segment_state_kernel(
    k, v, parts, slopes, cu_seqlens, starts, ends, k_strides, v_strides, N, P, T, H,
    Dk: tl.constexpr, Dv: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SPLIT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What each segment but the last of the walk adds to the state, in T parts: (S, P - 1, T, H, Dk, Dv).

    Chunks out of range (rows_in_range) are not read, nor those of other sequences than the one at the
    segment's end (in reverse the one that comes from before it; its last row + 1 is in `ends`). The others
    are shared out evenly, so that heads that reach far back take no longer.
    """
    i_seq, i_part, i_h, i_v = program_indices((P - 1) * T, H, tl.cdiv(Dv, BV))
    i_p = i_part // T
    i_b, begin, length = sequence_rows(cu_seqlens, i_seq, N)
    first, last = segment_chunks(P - 1 - i_p if REVERSE else i_p, length, P, C)
    d_k = describe_rows(k, k_strides, i_b, i_h, begin, length, Dk, C, BK)
    d_v = describe_rows(v, v_strides, i_b, i_h, begin, length, Dv, C, BV)

    log2_decay = -tl.load(slopes + i_h) * LOG2_E
    scale = state_scale(log2_decay, C, SPLIT, REVERSE)
    o_c = tl.arange(0, C)
    b_s = tl.zeros([BV, BK], dtype=tl.float32)
    chunks_in_range = tl.cdiv(rows_in_range(log2_decay), C) + 1  # the last one may be short
    from_chunk = tl.maximum(first, last - chunks_in_range)
    end = tl.minimum(last * C, length)
    if starts is not None:
        if REVERSE:
            last_row = tl.load(ends + tl.maximum(first * C, 1) - 1) - 1
            from_chunk = tl.maximum(from_chunk, first + last - 1 - last_row // C)
        else:
            first_row = tl.load(starts + tl.maximum(end, 1) - 1)
            ends_here = tl.load(ends + tl.maximum(end, 1) - 1) <= end
            from_chunk = tl.maximum(from_chunk, tl.where(ends_here, last, first_row // C))
    per_part = tl.cdiv(last - from_chunk, T)
    from_chunk = tl.minimum(from_chunk + i_part % T * per_part, last)
    to_chunk = tl.minimum(from_chunk + per_part, last)
    for i in range(from_chunk, to_chunk):
        row = (first + last - 1 - i if REVERSE else i) * C
        num_rows = tl.minimum(length - row, C)
        _, through, to_end, decay = chunk_weights(starts, log2_decay, row, num_rows, o_c)
        b_k = d_k.load([row, 0])  # [C, BK]
        b_v = d_v.load([row, i_v * BV])  # [C, BV]
        weight = through if REVERSE else to_end
        b_s = add_rows(b_s, b_k, b_v, decay, weight, scale, SPLIT, starts is not None)
    rows_after = tl.maximum((last - to_chunk) * C if REVERSE else end - to_chunk * C, 0)
    b_s *= scale * tl.exp2(log2_decay * rows_after)
    offsets, mask = state_tile(i_v, Dk, Dv, BK, BV, False)
    i_state = (i_seq * (P - 1) * T + i_part) * H + i_h
    tl.store(parts + i_state.to(tl.int64) * (Dk * Dv) + offsets, b_s, mask)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def scan_states_kernel(
    parts, states, initial_state, slopes, cu_seqlens, starts, N, P, T, H,
    SIZE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, MAX_PARTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Sums what each segment adds, in T parts, to the state after it. Grid: (S·H, cdiv(SIZE, BLOCK))."""
    i_seq, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    _, _, length = sequence_rows(cu_seqlens, i_seq, N)
    log2_decay = -tl.load(slopes + i_h) * LOG2_E
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < SIZE
    o_t = tl.arange(0, MAX_PARTS)[:, None]
    part_offsets = o_t * (H * SIZE) + offsets[None, :]
    b_s = tl.zeros([BLOCK], dtype=tl.float32)
    if initial_state is not None:
        b_s = tl.load(initial_state + tl.program_id(0).to(tl.int64) * SIZE + offsets, mask)
    for i_p in range(0, P - 1):
        first, last = segment_chunks(P - 1 - i_p if REVERSE else i_p, length, P, C)
        begin, end = tl.minimum(first * C, length), tl.minimum(last * C, length)
        decay = tl.exp2(log2_decay * (end - begin))
        if starts is not None:
            decay = tl.where(tl.load(starts + tl.maximum(end, 1) - 1) < begin, decay, 0.0)
        i_segment = (i_seq * (P - 1) + i_p).to(tl.int64)
        p_parts = parts + (i_segment * T * H + i_h) * SIZE + part_offsets
        b_parts = tl.load(p_parts, (o_t < T) & mask[None, :], other=0.0)  # [MAX_PARTS, BLOCK]
        b_s = b_s * decay + tl.sum(b_parts, axis=0)
        tl.store(states + (i_segment * H + i_h) * SIZE + offsets, b_s, mask)


@triton.jit(do_not_specialize=["S", "N"])
def sequence_bounds_kernel(cu_seqlens, starts, ends, S, N, BLOCK: tl.constexpr):
    """First row of each row's sequence and the one after its last, by bisection. Grid: (cdiv(N, BLOCK),)."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], dtype=tl.int32)  # the first of the S + 1 bounds after the row lies from here …
    high = low + S  # … to here
    width = S
    while width > 0:
        middle = (low + high) // 2
        is_after = tl.load(cu_seqlens + middle) > o_n
        high = tl.where(is_after, middle, high)
        low = tl.where(is_after, low, tl.minimum(middle + 1, high))
        width = width // 2
    start = tl.load(cu_seqlens + tl.maximum(low, 1) - 1)
    tl.store(starts + o_n, tl.minimum(tl.maximum(start, 0), o_n))
    tl.store(ends + o_n, tl.minimum(tl.maximum(tl.load(cu_seqlens + low), o_n + 1), N))


@triton.jit(do_not_specialize=["H"])
def step_kernel(
    q, k, v, o, slopes, state, new_state, H,
    Dk: tl.constexpr, Dv: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token: new_state = λ state + kᵀ v, o = q new_state; all contiguous. Grid: (B·H, cdiv(Dv, BV))."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k, m_v = o_k < Dk, o_v < Dv
    b_q = tl.load(q + i_bh * Dk + o_k, m_k, other=0.0).to(tl.float32)
    b_k = tl.load(k + i_bh * Dk + o_k, m_k, other=0.0).to(tl.float32)
    b_v = tl.load(v + i_bh * Dv + o_v, m_v, other=0.0).to(tl.float32)
    offsets = i_bh * (Dk * Dv) + o_k[:, None] * Dv + o_v[None, :]
    mask = m_k[:, None] & m_v[None, :]
    b_s = tl.load(state + offsets, mask, other=0.0) * tl.exp(-tl.load(slopes + i_bh % H))
    b_s += b_k[:, None] * b_v[None, :]
    tl.store(new_state + offsets, b_s, mask)
    tl.store(o + i_bh * Dv + o_v, tl.sum(b_q[:, None] * b_s, axis=0).to(o.dtype.element_ty), m_v)


def aligned_rows(x: Tensor) -> Tensor:
    """x itself where a descriptor can address its rows (16-byte steps), a contiguous copy otherwise."""
    addressable = x.stride(3) == 1 and x.stride(1) > 0 and all(stride % 8 == 0 for stride in x.stride()[:3])
    return x if addressable and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def contiguous_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def packed_strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Of each tensor the strides of batch, row and head: 8 n elements are passed as 2 n + 3.

    Triton compiles anew for integers in a tuple that are 1 or multiples of 16. These are neither, and n makes
    it known to the compiler that rows are aligned.
    """
    return [tuple(stride // 8 * 2 + 3 for stride in x.stride()[:3]) for x in tensors]


def allocate_descriptors(size: int, alignment: int, stream: int | None) -> Tensor:
    """Global memory for the descriptors that kernels build on the device."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def sequence_bounds(cu_seqlens: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """First row of each row's sequence and the one after its last, (N up to a multiple of BOUNDS_BLOCK,)."""
    num_blocks = triton.cdiv(num_rows, BOUNDS_BLOCK)
    starts, ends = cu_seqlens.new_empty(2, num_blocks * BOUNDS_BLOCK)
    sequence_bounds_kernel[(num_blocks,)](
        cu_seqlens, starts, ends, len(cu_seqlens) - 1, num_rows, BLOCK=BOUNDS_BLOCK
    )
    return starts, ends


class _Call:
    """The launches of one call, with what they share: slopes, sequences, segments and block sizes."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        slopes: Tensor,
        cu_seqlens: Tensor | None,
        segment_states: Tensor,
        has_states: bool,
    ):
        self.num_sequences, self.P = segment_states.shape[0], segment_states.shape[1] + 1
        self.slopes, self.cu_seqlens = slopes.contiguous(), contiguous_or_none(cu_seqlens)
        self.N, self.H = q.shape[1:3]
        self.starts = self.ends = None
        if cu_seqlens is not None and self.num_sequences == 1 and not has_states:
            self.starts, self.ends = sequence_bounds(cu_seqlens.contiguous(), self.N)
            self.cu_seqlens = None
        self.launch = choose_launch(q.dtype, max(q.shape[3], v.shape[3]), q.device)
        self.hopper = None
        if self.launch.gluon:
            from kernels import hopper_lightning  # only here: the module needs a Triton with Gluon

            if self.launch.chunk == hopper_lightning.CHUNK and hopper_lightning.supports(q, v):
                self.hopper = hopper_lightning
        triton.set_allocator(allocate_descriptors)  # each thread has its own, so autograd's needs it too

    def _blocks(self, k: Tensor, v: Tensor, value_block: int, warps: Warps) -> dict:
        """Compile-time arguments of a kernel over keys k and values v, and its warps and stages."""
        return {
            "Dk": k.shape[3],
            "Dv": v.shape[3],
            "C": self.launch.chunk,
            "BK": padded(k.shape[3]),
            "BV": min(value_block, padded(v.shape[3])),
            "SPLIT": self.launch.split_weights,
            "num_warps": warps.num_warps,
            "num_stages": warps.num_stages,
        }

    def _grid(self, num_segments: int, blocks: dict) -> tuple[int]:
        return (self.num_sequences * num_segments * self.H * triton.cdiv(blocks["Dv"], blocks["BV"]),)

    def walk(self, q, k, v, o, initial_state, final_state, segment_states, reverse=False, transposed=False):
        """Writes o and, unless None, the final state."""
        if self.hopper and not reverse:
            self.hopper.walk(
                q,
                k,
                v,
                o,
                self.slopes,
                initial_state,
                final_state,
                segment_states,
                self.cu_seqlens,
                self.starts,
                transposed,
            )
            return
        blocks = self._blocks(k, v, self.launch.value_block, self.launch.walk)
        walk_kernel[self._grid(self.P, blocks)](
            q, k, v, o, self.slopes, initial_state, final_state, segment_states, self.cu_seqlens, self.starts,
            *packed_strides(q, k, v, o), self.N, self.P, self.H,
            REVERSE=reverse, TRANSPOSED=transposed, **blocks,
        )  # fmt: skip

    def dk_dv(self, q, k, v, do, dk, dv, grad_final, dinitial, segment_grads):
        """Writes dk, dv and, unless None, dinitial."""
        if self.hopper:
            states = grad_final, dinitial, segment_grads
            self.hopper.dk_dv(q, k, v, do, dk, dv, self.slopes, *states, self.cu_seqlens, self.starts)
            return
        if self.launch.dk_dv is None:
            self.walk(v, do, q, dk, grad_final, None, segment_grads, reverse=True, transposed=True)
            self.walk(k, q, do, dv, grad_final, dinitial, segment_grads, reverse=True)
            return
        blocks = self._blocks(k, v, padded(v.shape[3]), self.launch.dk_dv)
        dk_dv_kernel[self._grid(self.P, blocks)](
            q, k, v, do, dk, dv, self.slopes, grad_final, dinitial, segment_grads,
            self.cu_seqlens, self.starts,
            *packed_strides(q, k, v, do, dk, dv),
            self.N, self.P, self.H, **blocks,
        )  # fmt: skip

    def fill_segment_states(self, k, v, initial_state, segment_states, reverse=False):
        """Writes the state after each segment but the last of the walk."""
        if self.P == 1:
            return
        block, warps = self.launch.value_block, self.launch.walk
        if self.launch.states:
            block, warps = STATE_BLOCK, self.launch.states
        blocks = self._blocks(k, v, block, warps)
        T = num_parts(self.num_sequences * self.P, k.shape[0] * self.N)
        parts = segment_states
        if T > 1:
            shape = self.num_sequences, self.P - 1, T, self.H, blocks["Dk"], blocks["Dv"]
            parts = segment_states.new_empty(shape)
        segment_state_kernel[self._grid((self.P - 1) * T, blocks)](
            k, v, parts, self.slopes, self.cu_seqlens, self.starts, self.ends,
            *packed_strides(k, v), self.N, self.P, T, self.H,
            REVERSE=reverse, **blocks,
        )  # fmt: skip
        size, block = blocks["Dk"] * blocks["Dv"], 512
        scan_states_kernel[(self.num_sequences * self.H, triton.cdiv(size, block))](
            parts, segment_states, initial_state, self.slopes, self.cu_seqlens, self.starts,
            self.N, self.P, T, self.H,
            SIZE=size, C=self.launch.chunk, BLOCK=block, MAX_PARTS=MAX_PARTS, REVERSE=reverse,
        )  # fmt: skip


def forward(q, k, v, slopes, initial_state, cu_seqlens, o, final_state, segment_states) -> None:
    """Writes o, final_state (unless None) and segment_states, the state after each segment but the last."""
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    initial_state = contiguous_or_none(initial_state)
    has_states = initial_state is not None or final_state is not None
    call = _Call(q, v, slopes, cu_seqlens, segment_states, has_states)
    call.fill_segment_states(k, v, initial_state, segment_states)
    call.walk(q, k, v, o, initial_state, final_state, segment_states)


def backward(
    q, k, v, slopes, initial_state, cu_seqlens, segment_states, grad_o, grad_final, dq, dk, dv, dinitial
) -> None:
    """Writes dq, dk, dv and, unless None, dinitial."""
    q, k, v, do = aligned_rows(q), aligned_rows(k), aligned_rows(v), aligned_rows(grad_o)
    initial_state, grad_final = contiguous_or_none(initial_state), contiguous_or_none(grad_final)
    has_states = initial_state is not None or grad_final is not None
    call = _Call(q, v, slopes, cu_seqlens, segment_states, has_states)
    segment_grads = torch.empty_like(segment_states)
    call.fill_segment_states(q, do, grad_final, segment_grads, reverse=True)
    call.walk(do, v, k, dq, initial_state, None, segment_states, transposed=True)
    call.dk_dv(q, k, v, do, dk, dv, grad_final, dinitial, segment_grads)


def step(q, k, v, slopes, state) -> tuple[Tensor, Tensor]:
    """o and the state after one token; q, k (B, H, Dk), v (B, H, Dv), state (B, H, Dk, Dv)."""
    q, k, v, slopes, state = (x.contiguous() for x in (q, k, v, slopes, state))
    o, new_state = torch.empty_like(v), torch.empty_like(state)
    B, H, Dk, Dv = state.shape
    BK = padded(Dk)
    BV = min(padded(Dv), 4096 // BK)  # 4,096 elements of state keep a program's loads in flight
    step_kernel[(B * H, triton.cdiv(Dv, BV))](
        q, k, v, o, slopes, state, new_state, H, Dk=Dk, Dv=Dv, BK=BK, BV=BV, num_warps=4
    )
    return o, new_state
