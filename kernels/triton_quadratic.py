"""The Triton kernel of Lightning Attention-1: row tiles of the left product [(A Bᵀ) ⊙ M] C.

One kernel serves all four passes: o from (q, k, v), dq from (do, v, k), and with Mᵀ in place of M, looking at
later rows, dk from (v, do, q) and dv from (k, q, do). A program takes one tile of output rows of one sequence
and head, and walks over the tiles of rows that it sees; those of the other triangle are never read. Every
output is written by one program, in one order: no atomics, the same bits every time.

The decay between rows i and j of tiles that don't touch the diagonal is split at the border of the output
tile into λ^(distance of i) and λ^(distance of j), both of exponents that are never negative: one factor
scales the columns of the scores, the other the finished rows.

Shapes: a, b (B, N, H, DA); c, out (B, N, H, DC); slopes (H,). B batch, N rows, H heads, S sequences (B, or
those of cu_seqlens); tiles have BM output rows and BN rows looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import padded
from kernels.triton_lightning import (
    LOG2_E,
    aligned_rows,
    allocate_descriptors,
    contiguous_or_none,
    decay_powers,
    describe_rows,
    packed_strides,
    sequence_rows,
)


@dataclass(frozen=True)
class Tiles:
    """Tile rows, and what the compiler needs besides."""

    output_rows: int
    rows: int  # divides output_rows
    num_warps: int
    num_stages: int


# Largest padded head dim -> tiles. 16-bit inputs on sm_90 and later: registers and spills in docs/kernels.md.
_HOPPER = {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 64, 8, 2)}
_OTHERS = {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(32, 32, 4, 1)}
_FP32 = {64: Tiles(32, 16, 4, 1), 128: Tiles(32, 16, 8, 1), 256: Tiles(16, 16, 8, 1)}


def choose_tiles(dtype: torch.dtype, head_dim: int, device: torch.device) -> Tiles:
    """The tiles for the larger head dim."""
    table = _OTHERS
    if dtype == torch.float32:
        table = _FP32
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        table = _HOPPER
    return table[max(64, padded(head_dim))]


@triton.jit(do_not_specialize=["N", "num_tiles", "H"])
def left_product_kernel(
    a, b, c, out, slopes, cu_seqlens, a_strides, b_strides, c_strides, out_strides, N, num_tiles, H,
    DA: tl.constexpr, DC: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_{j <= i} λ^(i-j) (a_i·b_j) c_j within a sequence; REVERSE: Σ_{j >= i} λ^(j-i) (a_i·b_j) c_j.

    Grid: S·num_tiles·H, tiles outermost and those with most to do first.
    """
    i_h = tl.program_id(0) % H
    num_sequences = tl.num_programs(0) // H // num_tiles
    i_seq = tl.program_id(0) // H % num_sequences
    i_tile = tl.program_id(0) // H // num_sequences
    if not REVERSE:
        i_tile = num_tiles - 1 - i_tile
    i_b, begin, length = sequence_rows(cu_seqlens, i_seq, N)
    row = i_tile * BM
    if row < length:
        d_a = describe_rows(a, a_strides, i_b, i_h, begin, length, DA, BM, BA)
        d_b = describe_rows(b, b_strides, i_b, i_h, begin, length, DA, BN, BA)
        d_c = describe_rows(c, c_strides, i_b, i_h, begin, length, DC, BN, BC)
        d_out = describe_rows(out, out_strides, i_b, i_h, begin, length, DC, BM, BC)
        log2_decay = -tl.load(slopes + i_h) * LOG2_E
        o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
        b_a = d_a.load([row, 0])  # [BM, BA]
        b_out = tl.zeros([BM, BC], dtype=tl.float32)

        first, last = 0, row  # rows beyond the output tile, all of them seen
        if REVERSE:
            first, last = row + BM, length
        for start in range(first, last, BN):
            distance = start + o_n - first if REVERSE else last - start - o_n
            b_b = d_b.load([start, 0])  # [BN, BA]
            b_c = d_c.load([start, 0])  # [BN, BC]
            b_p = tl.dot(b_a, tl.trans(b_b), input_precision="ieee")  # [BM, BN]
            b_p *= decay_powers(log2_decay, distance)[None, :]
            b_out = tl.dot(b_p.to(b_c.dtype), b_c, b_out, input_precision="ieee")
        b_out *= decay_powers(log2_decay, BM - o_m if REVERSE else o_m)[:, None]

        for start in range(row, tl.minimum(row + BM, length), BN):  # the tile on the diagonal
            distance = row + o_m[:, None] - start - o_n[None, :]
            b_b = d_b.load([start, 0])
            b_c = d_c.load([start, 0])
            b_p = tl.dot(b_a, tl.trans(b_b), input_precision="ieee")
            b_p *= decay_powers(log2_decay, -distance if REVERSE else distance)
            b_out = tl.dot(b_p.to(b_c.dtype), b_c, b_out, input_precision="ieee")
        d_out.store([row, 0], b_out.to(b_a.dtype))


def _left_product(
    a: Tensor, b: Tensor, c: Tensor, out: Tensor, slopes: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> None:
    """Launch the kernel; writes out."""
    B, N, H, DA = a.shape
    DC = c.shape[3]
    tiles = choose_tiles(a.dtype, max(DA, DC), a.device)
    num_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    num_tiles = triton.cdiv(N, tiles.output_rows)
    triton.set_allocator(allocate_descriptors)
    left_product_kernel[(num_sequences * num_tiles * H,)](
        a, b, c, out, slopes.contiguous(), contiguous_or_none(cu_seqlens),
        *packed_strides(a, b, c, out),
        N, num_tiles, H,
        DA=DA, DC=DC, BA=padded(DA), BC=padded(DC), BM=tiles.output_rows, BN=tiles.rows, REVERSE=reverse,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def forward(q, k, v, slopes, cu_seqlens, o) -> None:
    """Writes o."""
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    _left_product(q, k, v, o, slopes, cu_seqlens, reverse=False)


def backward(q, k, v, slopes, cu_seqlens, grad_o, dq, dk, dv) -> None:
    """Writes dq, dk and dv."""
    q, k, v, do = aligned_rows(q), aligned_rows(k), aligned_rows(v), aligned_rows(grad_o)
    _left_product(do, v, k, dq, slopes, cu_seqlens, reverse=False)
    _left_product(v, do, q, dk, slopes, cu_seqlens, reverse=True)
    _left_product(k, q, do, dv, slopes, cu_seqlens, reverse=True)
