"""The PyTorch path of kernels/cross_entropy.py, on any device. T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # a target that is not scored


def torch_cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """As `kernels.cross_entropy.cross_entropy`: logits (T, V), targets (T,) → losses (T,) in nats, fp32."""
    scored = targets != IGNORED
    index = torch.where(scored, targets, 0)[:, None]
    log_probabilities = logits.float().log_softmax(-1)
    losses = torch.where(scored, -log_probabilities.gather(1, index)[:, 0], 0.0)
    if with_gradient:
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
        logits.copy_(torch.where(scored[:, None], gradient, 0.0))
    return losses
