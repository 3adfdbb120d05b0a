"""Gated linear attention, the token mixer of TransNormerLLM (arXiv 2307.14995, 2401.04658).

Shapes: B batch, N sequence, H heads, d head dim, D = H·d hidden; q and k have 2d features after LRPE.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import lightning_attention, lightning_attention_step
from kernels.quadratic import quadratic_attention
from models.config import ModelConfig
from models.decay import layer_slopes
from models.layers import Linear, cos_sin, make_norm


class RotateLRPE(torch.autograd.Function):
    """x (B, N, H, d) → concat[x cos(θt), x sin(θt)] (B, N, H, 2d) with θ (H, 1, d) and t (B or 1, N).

    Backward recomputes sines and cosines instead of keeping them, and sums θ's gradient in fp32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(x, theta, positions)
        cos, sin = cos_sin(positions, theta.squeeze(1))  # (B or 1, N, H, d)
        # not cat(…).to(…): PyTorch 2.11 gives a compiled forward that ends in a no-op no gradients
        return torch.cat([(x * cos).to(x.dtype), (x * sin).to(x.dtype)], dim=-1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, theta, positions = ctx.saved_tensors
        cos, sin = cos_sin(positions, theta.squeeze(1))
        grad_cos, grad_sin = grad.float().chunk(2, dim=-1)
        grad_x = (grad_cos * cos + grad_sin * sin).to(x.dtype)
        turn = (grad_sin * cos - grad_cos * sin) * x * positions[..., None, None].float()
        grad_theta = turn.sum(dim=(0, 1))[:, None, :].to(theta.dtype)  # (H, 1, d)
        return grad_x, grad_theta, None


class LRPE(nn.Module):
    """Linearized relative positional encoding with a learnt frequency per feature.

    `theta_fp32`, if set, is used in place of the parameter's value: an engine that stores parameters in
    bf16 puts its fp32 master there, since a rounded frequency is a wrong one at far positions.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shape = (config.num_heads, 1, config.head_dim)
        self.theta = nn.Parameter(torch.empty(self.shape, dtype=torch.float32))
        self.theta_fp32: Tensor | None = None

    def initial_theta(self) -> Tensor:
        """10000^(-2/d · arange(d)) over the whole hidden width d, fp32, (H, 1, head_dim)."""
        width = math.prod(self.shape)
        exponents = torch.arange(width, dtype=torch.float64, device=self.theta.device) * (-2.0 / width)
        return (10000.0**exponents).float().view(self.shape)

    def _apply(self, fn, recurse: bool = True):
        """Follow moves between devices, but keep θ's dtype when the model is cast to another."""
        theta = self.theta.data
        super()._apply(fn, recurse)
        if self.theta.dtype != theta.dtype:
            self.theta.data = theta.to(self.theta.device)
        return self

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q, k (B, N, H, d) at positions (B or 1, N) → the same with 2d features."""
        theta: Tensor = self.theta
        if self.theta_fp32 is not None:
            wide = theta.float()  # once: the gradients of q and k meet in fp32
            theta = wide + (self.theta_fp32 - wide).detach()
        return RotateLRPE.apply(q, theta, positions), RotateLRPE.apply(k, theta, positions)


class GatedLinearAttention(nn.Module):
    """q, k, v, u from one projection; out_proj(u * norm(attention(SiLU q, SiLU k, v))).

    The state of a layer is (B, H, Dk, Dv) in fp32, as `lightning_attention` takes and returns it.
    """

    slopes: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.config, self.layer = config, layer
        if config.gate == "full":
            self.qkvu_proj = Linear(hidden, 4 * hidden)
        else:
            self.qkv_proj = Linear(hidden, 3 * hidden)
        if config.gate == "low_rank":
            self.gate_proj = nn.Sequential(Linear(hidden, config.gate_size), Linear(config.gate_size, hidden))
        self.out_proj = Linear(hidden, hidden)
        self.norm = make_norm(config)
        self.lrpe = LRPE(config) if config.uses_lrpe(layer) else None
        self.register_buffer("slopes", self.fp32_slopes(None), persistent=False)

    def fp32_slopes(self, device: torch.device | None) -> Tensor:
        """(H,) from the settings."""
        return torch.tensor(layer_slopes(self.config, self.layer), dtype=torch.float32, device=device)

    def _apply(self, fn, recurse: bool = True):
        """Follow moves between devices, but keep the slopes in fp32 when the model is cast."""
        super()._apply(fn, recurse)
        self.slopes = self.fp32_slopes(self.slopes.device)
        return self

    def forward(
        self, x: Tensor, positions: Tensor, cu_seqlens: Tensor | None, state: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, N, D) → output (B, N, D) and, if `keep_state`, the state after the last token."""
        config = self.config
        u = None
        if config.gate == "full":
            q, k, v, u = self.qkvu_proj(x).chunk(4, dim=-1)
        else:
            q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (config.num_heads, config.head_dim)) for part in (q, k, v))
        if config.activation == "silu":
            q, k = F.silu(q), F.silu(k)
        if self.lrpe is not None:
            q, k = self.lrpe(q, k, positions)
        o, state = self._attend(q, k, v, cu_seqlens, state, keep_state)  # o (B, N, H, d)
        o = self.norm(o).flatten(-2) if config.output_norm == "head" else self.norm(o.flatten(-2))
        if config.gate == "low_rank":
            u = self.gate_proj(x)
        if u is not None:
            o = u * o
        return self.out_proj(o), state

    def _attend(self, q, k, v, cu_seqlens, state, keep_state):
        carries_state = state is not None or keep_state
        if self.config.attention == "quadratic" and not carries_state:
            o = quadratic_attention(q, k, v, self.slopes, cu_seqlens, backend=self.config.backend)
            return o, None
        decodes = state is not None and q.shape[1] == 1 and cu_seqlens is None
        if decodes and not torch.is_grad_enabled():  # the step has no gradient
            o, state = lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], self.slopes, state)
            return o[:, None], state
        return lightning_attention(
            q,
            k,
            v,
            self.slopes,
            initial_state=state,
            output_final_state=keep_state,
            cu_seqlens=cu_seqlens,
            backend=self.config.backend,
        )
