"""Causal softmax attention with RoPE: the token mixer of the Llama baseline and of hybrid stacks.

Shapes: B batch, N sequence, H heads, d head dim. The cache of a layer is (k, v), each (B, S, H, d) with S
the tokens seen so far: unlike the linear state it grows. Packed sequences have a list of such pairs, B = 1.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.config import ModelConfig
from models.layers import Linear, cos_sin

# PyTorch alone takes its FlashAttention 2, which is slower on Hopper GPUs (docs/results.md).
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def rope_rotations(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (Su et al. 2021) at positions (B or 1, N), each (B or 1, N, 1, d/2), fp32."""
    half = head_dim // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    return cos_sin(positions, frequencies[None])


def apply_rope(x: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x (B, N, H, d), halves as pairs."""
    cos, sin = rotations
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class SoftmaxAttention(nn.Module):
    """Multi-head causal attention through PyTorch's scaled_dot_product_attention or varlen_attn."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv_proj = Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        rotations: tuple[Tensor, Tensor],
        cu_seqlens: Tensor | None,
        state: Any,
        keep_state: bool,
    ) -> tuple[Tensor, Any]:
        """x (B, N, D) → output (B, N, D) and, if `keep_state`, the keys and values seen so far.

        The model computes `rotations` (rope_rotations) once for all layers.
        """
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in self.qkv_proj(x).chunk(3, dim=-1))
        q, k = apply_rope(q, rotations), apply_rope(k, rotations)
        if cu_seqlens is not None:
            o, state = packed_causal_attention(q, k, v, cu_seqlens, state, keep_state)
            return self.out_proj(o.flatten(-2)), state
        if state is not None:
            k, v = torch.cat([state[0], k], dim=1), torch.cat([state[1], v], dim=1)
        return self.out_proj(causal_attention(q, k, v).flatten(-2)), (k, v) if keep_state else None


def softmax_backend(device: torch.device, precision: str, packed: bool) -> str:
    """The PyTorch kernel that serves these layers, in words."""
    if packed and device.type == "cuda" and precision != "fp32":
        return "varlen_attn, FlashAttention"
    if packed:
        return "scaled_dot_product_attention, a document at a time"
    if device.type == "cuda":
        return "scaled_dot_product_attention, cuDNN's where it takes the inputs"
    return "scaled_dot_product_attention, the backend of PyTorch's choice"


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, N, H, d) attends to k, v (B, S, H, d), S >= N, the last query being the last key's token."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_queries == num_keys:
        # cuDNN prepares each new shape for long, so only in training, where shapes are few
        fastest = q.is_cuda and torch.is_grad_enabled()
        with sdpa_kernel(FASTEST_FIRST, set_priority=True) if fastest else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    mask = mask.tril(num_keys - num_queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def packed_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, state: list | None, keep_state: bool
) -> tuple[Tensor, list | None]:
    """Causal attention within each of the sequences packed into (1, T, H, d), which `state` may begin."""
    if state is None and not keep_state and q.is_cuda and q.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        longest = q.shape[1]  # an upper bound spares a device-to-host copy of the lengths
        o: Any = varlen_attn(q[0], k[0], v[0], cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))
        return o[None], None
    outputs: list[Tensor] = []
    next_state: list[tuple[Tensor, Tensor]] = []
    for sequence, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        keys, values = k[:, start:stop], v[:, start:stop]
        if state is not None:
            keys = torch.cat([state[sequence][0], keys], dim=1)
            values = torch.cat([state[sequence][1], values], dim=1)
        next_state.append((keys, values))
        if stop > start:
            outputs.append(causal_attention(q[:, start:stop], keys, values))
    return torch.cat(outputs, dim=1), next_state if keep_state else None
