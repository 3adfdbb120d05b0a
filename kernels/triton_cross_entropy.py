"""Triton kernel of kernels/cross_entropy.py: a program reads its row of V logits twice, once from cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.torch_cross_entropy import IGNORED as IGNORED_TARGET

BLOCK = 8192  # logits of a row held at once
NUM_WARPS = 16


@triton.jit(do_not_specialize=["V"])
def cross_entropy_kernel(
    logits, targets, losses, V, stride, IGNORED: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr
):
    """losses[t] = log Σ exp(logits[t]) - logits[t, target]; logits[t] ← softmax - onehot. Grid: (T,)."""
    i_t = tl.program_id(0)
    row = logits + i_t.to(tl.int64) * stride
    target = tl.load(targets + i_t)
    scored = target != IGNORED
    known = (target >= 0) & (target < V)
    o_v = tl.arange(0, BLOCK)

    largest = -3.4e38  # finite: a first block may hold nothing but -inf
    total = 0.0
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + o_v, mask=start + o_v < V, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest), axis=0)
        largest = new_largest
    log_total = largest + tl.log(total)
    x_target = tl.load(row + tl.where(known, target, 0)).to(tl.float32)
    loss = tl.where(known, log_total - x_target, float("nan"))
    tl.store(losses + i_t, tl.where(scored, loss, 0.0))

    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for start in range(0, V, BLOCK):
            mask = start + o_v < V
            x = tl.load(row + start + o_v, mask=mask, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - log_total) - tl.where(start + o_v == target, 1.0, 0.0)
            gradient = tl.where(scored, gradient, 0.0)
            tl.store(row + start + o_v, gradient.to(logits.dtype.element_ty), mask=mask)


def cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """See kernels/cross_entropy.py."""
    num_tokens, vocab_size = logits.shape
    losses = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        cross_entropy_kernel[(num_tokens,)](
            logits, targets, losses, vocab_size, logits.stride(0),
            IGNORED=IGNORED_TARGET, BLOCK=BLOCK, GRADIENT=with_gradient, num_warps=NUM_WARPS,
        )  # fmt: skip
    return losses
