"""Cross entropy of logits, with its gradient in the logits' own memory.

A head's logits are its largest tensor. Forming the gradient in place, in the same pass as the loss, moves
each logit through memory once in and once out. On CUDA this is one Triton kernel; elsewhere it is PyTorch.
Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # a target that is not scored


def cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """Losses in nats; with `with_gradient`, `logits` becomes the gradient of their sum.

    Args:
        logits: (T, V) contiguous; overwritten if `with_gradient`.
        targets: (T,) int64 in [0, V), or -100: no loss and no gradient.

    Returns:
        (T,) fp32, 0 where the target is -100.
    """
    if logits.is_cuda:
        from kernels import triton_cross_entropy

        return triton_cross_entropy.cross_entropy(logits, targets, with_gradient)
    scored = targets != IGNORED
    index = targets.clamp_min(0)[:, None]
    log_probabilities = logits.float().log_softmax(-1)
    losses = -log_probabilities.gather(1, index)[:, 0] * scored
    if with_gradient:
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
        logits.copy_(gradient * scored[:, None])
    return losses
