"""The walks of kernels/triton_lightning.py for Hopper, 16-bit inputs and head dims of 128, written in Gluon.

What plain Triton leaves to the compiler is said here: one warp of a program moves rows into a ring in shared
memory (TMA), two groups of four warps compute, and the three meet at barriers in shared memory. There are no
more programs than multiprocessors. Each takes (sequence, segment, head) tasks in turn, so that the loads of
the next one start while the last is being computed.

Rows past a sequence's end are cut off by the copy engine, in packed documents too: see describe_rows. Names,
shapes and the scheme of a walk are those of kernels/triton_lightning.py; derivation in docs/kernels.md.

Barriers (make_barriers), used in turn: the n-th chunk takes number n % count, in phase n // count & 1. The
wait for an empty stage is for the phase before, which on the first lap has passed.

    barrier     count    who arrives                                     who waits
    full        STAGES   the moving warp's copies, with their last byte  both groups, for the rows
    empty       STAGES   both groups, done with the rows                 the moving warp, before it refills
    exchanged   2        both groups, each with its half written         both groups, for the other's half
"""

import functools

import torch
from torch import Tensor
from triton import cdiv
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

CHUNK = 64
HEAD_DIM = 128
MAX_ROWS = gl.constexpr(2**30)
LOG2_E = gl.constexpr(1.4426950408889634)
# Slopes from here on forget a chunk so fast that rounding its weights no longer shows in the output.
SPLIT_BELOW = gl.constexpr(1 / 16)
RUNTIME_SIZES = ["N", "P", "H", "num_tasks"]

thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6, 3.7


@gluon.jit
def decay_powers(log2_decay, distance):
    """λ^distance, 0 where distance is negative."""
    return gl.where(distance >= 0, gl.exp2(log2_decay * gl.maximum(distance, 0).to(gl.float32)), 0.0)


@gluon.jit
def state_scale(log2_decay, layout: gl.constexpr, C: gl.constexpr):
    """The mean of λ^0 to λ^(C-1): what SPLIT divides the state in registers by, see start_adding_rows."""
    return gl.sum(decay_powers(log2_decay, gl.arange(0, C, layout)), axis=0) / C


@gluon.jit
def task_rows(task, cu_seqlens, N, P, H, num_tasks, C: gl.constexpr, REVERSE: gl.constexpr):
    """A task's sequence, segment of the walk, head, first row, number of rows, first and last + 1 chunk.

    Slow heads take longer (SPLIT_BELOW). Where a program would get the same head again and again, it gets
    heads from both ends in turn. In reverse the last tasks come first: dq has just read their last rows.
    """
    flipped = task // gl.num_programs(0) % 2 == 1 and gl.num_programs(0) % H == 0
    if REVERSE:
        task = num_tasks - 1 - task
    i_h = task % H
    if flipped:
        i_h = H - 1 - i_h
    i_p = task // H % P
    i_seq = task // H // P
    begin = i_seq * N
    length = N
    if cu_seqlens is not None:
        begin = gl.minimum(gl.maximum(gl.load(cu_seqlens + i_seq).to(gl.int32), 0), N)
        length = gl.minimum(gl.maximum(gl.load(cu_seqlens + i_seq + 1).to(gl.int32), begin), N) - begin
    num_chunks = gl.cdiv(length, C)
    per_segment = gl.cdiv(num_chunks, P)
    first = gl.minimum((P - 1 - i_p if REVERSE else i_p) * per_segment, num_chunks)
    return i_seq, i_p, i_h, begin, length, first, gl.minimum(first + per_segment, num_chunks)


@gluon.jit
def row_starts(starts, row, o_c):
    """Where the sequences of rows o_c of the chunk at `row` begin, counted from it."""
    return gl.load(starts + row + o_c) - row


@gluon.jit
def coordinates(begin, length, row, column):
    """Where a tile starts in a descriptor of describe_rows that is to end `length` rows after `begin`."""
    return [MAX_ROWS, begin + length, MAX_ROWS - length + row, column]


@gluon.jit
def make_barriers(STAGES: gl.constexpr):
    """full, empty (one for each stage of the ring) and exchanged (one for each of two buffers)."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    exchanged = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(exchanged.index(i), count=2)
    fence_async_shared()
    thread_barrier()
    return full, empty, exchanged


@gluon.jit
def signal(barrier):
    thread_barrier()
    mbarrier.arrive(barrier)


@gluon.jit
def publish(s_x, x):
    """Writes a tile to shared memory for the matrix and copy units; the next barrier makes it visible."""
    s_x.store(x)
    fence_async_shared()


@gluon.jit
def store_rows(d_out, where, s_out, value):
    """Writes a tile through shared memory; the copy out goes on while the caller does."""
    tma.store_wait(0)
    thread_barrier()
    publish(s_out, value)
    thread_barrier()
    tma.async_copy_shared_to_global(d_out, where, s_out)


@gluon.jit
def start_product(a, b, M: gl.constexpr, N: gl.constexpr, layout: gl.constexpr):
    return warpgroup_mma(a, b, gl.zeros([M, N], gl.float32, layout), use_acc=False, is_async=True)


@gluon.jit
def start_adding_rows(state, a, b, decay, weight, scale, kept, layout: gl.constexpr, SPLIT: gl.constexpr):
    """decay · state + Σ_i (weight_i / scale) a_iᵀ b_i; a [C, rows of the state], b [C, its columns], shared.

    SPLIT as in add_rows of kernels/triton_lightning.py, where `kept` is 1. A chunk with rows of other packed
    sequences has 0: their sum, which may be much larger, is dropped again, with the state, whose decay is 0
    there, and the rows are added with their whole weight.
    """
    at = a.permute((1, 0))
    state *= decay
    if SPLIT:
        state = warpgroup_mma(at, b, state, is_async=True)
        weight = weight / scale - kept
    weighted = (at.load(layout).to(gl.float32) * weight[None, :]).to(a.dtype)
    return warpgroup_mma(weighted, b, state, use_acc=kept > 0 if SPLIT else True, is_async=True)


@gluon.jit
def load_rows(
    descriptors, rings, barriers, cu_seqlens, N, P, H, num_tasks,
    STAGES: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """The moving warp: fills the ring with the chunks of this program's tasks, in the order they are used."""
    C: gl.constexpr = rings[0].shape[1]
    D: gl.constexpr = rings[0].shape[2]
    full, empty = barriers[0], barriers[1]
    n = 0
    for task in range(gl.program_id(0), num_tasks, gl.num_programs(0)):
        _, _, i_h, begin, length, first, last = task_rows(task, cu_seqlens, N, P, H, num_tasks, C, REVERSE)
        for i in range(first, last):
            row = (first + last - 1 - i if REVERSE else i) * C
            stage = n % STAGES
            mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), len(rings) * C * D * 2)
            where = coordinates(begin, length, row, i_h * D)
            for x in gl.static_range(len(rings)):
                tma.async_copy_global_to_shared(
                    descriptors[x], where, full.index(stage), rings[x].index(stage)
                )
            n += 1


@gluon.jit
def run_tasks(
    chunks: gl.constexpr, offsets, tiles, barriers, slopes, first_state, last_state, segment_states,
    cu_seqlens, starts, N, P, H, num_tasks, C: gl.constexpr, D: gl.constexpr, layout: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """A computing group's tasks: `chunks`, on the part of the state (D / 2, D) that lies at `offsets`.

    Each starts from first_state (None: zero) or the state before its segment; a last one writes last_state.
    """
    n = 0
    for task in range(gl.program_id(0), num_tasks, gl.num_programs(0)):
        i_seq, i_p, i_h, begin, length, first, last = task_rows(
            task, cu_seqlens, N, P, H, num_tasks, C, REVERSE
        )
        whole = (i_seq * H + i_h).to(gl.int64) * (D * D) + offsets
        state = gl.zeros([D // 2, D], gl.float32, layout)
        if i_p > 0:
            before = ((i_seq * (P - 1) + i_p - 1) * H + i_h).to(gl.int64) * (D * D)
            state = gl.load(segment_states + before + offsets)
        elif first_state is not None:
            state = gl.load(first_state + whole)
        slope = gl.load(slopes + i_h)
        log2_decay = -slope * LOG2_E
        if slope < SPLIT_BELOW:
            scale = state_scale(log2_decay, gl.SliceLayout(0, layout), C)
            state, n = chunks(
                state / scale, n, tiles, barriers, starts, log2_decay, scale, i_h, begin, length, first, last,
                STAGES, GROUP, True,
            )  # fmt: skip
            state *= scale
        else:
            state, n = chunks(
                state, n, tiles, barriers, starts, log2_decay, 1.0, i_h, begin, length, first, last,
                STAGES, GROUP, False,
            )  # fmt: skip
        if last_state is not None and i_p == P - 1:
            gl.store(last_state + whole, state)
    tma.store_wait(0)


@gluon.jit
def walk_chunks(
    state, n, tiles, barriers, starts, log2_decay, scale, i_h, begin, length, first, last,
    STAGES: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """One task of walk_columns, chunk by chunk; n counts the chunks of all tasks. Returns state and n."""
    d_o, s_q, s_k, s_v, s_state, s_o, s_p = tiles
    C: gl.constexpr = s_q.shape[1]
    D: gl.constexpr = s_q.shape[2]
    HALF: gl.constexpr = D // 2
    ROWS: gl.constexpr = C // 2  # of k: this group's part of the scores
    dtype: gl.constexpr = s_q.dtype
    p_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_operand: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)

    full, empty, p_ready = barriers
    o_q = gl.arange(0, C, gl.SliceLayout(1, p_layout))
    o_k = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, p_layout))
    b_decay = decay_powers(log2_decay, o_q[:, None] - o_k[None, :])  # [C of q, ROWS of k]
    o_o = gl.arange(0, C, gl.SliceLayout(1, o_layout))
    through = decay_powers(log2_decay, 1 + o_o) * scale
    o_c = gl.arange(0, C, gl.SliceLayout(0, s_operand))
    for i in range(first, last):
        num_rows = gl.minimum(length - i * C, C)
        stage = n % STAGES
        b_weight, b_through = b_decay, through
        if starts is not None:
            b_weight = gl.where(o_k[None, :] >= row_starts(starts, i * C, o_q)[:, None], b_decay, 0.0)
            b_through = gl.where(row_starts(starts, i * C, o_o) < 0, through, 0.0)
            start_last = row_starts(starts, i * C, num_rows - 1)
        q, k, v = s_q.index(stage), s_k.index(stage), s_v.index(stage).slice(GROUP * HALF, HALF, 1)
        mbarrier.wait(full.index(stage), n // STAGES & 1)
        b_p = start_product(q, k.slice(GROUP * ROWS, ROWS, 0).permute((1, 0)), C, ROWS, p_layout)
        publish(s_state, state.to(dtype))
        b_p = (warpgroup_mma_wait(0, deps=(b_p,)) * b_weight).to(dtype)
        publish(s_p.index(n % 2 * 2 + GROUP), b_p)
        signal(p_ready.index(n % 2))
        b_o = start_product(q, s_state.permute((1, 0)), C, HALF, o_layout)
        to_end = decay_powers(log2_decay, num_rows - 1 - o_c)
        decay, kept = gl.exp2(log2_decay * num_rows), 1.0
        if starts is not None:
            to_end = gl.where(o_c >= start_last, to_end, 0.0)
            decay = gl.where(start_last < 0, decay, 0.0)
            kept = gl.where(start_last <= 0, 1.0, 0.0)
        state = start_adding_rows(state, v, k, decay, to_end, scale, kept, s_operand, SPLIT)
        b_o = warpgroup_mma_wait(2 if SPLIT else 1, deps=(b_o,)) * b_through[:, None]
        own, other = v.slice(GROUP * ROWS, ROWS, 0), v.slice((1 - GROUP) * ROWS, ROWS, 0)
        b_o = warpgroup_mma(gl.convert_layout(b_p, p_operand), own, b_o, is_async=True)
        mbarrier.wait(p_ready.index(n % 2), n // 2 & 1)
        b_o = warpgroup_mma(s_p.index(n % 2 * 2 + 1 - GROUP), other, b_o, is_async=True)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        state = warpgroup_mma_wait(0, deps=(state,))
        signal(empty.index(stage))
        store_rows(d_o, coordinates(begin, length, i * C, i_h * D + GROUP * HALF), s_o, b_o.to(dtype))
        n += 1
    return state, n


@gluon.jit
def walk_columns(
    tiles, barriers, slopes, initial_state, final_state, segment_states, cu_seqlens, starts,
    N, P, H, num_tasks, STAGES: gl.constexpr, GROUP: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """A computing group: half of o's columns, with that half of the state, transposed (Dv / 2, Dk).

    Each group computes half of the scores, which the two exchange through shared memory.
    """
    D: gl.constexpr = tiles[1].shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    o_v = GROUP * (D // 2) + gl.arange(0, D // 2, gl.SliceLayout(1, layout))[:, None]
    o_k = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    offsets = o_v * D + o_k if TRANSPOSED else o_k * D + o_v
    run_tasks(
        walk_chunks, offsets, tiles, barriers, slopes, initial_state, final_state, segment_states,
        cu_seqlens, starts, N, P, H, num_tasks, tiles[1].shape[1], D, layout, STAGES, GROUP, False,
    )  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME_SIZES)
def walk_kernel(
    d_q, d_k, d_v, d_o, slopes, initial_state, final_state, segment_states, cu_seqlens, starts,
    N, P, H, num_tasks, TRANSPOSED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """walk_kernel of kernels/triton_lightning.py, forwards."""
    C: gl.constexpr = d_q.block_type.shape[2]
    D: gl.constexpr = d_q.block_type.shape[3]
    dtype: gl.constexpr = d_q.dtype
    whole: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, D], dtype)
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, D // 2], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C // 2], dtype)
    s_q = gl.allocate_shared_memory(dtype, [STAGES, C, D], whole)
    s_k = gl.allocate_shared_memory(dtype, [STAGES, C, D], whole)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, C, D], whole)
    s_state = gl.allocate_shared_memory(dtype, [2, D // 2, D], whole)
    s_o = gl.allocate_shared_memory(dtype, [2, C, D // 2], half)
    s_p = gl.allocate_shared_memory(dtype, [4, C, C // 2], narrow)
    barriers = make_barriers(STAGES)
    gl.warp_specialize(
        [
            (walk_columns, (
                (d_o, s_q, s_k, s_v, s_state.index(0), s_o.index(0), s_p), barriers,
                slopes, initial_state, final_state, segment_states, cu_seqlens, starts, N, P, H, num_tasks,
                STAGES, 0, TRANSPOSED,
            )),
            (walk_columns, (
                (d_o, s_q, s_k, s_v, s_state.index(1), s_o.index(1), s_p), barriers,
                slopes, initial_state, final_state, segment_states, cu_seqlens, starts, N, P, H, num_tasks,
                STAGES, 1, TRANSPOSED,
            )),
            (load_rows, (
                (d_q, d_k, d_v), (s_q, s_k, s_v), barriers, cu_seqlens, N, P, H, num_tasks, STAGES, False,
            )),
        ],
        [4, 1], [240, 24],  # warps, and registers a thread, of the second group and of the moving warp
    )  # fmt: skip


@gluon.jit
def gradient_chunks(
    e, n, tiles, barriers, starts, log2_decay, scale, i_h, begin, length, first, last,
    STAGES: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """One task of gradient_rows, chunk by chunk; n counts the chunks of all tasks. Returns e and n."""
    d_out, s_x, s_y, s_z, s_q, s_do, s_e, s_out = tiles
    C: gl.constexpr = s_q.shape[1]
    D: gl.constexpr = s_q.shape[2]
    HALF: gl.constexpr = D // 2
    OFFSET: gl.constexpr = GROUP * HALF
    dtype: gl.constexpr = s_q.dtype
    p_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)

    full, empty, e_ready = barriers
    o_x = gl.arange(0, C, gl.SliceLayout(1, p_layout))
    o_y = gl.arange(0, C, gl.SliceLayout(0, p_layout))
    o_out = gl.arange(0, C, gl.SliceLayout(1, layout))
    b_decay = decay_powers(log2_decay, o_y[None, :] - o_x[:, None])  # [C of x, C of y]
    o_t = gl.arange(0, C, gl.SliceLayout(0, operand))
    through = decay_powers(log2_decay, 1 + o_t)
    for i in range(first, last):
        row = (first + last - 1 - i) * C
        num_rows = gl.minimum(length - row, C)
        if starts is not None:
            begins = row_starts(starts, row, o_y)
            start_last = row_starts(starts, row, num_rows - 1)
        stage = n % STAGES
        x, y, z = s_x.index(stage), s_y.index(stage), s_z.index(stage)
        copy, ready = s_e.index(n % 2), e_ready.index(n % 2)
        publish(copy.slice(OFFSET, HALF, 0), e.to(dtype))
        signal(ready)
        mbarrier.wait(full.index(stage), n // STAGES & 1)
        b_p = start_product(x, y.permute((1, 0)), C, C, p_layout)
        mbarrier.wait(ready, n // 2 & 1)
        b_out = start_product(x, copy.permute((1, 0)) if GROUP else copy, C, D, layout)
        b_p = warpgroup_mma_wait(1, deps=(b_p,)) * b_decay
        b_through = through
        if starts is not None:
            b_p = gl.where(o_x[:, None] >= begins[None, :], b_p, 0.0)
            b_through = gl.where(gl.convert_layout(begins, gl.SliceLayout(0, operand)) < 0, through, 0.0)
        b_p = b_p.to(dtype)
        to_end = decay_powers(log2_decay, num_rows - 1 - o_out) * scale
        decay, kept = gl.exp2(log2_decay * num_rows), 1.0
        if starts is not None:
            to_end = gl.where(o_out >= start_last, to_end, 0.0)
            decay = gl.where(start_last < 0, decay, 0.0)
            kept = gl.where(start_last < 0, 1.0, 0.0)
        b_out = warpgroup_mma_wait(0, deps=(b_out,)) * to_end[:, None]
        b_out = warpgroup_mma(gl.convert_layout(b_p, operand), z, b_out, is_async=True)
        q, do = s_q.index(stage).slice(OFFSET, HALF, 1), s_do.index(stage)
        e = start_adding_rows(e, q, do, decay, b_through, scale, kept, operand, SPLIT)
        b_out = warpgroup_mma_wait(0, deps=(b_out,))
        e = warpgroup_mma_wait(0, deps=(e,))
        signal(empty.index(stage))
        store_rows(d_out, coordinates(begin, length, row, i_h * D), s_out, b_out.to(dtype))
        n += 1
    return e, n


@gluon.jit
def gradient_rows(
    tiles, barriers, slopes, grad_final, grad_initial, segment_grads, cu_seqlens, starts,
    N, P, H, num_tasks, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A computing group: dv (GROUP 0: x = k, y = q, z = do) or dk (GROUP 1: x = v, y = do, z = q).

    Both need E, the gradient of the state after the chunk, whole. Each group keeps half of its rows in
    registers and they exchange 16-bit copies through shared memory, two buffers in turn.
    """
    D: gl.constexpr = tiles[1].shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    o_k = GROUP * (D // 2) + gl.arange(0, D // 2, gl.SliceLayout(1, layout))[:, None]
    offsets = o_k * D + gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    run_tasks(
        gradient_chunks, offsets, tiles, barriers, slopes, grad_final, grad_initial, segment_grads,
        cu_seqlens, starts, N, P, H, num_tasks, tiles[1].shape[1], D, layout, STAGES, GROUP, True,
    )  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME_SIZES)
def dk_dv_kernel(
    d_q, d_k, d_v, d_do, d_dk, d_dv, slopes, grad_final, grad_initial, segment_grads, cu_seqlens, starts,
    N, P, H, num_tasks, STAGES: gl.constexpr,
):  # fmt: skip
    """dk_dv_kernel of kernels/triton_lightning.py."""
    C: gl.constexpr = d_q.block_type.shape[2]
    D: gl.constexpr = d_q.block_type.shape[3]
    dtype: gl.constexpr = d_q.dtype
    whole: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, D], dtype)
    s_q = gl.allocate_shared_memory(dtype, [STAGES, C, D], whole)
    s_k = gl.allocate_shared_memory(dtype, [STAGES, C, D], whole)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, C, D], whole)
    s_do = gl.allocate_shared_memory(dtype, [STAGES, C, D], whole)
    s_e = gl.allocate_shared_memory(dtype, [2, D, D], whole)
    s_dk = gl.allocate_shared_memory(dtype, [C, D], whole)
    s_dv = gl.allocate_shared_memory(dtype, [C, D], whole)
    barriers = make_barriers(STAGES)
    gl.warp_specialize(
        [
            (gradient_rows, (
                (d_dv, s_k, s_q, s_do, s_q, s_do, s_e, s_dv), barriers,
                slopes, grad_final, grad_initial, segment_grads, cu_seqlens, starts,
                N, P, H, num_tasks, STAGES, 0,
            )),
            (gradient_rows, (
                (d_dk, s_v, s_do, s_q, s_q, s_do, s_e, s_dk), barriers,
                slopes, grad_final, grad_initial, segment_grads, cu_seqlens, starts,
                N, P, H, num_tasks, STAGES, 1,
            )),
            (load_rows, (
                (d_q, d_k, d_do, d_v), (s_q, s_k, s_do, s_v), barriers, cu_seqlens, N, P, H, num_tasks,
                STAGES, True,
            )),
        ],
        [4, 1], [240, 24],  # warps, and registers a thread, of the second group and of the moving warp
    )  # fmt: skip


def supports(q: Tensor, v: Tensor) -> bool:
    """Whether these kernels take such inputs: (B, N, H, 128) of 16 bits, on a GPU that the caller chooses."""
    return (
        q.shape[3] == v.shape[3] == HEAD_DIM
        and q.element_size() == 2
        and q.shape[0] * q.shape[1] < MAX_ROWS.value
    )


def addressable_rows(x: Tensor) -> Tensor:
    """x itself where one descriptor reaches all its rows, heads side by side; else a contiguous copy."""
    stride_b, stride_n, stride_h, stride_d = x.stride()
    side_by_side = stride_d == 1 and stride_h == x.shape[3] and stride_n % 8 == 0 and stride_n > 0
    one_run = x.shape[0] == 1 or stride_b == x.shape[1] * stride_n
    if side_by_side and one_run and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() ignores the strides of one row


def describe_rows(x: Tensor, columns: int = HEAD_DIM) -> TensorDescriptor:
    """Descriptor of all rows (B·N, H·D), moved in (CHUNK, columns) tiles, that can end after any row.

    The copy engine checks coordinates against a shape, and sequences end anywhere. So rows are described as
    2^30 with two dimensions before them of strides 2^34 - s and s, where s is a row's: at coordinate 2^30 the
    first one shifts addresses by -2^30 s, modulo 2^64. Row r of n rows from b on is then (2^30, b + n,
    2^30 - n + r): the right address, and out of bounds from r = n on. Loads give zero there, stores nothing.
    """
    stride = x.stride(1)
    return TensorDescriptor(
        x,
        shape=[2**31 - 2**16, 2**31 - 2**16, MAX_ROWS.value, x.shape[2] * x.shape[3]],
        strides=[2**34 - stride, stride, stride, 1],
        block_shape=[1, 1, CHUNK, columns],
        layout=_tile_layout(columns, x.dtype),
    )


@functools.cache  # two thirds of the time that making a descriptor takes
def _tile_layout(columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    gl_dtype = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, 1, CHUNK, columns], gl_dtype)


def _sizes(q: Tensor, segment_states: Tensor) -> tuple[tuple[int], tuple[int, int, int, int]]:
    """Grid, and the kernels' N, P, H and number of tasks."""
    N, H = q.shape[1:3]
    P = segment_states.shape[1] + 1
    num_tasks = segment_states.shape[0] * P * H
    waves = cdiv(num_tasks, torch.cuda.get_device_properties(q.device).multi_processor_count)
    return (cdiv(num_tasks, waves),), (N, P, H, num_tasks)


def walk(
    q, k, v, o, slopes, initial_state, final_state, segment_states, cu_seqlens, starts, transposed=False
) -> None:
    """Writes o and, unless None, the final state."""
    grid, sizes = _sizes(q, segment_states)
    walk_kernel[grid](
        *(describe_rows(addressable_rows(x)) for x in (q, k, v)), describe_rows(o, HEAD_DIM // 2),
        slopes, initial_state, final_state, segment_states, cu_seqlens, starts, *sizes,
        TRANSPOSED=transposed, STAGES=3, num_warps=4,
    )  # fmt: skip


def dk_dv(q, k, v, do, dk, dv, slopes, grad_final, grad_initial, segment_grads, cu_seqlens, starts) -> None:
    """Writes dk, dv and, unless None, grad_initial."""
    grid, sizes = _sizes(q, segment_grads)
    dk_dv_kernel[grid](
        *(describe_rows(addressable_rows(x)) for x in (q, k, v, do)), describe_rows(dk), describe_rows(dv),
        slopes, grad_final, grad_initial, segment_grads, cu_seqlens, starts, *sizes, STAGES=2, num_warps=4,
    )  # fmt: skip
