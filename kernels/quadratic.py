"""Lightning Attention-1: the same operator as a tiled left product, [(Q Kᵀ) ⊙ M] V.

Memory is linear in N but work is quadratic: it is the baseline that Lightning Attention-2 removes. On CUDA
devices it runs as a Triton kernel in a registered custom op, elsewhere in PyTorch.
Shapes: q, k (B, N, H, Dk); v, o (B, N, H, Dv); slopes (H,). B batch, N sequence, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.lightning_attention import (
    check_cu_seqlens,
    check_inputs,
    check_no_tangents,
    choose_backend,
    needs_fp32,
)
from kernels.torch_quadratic import torch_quadratic_attention

BACKENDS = ("auto", "triton", "torch")


def quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """o_t = Σ_{j ≤ t} exp(-s (t - j)) (q_t · k_j) v_j, without a state (TransNormerLLM, arXiv 2307.14995).

    Args:
        q, k: (B, N, H, Dk), v: (B, N, H, Dv), of one dtype: fp32, bf16, fp16 or, except for `triton`, fp64.
            Head dims are multiples of 8 up to 256.
        slopes: (H,) fp32, >= 0. No gradient.
        cu_seqlens: (S + 1,) int32 with B = 1: tokens attend within their sequence only.
        backend: `triton` (CUDA, or Triton's interpreter), `torch`, or `auto`: triton on CUDA devices.

    Returns:
        o (B, N, H, Dv) in v's dtype. Gradients reach q, k and v.

    Raises:
        ValueError: an argument is off; the message names it, what came and what is allowed.
    """
    check_inputs(q, k, v, slopes, num_dims=4)
    check_cu_seqlens(q, cu_seqlens)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}.")
    backend = choose_backend(backend, q)
    if backend == "torch":
        return torch_quadratic_attention(q, k, v, slopes, cu_seqlens)
    check_no_tangents(q=q, k=k, v=v)
    if needs_fp32(q, backend):
        return _forward(q.float(), k.float(), v.float(), slopes, cu_seqlens).to(v.dtype)
    return _forward(q, k, v, slopes, cu_seqlens)


@torch.library.custom_op("lightning_attention::quadratic_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    from kernels import triton_quadratic  # Triton is imported on first use only

    o = v.new_empty(v.shape)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        triton_quadratic.forward(q, k, v, slopes, cu_seqlens, o)
    return o


@_forward.register_fake
def _(q, k, v, slopes, cu_seqlens):
    return v.new_empty(v.shape)


@torch.library.custom_op("lightning_attention::quadratic_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor | None, grad_o: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels import triton_quadratic

    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    with torch.cuda.device_of(q):
        triton_quadratic.backward(q, k, v, slopes, cu_seqlens, grad_o, dq, dk, dv)
    return dq, dk, dv


@_backward.register_fake
def _(q, k, v, slopes, cu_seqlens, grad_o):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_of_forward(ctx, grad_o):
    return *_backward(*ctx.saved_tensors, grad_o), None, None


_forward.register_autograd(_backward_of_forward, setup_context=_save_for_backward)
