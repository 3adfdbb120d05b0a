"""Cross entropy of logits, with its gradient in the logits' own memory.

A head's logits are its largest tensor. Forming the gradient in place, in the same pass as the loss, moves
each logit through memory once in and once out. On CUDA this is one Triton kernel; elsewhere it is PyTorch.
Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from kernels.torch_cross_entropy import IGNORED, torch_cross_entropy

__all__ = ["IGNORED", "cross_entropy"]


def cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """Losses in nats; with `with_gradient`, `logits` becomes the gradient of their sum.

    Args:
        logits: (T, V) contiguous; overwritten if `with_gradient`.
        targets: (T,) int64 in [0, V), or -100: no loss and no gradient.

    Returns:
        (T,) fp32, 0 where the target is -100. Another target outside [0, V) raises a RuntimeError on a CPU,
        and its loss is NaN on a GPU.
    """
    if logits.is_cuda:
        from kernels import triton_cross_entropy

        return triton_cross_entropy.cross_entropy(logits, targets, with_gradient)
    return torch_cross_entropy(logits, targets, with_gradient)
