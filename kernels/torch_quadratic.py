"""Lightning Attention-1 in PyTorch, on any device: row tiles of the left product [(Q Kᵀ) ⊙ M] V.

Shapes: q, k (B, N, H, Dk); v, o (B, N, H, Dv); slopes (H,). B batch, N sequence, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference import compute_dtype, without_autocast

TILE_TOKENS = 256


def torch_quadratic_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """See kernels/quadratic.py. Scores are decayed in fp32, of fp64 inputs in fp64."""
    if cu_seqlens is None:
        sequence = torch.zeros(q.shape[1], dtype=torch.int64, device=q.device)
    else:
        tokens = torch.arange(q.shape[1], device=q.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens, tokens, right=True)
    return _TiledLeftProduct.apply(q, k, v, slopes, sequence)


class _TiledLeftProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, slopes, sequence):
        ctx.save_for_backward(q, k, v, slopes, sequence)
        return _left_product(q, k, v, slopes, sequence, reverse=False)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, slopes, sequence = ctx.saved_tensors
        grad_q = _left_product(grad, v, k, slopes, sequence, reverse=False)
        grad_k = _left_product(v, grad, q, slopes, sequence, reverse=True)
        grad_v = _left_product(k, q, grad, slopes, sequence, reverse=True)
        return grad_q, grad_k, grad_v, None, None


@without_autocast
def _left_product(q, k, v, slopes, sequence, *, reverse: bool) -> Tensor:
    """Row tiles of [(Q Kᵀ) ⊙ M] V; `reverse` looks at later tokens, Mᵀ, instead of earlier ones."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
    length = q.shape[2]
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
    positions = torch.arange(length, device=q.device)
    slopes = slopes.to(compute_dtype(q.dtype))
    for start in range(0, length, TILE_TOKENS):
        rows = slice(start, min(start + TILE_TOKENS, length))
        columns = slice(start, length) if reverse else slice(0, rows.stop)
        distance = positions[rows, None] - positions[None, columns]
        if reverse:
            distance = -distance
        visible = (distance >= 0) & (sequence[rows, None] == sequence[None, columns])
        decay = torch.exp(-slopes[:, None, None] * distance.clamp_min(0)) * visible  # (H, rows, columns)
        scores = (q[:, :, rows] @ k[:, :, columns].transpose(-1, -2)).to(decay.dtype) * decay
        out[:, :, rows] = scores.to(v.dtype) @ v[:, :, columns]
    return out.transpose(1, 2)
